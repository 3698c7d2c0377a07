"""Growing offline gives the files that growing online and saving right away gives, on every topology."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.spec.strategy import (
    INIT_PAIRS,
    BiasCorrection,
    Init,
    OptimizerState,
    Rewarmup,
    RewarmupCurve,
    Scaling,
    Scope,
    Split,
    Strategy,
)
from pairwise import shares
from tiny import Case

INNER, HIDDEN = "moe_intermediate_size", "hidden_size"

#: Growths one after the other: every init pair, scaling, treatment of states and re-warm-up, at all kinds of ratios.
GROWTHS = (
    ({INNER: 10}, Strategy(fan_out=INIT_PAIRS[0][0], fan_in=INIT_PAIRS[0][1], split=Split.parse("random"))),
    (
        {HIDDEN: 12},
        Strategy(
            fan_out=INIT_PAIRS[0][0],
            fan_in=INIT_PAIRS[0][1],
            optimizer_state=OptimizerState.COPY_SCALED,
            rewarmup=Rewarmup(steps=5),
            perturbation=0.2,
        ),
    ),
    (
        {HIDDEN: 19, INNER: 21},
        Strategy(
            fan_out=INIT_PAIRS[1][0],
            fan_in=INIT_PAIRS[1][1],
            norm=Init.RANDOM,
            optimizer_state=OptimizerState.ASYMMETRIC_RESET_SCALED,
            bias_correction=BiasCorrection.INHERIT,
            seed=3,
        ),
    ),
    (
        {INNER: 42},
        Strategy(
            fan_out=INIT_PAIRS[2][0],
            fan_in=INIT_PAIRS[2][1],
            scaling=Scaling.NONE,
            optimizer_state=OptimizerState.DROP,
            seed=4,
        ),
    ),
    (
        {HIDDEN: 29, INNER: 51},
        Strategy(
            fan_out=INIT_PAIRS[3][0],
            fan_in=INIT_PAIRS[3][1],
            rewarmup=Rewarmup(ratio=1.5, steps=3, scope=Scope.ALL, curve=RewarmupCurve.FACTOR),
            seed=5,
        ),
    ),
    (
        {HIDDEN: 31},
        Strategy(
            fan_out=INIT_PAIRS[4][0],
            fan_in=INIT_PAIRS[4][1],
            scaling=Scaling.FUNCTION,
            optimizer_state=OptimizerState.COPY,
            rewarmup=Rewarmup(scope=Scope.NONE),
            seed=6,
        ),
    ),
    ({INNER: 60}, Strategy(fan_out=INIT_PAIRS[5][0], fan_in=INIT_PAIRS[5][1], scaling=Scaling.FUNCTION, seed=7)),
)


def cases() -> list[Case]:
    small = {"sub_group_size": 200, "stage3_param_persistence_threshold": 20}
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    fp32_gradients = {"data_types": {"grad_accum_dtype": "fp32"}}
    return [
        Case(1, 3),
        Case(3, 3, zero=small, groups=True),
        Case(2, 3, 2, zero=small, frozen=True, groups=True),
        Case(4, 3, 2),
        Case(2, 3, 1, tied=False),
        Case(2, 3, 2, bf16=True, groups=True),
        Case(2, 3, bf16=True, zero=offload),
        Case(3, 2, frozen=True, groups=True),
        Case(2, 2, 2, bf16=True, frozen=True, tied=False),
        Case(2, 2, bf16=True, zero={"offload_optimizer": {"device": "cpu"}, "parameter_alignment": True}),
        Case(4, 1, 2, groups=True),
        Case(2, 1, bf16=True, top=fp32_gradients),
    ]


def chain(case: Case, numbers: tuple[int, ...], directory: str) -> None:
    """Train, save, grow, save, train ... by the growths of these numbers."""
    import ds_sparkling

    engine = tiny.initialize(case)
    for number in numbers:
        widths, strategy = GROWTHS[number]
        tiny.train(engine, engine.global_steps + 1)
        tiny.with_strategy(engine, strategy)
        engine.save_checkpoint(directory, tag=f"before{number}", client_state={"epoch": number})
        engine = ds_sparkling.grow(engine, widths)
        engine.save_checkpoint(directory, tag=f"after{number}", client_state={"epoch": number})


@pytest.mark.parametrize(("case", "numbers"), shares(cases(), len(GROWTHS), tiny.kind), ids=str)
def test_offline_equals_online(
    case: Case, numbers: tuple[int, ...], workers: Callable[[int], Workers], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    workers(case.ranks).run(chain, case, numbers, str(saved))
    known: set[str] = set()
    for number in numbers:
        widths, strategy = GROWTHS[number]
        options: dict[str, Any] = {
            "tag": f"before{number}",
            "deepspeed_config": checkpoint_files.block_of(strategy, tmp_path / "ds.json"),
        }
        if not widths.keys() <= known:  # the record doesn't know an axis before it has been planned to grow
            options["config"] = f"olmoe_factory:build_{'tied' if case.tied else 'untied'}"
            known |= widths.keys()
        checkpoint_files.run(saved, tmp_path / f"{number}", widths, **options)
        checkpoint_files.same_files(saved / f"after{number}", tmp_path / f"{number}/before{number}")


@pytest.mark.parametrize(
    ("ranks", "expert_parallel"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (5, 1), (6, 6)]
)
@pytest.mark.parametrize("case", [Case(2, 3, 2), Case(2, 2, 2, bf16=True)], ids=str)
def test_any_topology_holds_the_same_tensors(
    case: Case, ranks: int, expert_parallel: int, saved_once: Callable[[Case], Path], tmp_path: Path
) -> None:
    saved = saved_once(case)
    block = checkpoint_files.block_of(GROWTHS[2][1], tmp_path / "ds.json")
    topology = {"world_size": ranks, "expert_parallel": expert_parallel}
    grown = tmp_path / "grown"
    checkpoint_files.run(saved, grown, GROWTHS[2][0], tag="before2", deepspeed_config=block, **topology)
    source = open_checkpoint(grown / "before2")
    assert (source.layout.settings.ranks, source.layout.settings.expert_parallel) == (ranks, expert_parallel)
    assert list(source.check())
    checkpoint_files.same_tensors(saved / "after2", grown / "before2")
    checkpoint_files.run(grown, tmp_path / "back", world_size=2, expert_parallel=2)
    checkpoint_files.same_files(saved / "after2", tmp_path / "back/before2")


@pytest.fixture(scope="module")
def saved_once(workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    made: dict[str, Path] = {}

    def saved(case: Case) -> Path:
        if str(case) not in made:
            made[str(case)] = tmp_path_factory.mktemp("saved")
            workers(case.ranks).run(chain, case, (0, 1, 2), str(made[str(case)]))
        return made[str(case)]

    return saved
