"""The planned bytes are those of real engines: what they hold, and what a growth moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tiny
from distributed import Workers
from ds_sparkling.planner.memory import Setting, traffic, training
from ds_sparkling.planner.model import Model, probe_model

WIDE = {"hidden_size": 12, "moe_intermediate_size": 10}
CASES = [
    tiny.Case(ranks=2, stage=0),
    tiny.Case(ranks=2, stage=1, ep=2),
    tiny.Case(ranks=2, stage=1, bf16=True, top={"data_types": {"grad_accum_dtype": "fp32"}}),
    tiny.Case(ranks=2, stage=2, bf16=True),
    tiny.Case(ranks=2, stage=2, frozen=True),
    tiny.Case(ranks=2, stage=3, ep=2),
    tiny.Case(ranks=2, stage=3, bf16=True, frozen=True),
    tiny.Case(ranks=2, stage=3, bf16=True, ep=1),
    tiny.Case(ranks=2, stage=2, zero={"offload_optimizer": {"device": "cpu"}}),
    tiny.Case(ranks=2, stage=3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    tiny.Case(ranks=4, stage=3, ep=2),
]


def setting(case: tiny.Case) -> Setting:
    mixed = bool(case.top)
    size = 2 if case.bf16 else 4
    return Setting(
        ranks=case.ranks,
        stage=case.stage,
        expert_parallel=max(case.ep, 1),
        weight_bytes=size,
        gradient_bytes=4 if mixed else size,
        states=2,
        offload_optimizer="offload_optimizer" in case.zero,
        offload_weights="offload_param" in case.zero,
    )


def probed(case: tiny.Case) -> Model:
    return probe_model(case.build_model, WIDE, None, WIDE)


def weight_bytes(engine: Any) -> int:
    """Compute weights that last, without the small ones that stage 3 also keeps whole."""
    params = engine.module.parameters()
    return sum(getattr(param, "ds_tensor", param).nbytes for param in params)


def master_bytes(engine: Any) -> tuple[int, int]:
    """Masters that aren't the compute weights themselves, and per-element state on this rank."""
    from ds_sparkling.engine import access

    held = [shard for shard in access.shards(engine).values() if shard.master is not None]
    computing = {
        getattr(param, "ds_tensor", param).untyped_storage().data_ptr() for param in engine.module.parameters()
    }
    return (
        sum(shard.weight.nbytes for shard in held if shard.weight.untyped_storage().data_ptr() not in computing),
        sum(part.nbytes for shard in held for part in shard.states.values()),
    )


def measure(case: tiny.Case) -> dict[str, Any]:
    """Bytes of weights, masters and state before and after a growth, and bytes that it moved to this rank."""
    import ds_sparkling
    from benchmarks.collectives import recorded

    engine = tiny.initialize(case)
    tiny.train(engine, 1)
    before = (weight_bytes(engine), *master_bytes(engine))
    with recorded() as collectives:
        engine = ds_sparkling.grow(engine, WIDE)
    received = sum(each.received for each in collectives if each.name == "all_to_all_single")
    return {"before": before, "received": received, "after": (weight_bytes(engine), *master_bytes(engine))}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_engine_holds_what_is_planned_and_a_growth_moves_no_more(
    case: tiny.Case, workers: Callable[[int], Workers]
) -> None:
    model, how = probed(case), setting(case)
    narrow, wide = (model.tensors(widths, how.expert_parallel) for widths in (model.widths, WIDE))
    answers = workers(case.ranks).run(measure, case)
    padding = len(narrow) * 4 * case.ranks * 4  # elements that a rank may hold less than one with full pieces
    for when, tensors in (("before", narrow), ("after", wide)):
        planned = training(tensors, how)
        weights, masters, state = max(answer[when] for answer in answers)
        assert weights == pytest.approx(planned.device.weights + planned.host.weights, abs=padding)
        assert masters == pytest.approx(planned.device.masters + planned.host.masters, abs=padding)
        assert state == pytest.approx(planned.device.state + planned.host.state, abs=padding)
    received = max(answer["received"] for answer in answers)
    moved = traffic(narrow, wide, 0, how, checkpoint=False).moved
    assert bool(moved) == bool(received)
    assert received <= moved  # most of what a rank needs it has itself where all widths double
