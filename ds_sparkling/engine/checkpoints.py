"""The growth record's way into and out of DeepSpeed's checkpoints."""

from __future__ import annotations

import inspect
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine import hooks
from ds_sparkling.engine.fail_together import FailTogether, follows_another
from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.internals import clients_own, own_files
from ds_sparkling.engine.logical_names import logical_shapes
from ds_sparkling.errors import CheckpointError
from ds_sparkling.files import whole_file
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.spec.record import (
    FILE_NAME,
    GrowthRecord,
    check_shapes,
    check_steps,
    find_checkpoint,
    read_record,
)

logger = logging.getLogger(__name__)


def hook_checkpoints(engine: DeepSpeedEngine, step: BirthStep) -> None:
    """Make the engine's own ``save_checkpoint`` and ``load_checkpoint`` carry and check the growth record.

    Args:
        engine: the engine.
        step: its optimizer step, which has to look at the births anew after a load.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        how = f"save_latest={bool(save_latest)}, exclude_frozen_parameters={bool(exclude_frozen_parameters)}"
        all_ranks = FailTogether(f"saving {Path(save_dir) / tag}", alike=f"saving {tag} ({how})", kind=CheckpointError)
        with all_ranks:
            if rank == 0:
                run = run_of(engine)
                run.observations.look_at_losses()
                replace(run.record, spent=run.spent).write(Path(save_dir) / tag)
                run.observations.write(Path(save_dir) / tag)
        all_ranks.settle()
        # What is written in the background becomes the latest when DeepSpeed has seen it finished.
        background = engine.checkpoint_engine.is_decoupled()
        with all_ranks.together(), _writes_held(engine.checkpoint_engine, all_ranks):
            saved = save(save_dir, tag, dict(client_state or {}), save_latest and background, exclude_frozen_parameters)
        all_ranks.settle()
        if save_latest and not background:
            with all_ranks:
                if engine.global_rank == 0:
                    with whole_file(Path(save_dir) / "latest") as latest:
                        latest.write_text(tag)
            all_ranks.settle()
        run_of(engine).client.see(client_state, engine.global_steps)
        return saved

    def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        all_ranks = FailTogether(
            f"loading {load_dir}", alike=f"loading {tag or 'the latest checkpoint'}", kind=CheckpointError
        )
        how = inspect.signature(load).bind_partial(load_dir, tag, *args, **kwargs).arguments
        weights_alone = bool(how.get("load_module_only", False))
        with all_ranks:
            found = find_checkpoint(load_dir, tag, universal=engine.load_universal_checkpoint())
            record = None if found is None else read_record(found)
            if found is not None and not engine.load_universal_checkpoint():
                module_only = weights_alone or not how.get("load_optimizer_states", True)
                for file in own_files(engine, load_dir, found.name, module_only=module_only):
                    _check_whole(file)
            if found is not None:
                _check_record(engine, record, found)
                run_of(engine).observations.read(found)
                run_of(engine).observations.unseen_losses = []
                run_of(engine).observations.spent = None if record is None else record.spent
        all_ranks.settle()
        if found is not None and record is None and engine.global_rank == 0:
            logger.warning("%s has no growth record; taken as saved at %s", found, run_of(engine).widths)
        result: Any = (None, None)
        with all_ranks.together(), _built_by(record, found):
            result = load(load_dir, tag, *args, **kwargs)
        all_ranks.settle()
        if result[0] is not None:
            run_of(engine).client.see(clients_own(result[1]), engine.global_steps)
        if result[0] is not None and engine.load_universal_checkpoint():
            _restore_groups(engine)
        if record is not None and found is not None and result[0] is not None:
            engine.sparkling = replace(run_of(engine), record=record)
            step.forget_blocks()
            with all_ranks:
                if not weights_alone:
                    check_steps(found, record, engine.global_steps)
                _check_schedule(engine, found)
            all_ranks.settle()
            growth = engine.sparkling.due(engine.global_steps)
            if growth is not None and engine.global_rank == 0:
                logger.info(
                    "the growth planned at step %d is due: call grow_if_due before the next step", growth.at_step
                )
        return result

    hooks.SAVE_CHECKPOINT.install(engine, save_checkpoint)
    hooks.LOAD_CHECKPOINT.install(engine, load_checkpoint)


@contextmanager
def _writes_held(checkpoint_engine: Any, all_ranks: FailTogether) -> Iterator[None]:
    """Keep what fails on one rank's disk in ``all_ranks``, so that the collectives of saving go on on all ranks."""

    def held(write: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with all_ranks:
                return write(*args, **kwargs)

        return guarded

    with ExitStack() as stack:
        for hook in (hooks.MAKE_DIRECTORIES, hooks.WRITE_FILE, hooks.COMMIT_FILES):
            stack.enter_context(hook.during(checkpoint_engine, held(getattr(checkpoint_engine, hook.attribute))))
        yield


def _check_whole(file: Path) -> None:
    """Look whether a file that torch has saved is there to its end, where a zip archive has its directory.

    DeepSpeed would find out on this rank alone, when the others wait for it in collectives.

    Raises:
        CheckpointError: if it isn't.
    """
    way_out = "copy it again from where it is whole, or load another checkpoint"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, and this rank is to load it: {way_out}; what another number of ranks has saved loads "
            "from a universal checkpoint"
        )
    with file.open("rb") as opened:
        archive = opened.read(2) in (b"PK", b"P", b"")  # releases of torch before 1.6 saved otherwise
    if archive and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is cut off after {file.stat().st_size} bytes: {way_out}")


