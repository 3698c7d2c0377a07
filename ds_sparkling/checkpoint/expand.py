"""The main path of the file room: look at a checkpoint, plan, write it wider or on another topology, publish it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ds_sparkling.checkpoint.contents import BLOCK, Contents
from ds_sparkling.checkpoint.export import HuggingFaceFiles, experts_are_stacked, widened_config
from ds_sparkling.checkpoint.layout import Layout, Settings, make_layout, regrouped
from ds_sparkling.checkpoint.metadata import MOST, buffer_shapes, expert_layers
from ds_sparkling.checkpoint.opening import check_files, find, open_checkpoint, understanding
from ds_sparkling.checkpoint.output import Filler, OutputFile, OutputSummary
from ds_sparkling.checkpoint.parameter_axes import ModelAxes, check_record, checkpoint_axes
from ds_sparkling.checkpoint.publish import check_free, check_names, published, staging, writing
from ds_sparkling.checkpoint.request import FORMATS, Request
from ds_sparkling.checkpoint.source import Source
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.checkpoint.universal import UniversalFiles
from ds_sparkling.checkpoint.zero_files import ZeroFiles, file_prefix
from ds_sparkling.errors import CheckpointError
from ds_sparkling.growth import GrowthPlan, make_plan
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.optim.scheduler import grown_state, regrouped_state
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.config import BLOCK as CONFIG_BLOCK
from ds_sparkling.spec.config import SparklingConfig, read_json, sparkling_config
from ds_sparkling.spec.record import GrowthRecord

logger = logging.getLogger(__name__)

#: Wider than any model is along any axis.
_WIDEST = 2**24
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


class Files(Protocol):
    """What builds the files of one format."""

    def names(self) -> list[str]: ...

    def telling(self) -> list[str]: ...

    def build(self, name: str) -> OutputFile: ...


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Everything that is decided before anything is written.

    Attributes:
        source: the checkpoint, looked at.
        plan: the growth; None without.
        contents: the parameters to write.
        layout: their new layout.
        record: the growth record to write.
        files: what builds the files.
    """

    request: Request
    source: Source
    plan: GrowthPlan | None
    contents: Contents
    layout: Layout
    record: GrowthRecord | None
    files: Files

    @property
    def tag(self) -> str:
        return self.source.path.name

    @property
    def folder(self) -> str:
        """Where the files go within the output directory."""
        return "" if self.request.format == "hf" else self.tag

    @property
    def bytes_to_write(self) -> int:
        """Of tensors."""
        computed = sum(param.numel * param.dtype.itemsize for param in self.contents.params.values())
        if self.request.format == "hf":
            return computed
        return self.contents.bytes + (computed if self.layout.settings.stage < 3 else 0)

    @property
    def bytes_to_read(self) -> int:
        return sum(path.stat().st_size for path in self.source.files)

    @property
    def memory(self) -> int:
        """Bytes that the workers need for the tensors in their hands, about."""
        return self.request.workers * BLOCK * 4 * 6

    def describe(self) -> str:
        """The plan as text: the growth, and what will be written where."""
        old, new = self.source.layout.settings, self.layout.settings
        lines = [] if self.plan is None else [plan_in_words(self.plan), ""]
        lines += [
            f"checkpoint        {self.source.path}: ZeRO-{old.stage}, {len(self.source.layout.params)} parameters",
            f"ranks             {old.ranks} -> {new.ranks}",
            f"expert-parallel   {old.expert_parallel} -> {new.expert_parallel}",
            f"output            {self.request.out}: format {self.request.format}, {len(self.files.names())} files",
            f"to read           {_size(self.bytes_to_read)}",
            f"to write          {_size(self.bytes_to_write)} ({_size(_free(self.request.out))} free)",
            f"memory            about {_size(self.memory)} for {self.request.workers} workers, besides the libraries",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        new = self.layout.settings
        return {
            "checkpoint": str(self.source.path),
            "out": str(self.request.out),
            "tag": self.tag,
            "format": self.request.format,
            "zero_stage": new.stage,
            "world_size": new.ranks,
            "expert_parallel": new.expert_parallel,
            "widths": dict(self.request.widths),
            "parameters": sum(param.numel for param in self.contents.params.values()),
            "files": len(self.files.names()),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "bytes_free": _free(self.request.out),
            "plan": None if self.plan is None else self.plan.to_dict(),
        }


def prepare(request: Request, team: Team, *, progress: bool = False) -> Expansion:
    """Look at the whole checkpoint and decide everything; nothing is written.

    Raises:
        SparklingError: names the file, parameter or argument that is wrong, and the way out.
    """
    if request.format not in FORMATS:
        raise CheckpointError(f"unknown format {request.format!r}; known: {', '.join(FORMATS)}")
    _check_request(request)
    request = replace(request, out=_absolute(request.out))
    with understanding(request.checkpoint):
        path = find(request.checkpoint, request.tag)
    with writing(request.out):
        _check_out(request, path)
    request = replace(request, checkpoint=path.parent)
    source = open_checkpoint(path, trust=request.trust, verify=request.verify)
    check_files(source, team, progress=progress)
    with understanding(path):
        expansion = _decide(request, source)
    with writing(request.out):
        check_names(request.out, (f"{expansion.folder}/{name}" for name in expansion.files.names()))
    team.together(lambda: _rehearse(expansion, team))
    return expansion


def _decide(request: Request, source: Source) -> Expansion:
    """Everything that follows from the checkpoint and the request."""
    check_record(source)
    settings = _settings(source, request)
    block = _block(source, request)
    model = checkpoint_axes(source, request.widths, request.config, block) if request.widths else None
    plan = None if model is None else _plan(source, model, request, block)
    contents = Contents(source, plan)
    groups, origins = regrouped(source.layout, contents.params, settings.expert_parallel)
    layout = make_layout(settings, contents.params, groups)
    scheduler = source.model_states(0).get("lr_scheduler")
    if plan is not None:
        param_groups = [group.settings for group in source.layout.groups]
        config = (source.model_states(0).get("ds_config") or {}).get("scheduler") or {}
        scheduler = grown_state(scheduler, param_groups, plan.strategy, config)
    scheduler = regrouped_state(scheduler, origins)
    record = source.record
    if plan is not None and model is not None:
        record = _record(source, model, plan, block)
    files = _files(request, contents, layout, scheduler, source)
    return Expansion(
        request=request, source=source, plan=plan, contents=contents, layout=layout, record=record, files=files
    )


def expand(expansion: Expansion, team: Team, *, progress: bool = False) -> dict[str, Any]:
    """Write what was prepared; the output appears under its name when it is complete.

    Returns:
        A summary: what was written, how long it took.

    Raises:
        CheckpointError: if something can't be written; then nothing of it is left.
    """
    request, began = expansion.request, time.monotonic()
    with writing(request.out):
        free, needed = _free(request.out), expansion.bytes_to_write
    if needed > free:
        raise CheckpointError(f"{request.out} needs {_size(needed)}, but only {_size(free)} are free there")
    publishing = published(request.out) if team.rank == 0 else contextlib.nullcontext(staging(request.out))
    with contextlib.ExitStack() as stack:
        root = team.together(lambda: stack.enter_context(publishing))
        shown = progress and team.rank == 0
        with _bar("writing", needed // team.size, shown) as bar:
            filler = Filler(expansion.contents, workers=request.workers, verify=request.verify, progress=bar.update)
            team.together(lambda: _fill(filler, expansion, root, team))
        if request.verify:
            with _bar("verifying", filler.report.written, shown) as bar:
                team.together(lambda: filler.verify(bar.update))
        team.together(lambda: _finish(expansion, root) if team.rank == 0 else None)
        team.together(stack.close)
    return _summary(expansion, filler.report, team, time.monotonic() - began)


# -- preparing --------------------------------------------------------------------------------------------------


def _check_request(request: Request) -> None:
    """What can be told of a request without looking at the checkpoint."""
    paths = {"CKPT": request.checkpoint, "OUT": request.out, "--tag": request.tag, "--config": request.config}
    for what, given in (paths | {"--deepspeed_config": request.deepspeed_config}).items():
        if "\0" in str(given):
            raise CheckpointError(f"{what} is {str(given)!r:.200}, but no path can hold a NUL character")
    for what, count in {"--world-size": request.world_size, "--expert-parallel": request.expert_parallel}.items():
        if count is not None and not 1 <= count <= MOST:
            raise CheckpointError(f"{what} is {_digits(count)}, must be at least 1 and at most {MOST}")
    for axis, width in request.widths.items():
        if width > _WIDEST:
            raise CheckpointError(f"--widths: {axis} is {_digits(width)}, must be at most {_WIDEST}")


def _digits(count: int) -> str:
    """A number, if it is short enough to be read."""
    return str(count) if abs(count) < 10**30 else "a number of more than 30 digits"


def _absolute(out: Path) -> Path:
    """The same place, whatever it is called; links to it are left, those on the way are followed."""
    try:
        return out.parent.resolve() / out.name if out.name not in ("", "..") else out.resolve()
    except (OSError, RuntimeError) as error:  # a RuntimeError is what pathlib makes of links that lead in a circle
        raise CheckpointError(f"{out} can't be made: {error}; name another directory") from error


def _check_out(request: Request, path: Path) -> None:
    out = request.out
    check_free(out)
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} isn't a directory; make it, or name another")
    for held in (request.checkpoint, path):
        if any(place.exists() and place.samefile(held) for place in (out, *out.parents)):
            raise CheckpointError(f"{out} lies in the checkpoint {held}; name a directory outside of it")


def _rehearse(expansion: Expansion, team: Team) -> None:
    """Build files from all metadata, each process its share: what can't be built shows before anything is written."""
    for name in expansion.files.telling()[team.rank :: team.size]:
        with understanding(expansion.source.path):
            expansion.files.build(name)


def _settings(source: Source, request: Request) -> Settings:
    """Those of the output's layout."""
    old = source.layout.settings
    ranks = old.ranks if request.world_size is None else request.world_size
    shared = old.expert_parallel if request.expert_parallel is None else request.expert_parallel
    layers = expert_layers(source.model_states(0))
    if shared > 1 and not layers:
        raise CheckpointError("--expert-parallel: the checkpoint has no experts that AutoEP has split")
    if ranks % shared:
        raise CheckpointError(f"{ranks} ranks can't be expert-parallel groups of {shared}")
    for layer in layers:
        if layer.experts % shared:
            raise CheckpointError(f"{layer.path} has {layer.experts} experts, which {shared} ranks can't share evenly")
    return replace(old, ranks=ranks, expert_parallel=shared)


def _block(source: Source, request: Request) -> SparklingConfig:
    """The ``"sparkling"`` block in force."""
    if request.deepspeed_config is not None:
        return sparkling_config(read_json(request.deepspeed_config))
    config = source.model_states(0).get("ds_config") or {}
    return sparkling_config({CONFIG_BLOCK: config.get(CONFIG_BLOCK, {})})


def _plan(source: Source, model: ModelAxes, request: Request, block: SparklingConfig) -> GrowthPlan:
    shapes = {name: param.shape for name, param in source.layout.params.items()}
    number = 1 + (len(source.record.growths) if source.record is not None else 0)
    share = None if expert_layers(source.model_states(0)) else 1.0  # a checkpoint doesn't tell top-k
    return make_plan(
        shapes,
        model.axes,
        model.widths,
        request.widths,
        block.strategy,
        number=number,
        active_share=share,
        buffers=buffer_shapes(source.model_states(0)),
    )


def _record(source: Source, model: ModelAxes, plan: GrowthPlan, block: SparklingConfig) -> GrowthRecord:
    """The growth record after the growth, which counts as the planned growth that has these widths, if there is one."""
    before = source.record or GrowthRecord({}, {})
    started = {**model.widths, **before.initial_widths}
    # Axes of a hints file are in the checkpoint's names; the engine then finds out those of the model as built.
    same = started.keys() == before.initial_widths.keys()
    axes, tried = (model.built, model.tried) if model.built else (before.axes, before.tried) if same else ({}, ())
    record = replace(before, initial_widths=started, axes=dict(axes), tried=tried)
    widths, step = plan.grown_widths, source.model_states(0)["global_steps"]
    happened = {growth.planned_step for growth in record.growths}
    planned = (growth.at_step for growth in block.growths if growth.widths == widths and growth.at_step not in happened)
    return record.after(widths, plan.strategy, step=step, planned_step=next(planned, None))


def _files(request: Request, contents: Contents, layout: Layout, scheduler: Any, source: Source) -> Files:
    if request.format == "universal":
        return UniversalFiles(contents, layout, scheduler)
    if request.format == "hf":
        return HuggingFaceFiles(contents, _model_config(request, source.record), stacked=experts_are_stacked(source))
    return ZeroFiles(contents, layout, scheduler, file_prefix(source))


def _model_config(request: Request, record: GrowthRecord | None) -> dict[str, Any]:
    """The model's own config at the widths in force: ``--config`` if it is one, else that beside the checkpoint."""
    growths = record.growths if record is not None else ()
    grown = {axis: width for growth in growths for axis, width in growth.widths.items()}
    started = {axis: record.initial_widths[axis] for axis in grown} if record is not None else {}
    places = [Path(request.config)] if request.config is not None else []
    for path in (*places, request.checkpoint / "config.json"):
        config = read_json(path) if path.is_file() else {"axes": None}
        if "axes" not in config:  # which a hints file has
            return widened_config(config, {**grown, **request.widths}, started)
    raise CheckpointError(
        f"format hf needs the model's config.json; there is none in {request.checkpoint}, pass --config FILE"
    )


# -- writing ----------------------------------------------------------------------------------------------------


def _fill(filler: Filler, expansion: Expansion, root: Path, team: Team) -> None:
    with understanding(expansion.source.path):
        filler.fill(_mine(expansion, root, team))


def _mine(expansion: Expansion, root: Path, team: Team) -> Iterator[tuple[Path, OutputFile]]:
    """This process's share of the files, built one by one."""
    for name in expansion.files.names()[team.rank :: team.size]:
        yield root / expansion.folder / name, expansion.files.build(name)


def _finish(expansion: Expansion, root: Path) -> None:
    """Write what isn't a tensor file, and look at the result once more before it is published."""
    if expansion.request.format == "hf":
        return
    if expansion.record is not None:
        expansion.record.write(root / expansion.tag)
    for script in _RECOVERY_SCRIPTS:
        if (expansion.request.checkpoint / script).is_file():
            with writing(root / script):
                shutil.copy2(expansion.request.checkpoint / script, root / script)
    if expansion.request.verify:
        for _ in open_checkpoint(root / expansion.tag, trust=expansion.request.trust).check():
            pass
    latest = root / ("latest_universal" if expansion.request.format == "universal" else "latest")
    with writing(latest), open(latest, "w") as file:
        file.write(expansion.tag)
        file.flush()
        os.fsync(file.fileno())


def _summary(expansion: Expansion, report: OutputSummary, team: Team, seconds: float) -> dict[str, Any]:
    reports = team.gathered(report)
    not_finite = sorted(set().union(*(each.not_finite for each in reports)))
    if not_finite and team.rank == 0:
        logger.warning("NaN or Inf in the weights of %s", ", ".join(not_finite))
    summary = expansion.to_dict()
    for before in ("plan", "bytes_to_write", "bytes_free"):
        summary.pop(before)
    return {
        **summary,
        "bytes_written": sum(each.written for each in reports),
        "bytes_verified": sum(each.verified for each in reports) if expansion.request.verify else None,
        "seconds": round(seconds, 2),
        "not_finite": not_finite,
    }


def _bar(text: str, total: int, shown: bool) -> contextlib.AbstractContextManager[Any]:
    return progress_bar(desc=text, total=total, unit="B", unit_scale=True, shown=shown)


def _free(out: Path) -> int:
    return shutil.disk_usage(out.parent).free


def _size(count: int) -> str:
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
