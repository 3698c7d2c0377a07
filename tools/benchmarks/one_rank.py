"""The growth benchmark's measurements as every rank takes them; what they mean stands in ``benchmarks/regrow.py``."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

import ds_sparkling
from benchmarks.common import EXPERT_PARALLEL
from benchmarks.grown_models import GrowthCase, Sample
from benchmarks.through_files import through_files
from ds_sparkling.engine import access

_TOKENS = 32
#: Parameters of the model that everything is done with once before anything counts.
_WARM_UP = 100_000
#: More bytes per parameter after the growth than the ranks together ever hold during it.
_TOUCHED = 28

_T = TypeVar("_T")


@contextmanager
def joined(rank: int, case: GrowthCase, port: int) -> Iterator[None]:
    """This process as one of the case's ranks."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(case.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(case.threads),
    )
    torch.set_num_threads(case.threads)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.init_distributed(dist_backend="gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def samples(case: GrowthCase, scratch: Path) -> list[Sample]:
    """All repetitions of ``case``; files go to ``scratch`` and are removed again. Collective."""
    _sample(replace(case, parameters=_WARM_UP), 0, scratch)
    settle()
    baseline = resident("RssAnon")
    return [_sample(case, baseline, scratch) for _ in range(case.repeat)]


def _sample(case: GrowthCase, baseline: int, scratch: Path) -> Sample:
    _touch_memory(case)
    grown = _measure_growth(case, baseline)
    start, engine = _timed(_engine, case, case.wide)
    access.strip(engine)
    copy = _timed(torch.Tensor.clone, torch.ones(grown.held // 4))[0]  # binds no name to the copy: it must not stay
    engine = trained_engine(case)
    files, engine = _timed(
        through_files, engine, case.narrow, case.wide, lambda: _engine(case, case.wide), scratch / "files"
    )
    _check_same(grown.checksums, _checksums(engine))
    access.strip(engine)
    del engine
    settle()
    grow, start, copy, files = (
        max(seconds) for seconds in zip(*_of_all((grown.seconds, start, copy, files)), strict=True)
    )
    peak, budget = max(_of_all((grown.peak, grown.budget)), key=lambda memory: memory[0] / memory[1])
    return Sample(grow, start, copy, files, peak, budget)


# -- engines ----------------------------------------------------------------------------------------------------


def trained_engine(case: GrowthCase) -> DeepSpeedEngine:
    """The narrow engine after one step."""
    engine = _engine(case, case.narrow)
    tokens = torch.randint(0, case.model.vocab_size, (1, _TOKENS + 1))
    loss = engine(input_ids=tokens[:, :-1], labels=tokens[:, 1:])
    engine.backward(loss)
    engine.step()
    return engine


def _engine(case: GrowthCase, widths: Mapping[str, int]) -> DeepSpeedEngine:
    torch.manual_seed(0)
    config = {**_deepspeed_config(case.ranks), "sparkling": {"widths": dict(widths)}}
    return ds_sparkling.initialize(case.build, config)


def _deepspeed_config(ranks: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": ranks,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 5_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 1_000_000,
    }
    if ranks > 1:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": EXPERT_PARALLEL,
            "moe_layer_pattern": r"layers\.\d+\.mlp",
            "router_pattern": "gate",
            "expert_pattern": "experts",
            "expert_w1": "gate_up_proj",
            "expert_w2": "down_proj",
            "expert_w3": None,
            "num_experts_attr": "num_experts",
            "top_k_attr": "num_experts_per_tok",
            "score_func": "softmax",
            "score_apply": "post",
            "route_norm": False,
        }
    return config


# -- the growth -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TimedGrowth:
    """One growth on this rank: s, bytes as :class:`Sample` has them, and what it ended in.

    Attributes:
        held: bytes of fp32 weights and moments that the grown rank holds.
        checksums: of the grown state, see :func:`_checksums`.
    """

    seconds: float
    peak: int
    budget: int
    held: int
    checksums: dict[str, float]


def _measure_growth(case: GrowthCase, baseline: int) -> _TimedGrowth:
    engine = trained_engine(case)
    old_state = _held_bytes(engine)
    settle()
    not_anonymous = _reset_peak()
    seconds, engine = _timed(ds_sparkling.grow, engine, case.wide)
    peak = resident("VmHWM") - not_anonymous - baseline
    settle()
    new_engine = resident("RssAnon") - baseline
    growth = _TimedGrowth(seconds, peak, old_state + new_engine, _held_bytes(engine), _checksums(engine))
    access.strip(engine)
    return growth


def _held_bytes(engine: DeepSpeedEngine) -> int:
    """Bytes of fp32 weights and per-element optimizer state on this rank."""
    shards = access.shards(engine).values()
    return sum(part.nbytes for shard in shards for part in (shard.weight, *shard.states.values()))


def _checksums(engine: DeepSpeedEngine) -> dict[str, float]:
    """Sum of the magnitudes of all that this rank holds, for the weights and for each kind of state."""
    sums: dict[str, float] = {}
    for shard in access.shards(engine).values():
        for key, part in {"weight": shard.weight, **shard.states}.items():
            total = float(part[: shard.piece.numel].abs().sum(dtype=torch.float64))
            sums[key] = sums.get(key, 0.0) + total
    return sums


def _check_same(grown: Mapping[str, float], loaded: Mapping[str, float]) -> None:
    if grown.keys() != loaded.keys() or not all(math.isclose(grown[k], loaded[k], rel_tol=1e-6) for k in grown):
        raise RuntimeError(f"grow and save+convert+load ended in different states: {dict(grown)} and {dict(loaded)}")


# -- instruments ------------------------------------------------------------------------------------------------


def _timed(work: Callable[..., _T], *args: Any) -> tuple[float, _T]:
    """Wall time of ``work(*args)`` on this rank, all ranks beginning together; and its result."""
    dist.barrier()
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _of_all(value: _T) -> list[_T]:
    """``value`` of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _touch_memory(case: GrowthCase) -> None:
    """Write to as much memory as the case will need and free it: a virtual machine's host may be slow to back it."""
    torch.ones(case.parameters_after * _TOUCHED // case.ranks, dtype=torch.uint8)
    dist.barrier()


def settle() -> None:
    """Collect garbage and give free heap back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
    """A figure of this process's memory in bytes, by its name in ``/proc/self/status``.

    Raises:
        RuntimeError: if the system doesn't tell.
    """
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: this kernel doesn't tell what the benchmark measures")
    return int(match.group(1)) * 1024


def _reset_peak() -> int:
    """Reset ``VmHWM``; returns the resident bytes that aren't anonymous, which it counts too."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("RssFile") + resident("RssShmem")
