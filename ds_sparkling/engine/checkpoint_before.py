"""The checkpoint that is written before a growth, to go on from if the growth fails or was a mistake."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
from ds_sparkling.engine.growing_run import GrowingRun

logger = logging.getLogger(__name__)


def save_before(
    engine: DeepSpeedEngine, run: GrowingRun, number: int, client_state: Mapping[str, Any] | None
) -> Path | None:
    """Write the checkpoint before growth ``number`` of ``run``, if one is wanted, and say where. Collective.

    A run that puts a state of its own into checkpoints, but passes none for the growth, gets its last one into this
    checkpoint. It isn't the latest one then, unless that state is of this very step: what the script did since would
    be lost on a resume, without a word.
    """
    directory, known, step = run.checkpoint_dir, run.client, engine.global_steps
    if directory is None:
        return None
    if client_state is not None:
        known.see(client_state, step)
    contents = known.contents if client_state is None else client_state
    all_ranks = FailTogether("saving before the growth")
    current = of_first_rank(contents is not known.contents or not contents or known.step == step, all_ranks)
    checkpoint = Path(directory) / f"global_step{step}-before-growth{number}"
    engine.save_checkpoint(directory, tag=checkpoint.name, client_state=contents, save_latest=current)
    if not current and engine.global_rank == 0:
        logger.warning(
            "%s has the client_state of step %d, and isn't the latest checkpoint therefore; pass client_state= to "
            "grow_if_due or grow for one to resume from",
            checkpoint,
            known.step,
        )
    return checkpoint
