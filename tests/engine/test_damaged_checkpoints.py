"""A file that is cut off, empty or missing on one rank: the same error on all ranks, which then train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from distributed import Workers

Pool = Callable[[int], Workers]
#: Files of the second of two ranks, by ZeRO stage.
FILES = {
    3: ("zero_pp_rank_1_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    1: ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
}


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    else:
        contents = file.read_bytes()
        file.write_bytes(contents[: {"cut off": len(contents) // 2, "cut short": 1, "empty": 0}[how]])


def loading(directory: str, case: tiny.Case, name: str, how: str) -> tuple[str, str, list[float], list[float]]:
    """What loading a damaged checkpoint raises, losses after it, and after loading the whole one."""
    import torch

    from ds_sparkling.errors import CheckpointError

    engine = tiny.initialize(case)
    tiny.train(engine, 2)
    engine.save_checkpoint(directory, "whole")
    engine.save_checkpoint(directory, "damaged")
    if torch.distributed.get_rank() == 0:
        damage(Path(directory) / "damaged" / name, how)
    torch.distributed.barrier()
    kind = text = "nothing"
    try:
        engine.load_checkpoint(directory, "damaged")
    except CheckpointError as error:
        kind, text = type(error).__name__, str(error)
    losses = tiny.train(engine, 4)
    again = tiny.initialize(case)
    again.load_checkpoint(directory, "whole")
    return kind, text, losses, tiny.train(again, 4)


@pytest.mark.parametrize(
    ("stage", "file", "how"),
    [(3, 0, "cut off"), (3, 1, "missing"), (3, 0, "missing"), (3, 1, "cut short"), (1, 1, "empty"), (1, 0, "cut off")],
)
def test_a_damaged_file_is_named_on_all_ranks_which_train_on(
    stage: int, file: int, how: str, workers: Pool, tmp_path: Path
) -> None:
    case = tiny.Case(stage=stage)
    answers = workers(2).run(loading, str(tmp_path), case, FILES[stage][file], how)
    assert len({text for _, text, *_ in answers}) == 1
    for kind, text, losses, again in answers:
        assert kind == "CheckpointError"
        assert f"damaged/{FILES[stage][file]} is {'missing' if how == 'missing' else 'cut off'}" in text
        assert len(losses) == 2
        assert losses == again
