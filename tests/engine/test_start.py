"""What comes first on every rank: its device, then collectives and random states."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.job.command import job_parser

Pool = Callable[[int], Workers]
ROOT = Path(__file__).parents[2]


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The order of ``set_device``, reads of the device's random state, and collectives."""
    from deepspeed.accelerator import get_accelerator

    kind, events = type(get_accelerator()), []  # type: tuple[Any, list[str]]
    with pytest.MonkeyPatch.context() as patch:

        def record(owner: Any, name: str, described: Callable[..., str]) -> None:
            plain = getattr(owner, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                events.append(described(*args))
                return plain(*args, **kwargs)

            patch.setattr(owner, name, wrapped)

        record(kind, "set_device", lambda _, device: f"set_device({device})")
        record(kind, "get_rng_state", lambda *_: "get_rng_state")
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier"):
            record(torch.distributed.distributed_c10d, name, lambda *_, name=name: name)
            patch.setattr(torch.distributed, name, getattr(torch.distributed.distributed_c10d, name))
        yield events


def initializing() -> list[str]:
    with recorded() as events:
        tiny.initialize(tiny.Case(sparkling={"stages": [{"at_step": 3, "widths": {"hidden_size": 12}}]}))
    return events


def starting_the_job(output: str) -> list[str]:
    import ds_sparkling
    from ds_sparkling.job import main_job

    def enough(*_: object, **__: object) -> None:
        raise InterruptedError

    config = ROOT / "configs" / "quickstart.json"
    arguments = ["--deepspeed_config", str(config), "--data", sys.executable, "--output", output]
    with recorded() as events, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ds_sparkling, "initialize", enough)
        with pytest.raises(InterruptedError):
            main_job.run(job_parser("train.py").parse_args(arguments))
    return events


def test_a_rank_takes_its_device_before_the_first_collective(workers: Pool, tmp_path: Path) -> None:
    for answers in (workers(2).run(initializing), workers(2).run(starting_the_job, str(tmp_path))):
        for rank, events in enumerate(answers):
            assert events[0] == f"set_device({rank})"
            assert len(events) > 1