def _check_schedule(engine: DeepSpeedEngine, path: Path | None) -> None:
    """The scheduler must know every growth in the record, and the groups must be those that were saved.

    Raises:
        CheckpointError: if the loaded schedule is that of another run.
    """
    scheduler, growths = engine.lr_scheduler, len(run_of(engine).record.growths)
    if not scheduler.births and growths:
        scheduler.settle(growths)
        if engine.global_rank == 0:
            logger.warning(
                "no re-warm-up was loaded from %s: the elements of all %d growths follow the base rate", path, growths
            )
    if len(scheduler.births) != growths:
        raise CheckpointError(
            f"{path}: the scheduler's state knows {len(scheduler.births)} growths, the growth record {growths}; they "
            "belong to different checkpoints"
        )


def _restore_groups(engine: DeepSpeedEngine) -> None:
    """Universal checkpoints come back with the first group's settings in every group; put back what was saved."""
    changed = engine.lr_scheduler.restore_groups()
    if changed and engine.global_rank == 0:
        logger.warning(
            "a universal checkpoint gave every group the first one's settings; restored %s", ", ".join(changed)
        )


@contextmanager
def _built_by(record: GrowthRecord | None, path: Path | None) -> Iterator[None]:
    """Name the record in what DeepSpeed says of a checkpoint that doesn't fit the model that was built by it.

    Raises:
        CheckpointError: for what DeepSpeed and torch raise where tensors have other names or sizes.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        if record is None or path is None or follows_another(error):
            raise
        raise CheckpointError(
            f"{path} doesn't load: {type(error).__name__}: {error}. If its tensors have other sizes than the model, "
            f"the growth record {path / FILE_NAME} isn't this checkpoint's: it gives widths {record.widths}"
        ) from error


def _check_record(engine: DeepSpeedEngine, recorded: GrowthRecord | None, path: Path) -> None:
    """The checkpoint's widths must be the engine's, and its axes those of the engine's parameters."""
    own = run_of(engine).record
    if recorded is None:
        if own.growths:
            raise CheckpointError(
                f"{path} has no growth record, but this engine has grown to {own.widths}; load it into an engine at "
                "the widths it was saved with"
            )
    elif recorded.widths != own.widths:
        raise CheckpointError(
            f"{path} was saved at widths {recorded.widths}, this engine has {own.widths}; build it with "
            f"initialize(..., checkpoint={str(path.parent)!r}, tag={path.name!r})"
        )
    else:
        check_shapes(path, recorded, recorded.axes, logical_shapes(engine), "this engine")
