"""Native DeepSpeed MoE layers: every rank numbers its experts from 0, a growth goes by the whole model's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from distributed import Workers
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.monitoring.spectrum import effective_rank
from ds_sparkling.spec.strategy import Init, OptimizerState, Strategy

Pool = Callable[[int], Workers]

VOCABULARY, EXPERTS, TOP_K = 13, 4, 2
HIDDEN, INNER = 6, 5
RANDOM = Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM, seed=3)
COPIES = Strategy(perturbation=0.5, seed=5, optimizer_state=OptimizerState.COPY)


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(x_TH)))
        return out


class Mixture(nn.Module):
    """A language model whose only layer is DeepSpeed's ``MoE``; each expert's weights follow from its own number."""

    def __init__(self, hidden: int, inner: int, ep: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.norm = nn.RMSNorm(hidden)
        self.moe = MoE(
            hidden,
            Expert(hidden, inner),
            num_experts=EXPERTS,
            ep_size=ep,
            k=TOP_K,
            capacity_factor=4.0,
            eval_capacity_factor=4.0,
            top2_2nd_expert_sampling=False,
            use_rts=False,
        )
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        local = self.moe.deepspeed_moe.experts.deepspeed_experts
        first = torch.distributed.get_rank() % ep * len(local)
        for number, expert in enumerate(local):
            generator = torch.Generator().manual_seed(100 + first + number)
            for param in expert.parameters():
                if param.device.type != "meta":
                    with torch.no_grad():
                        param.copy_(torch.randn(param.shape, generator=generator) * 0.3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden_BTH = self.embed(input_ids)
        mixed_BTH, balance, _ = self.moe(self.norm(hidden_BTH))
        logits: Tensor = self.head(hidden_BTH + mixed_BTH)
        if labels is None:
            return logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return loss + 0.01 * balance if self.training else loss


@dataclass(frozen=True)
class Native:
    """One way to run :class:`Mixture`."""

    ep: int
    stage: int
    check: bool = True

    def initialize(self, strategy: Strategy) -> Any:
        import ds_sparkling

        def build_model(hidden_size: int = HIDDEN, inner: int = INNER) -> nn.Module:
            torch.manual_seed(7)
            return Mixture(hidden_size, inner, self.ep)

        stages = [{"at_step": 10**6, "widths": {"hidden_size": 2 * HIDDEN, "inner": 2 * INNER}}]
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 100000},
            "steps_per_print": 10**9,
            "sparkling": {"check": self.check, "stages": stages, "checkpoint_before_growth": False},
        }
        engine = ds_sparkling.initialize(build_model, config)
        tiny.with_strategy(engine, strategy)
        return engine


def weights(engine: Any) -> tuple[tiny.State, dict[str, tuple[int, int]]]:
    """Before the first step there is nothing else."""
    from ds_sparkling.engine import access
    from ds_sparkling.engine.logical_names import held_parameters
    from ds_sparkling.monitoring.sampling import Grid

    held = held_parameters(engine)
    cpu = torch.device("cpu")
    found = {}
    for name, shard in access.shards(engine).items():
        whole = Grid(shard.shape, shard.shape)
        found[held[name].name] = {"weight": shard.sampled(shard.held(shard.weight, whole), whole, cpu).clone()}
    return found, {}


def train(engine: Any, steps: int) -> None:
    while engine.global_steps < steps:
        seed = 100 * engine.global_steps + torch.distributed.get_rank()
        tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()


def grown_untrained(case: Native) -> dict[str, Any]:
    import ds_sparkling

    engine = case.initialize(RANDOM)
    before, counts = weights(engine), engine.sparkling.parameters
    engine = ds_sparkling.grow(engine, {"hidden_size": 2 * HIDDEN, "inner": 2 * INNER})
    plan = engine.sparkling.plan
    return {"before": before, "after": weights(engine), "plan": plan, "counts": (counts, engine.sparkling.parameters)}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_new_units_do_not_depend_on_how_experts_are_spread(stage: int, workers: Pool) -> None:
    found = {}
    for ep in (1, 2):
        answers = workers(2).run(grown_untrained, Native(ep, stage))
        assert all(answer["plan"] == answers[0]["plan"] for answer in answers)
        joined = {when: tiny.join([answer[when] for answer in answers]) for when in ("before", "after")}
        found[ep] = joined["before"], joined["after"], answers[0]["plan"], answers[0]["counts"]
    one, two = found[1], found[2]
    assert one[2:] == two[2:]
    plan = one[2]
    for state, other in zip(one[:2], two[:2], strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name]["weight"], other[name]["weight"]) for name in state)
    wanted = tiny.reference(plan, one[0])
    assert all(torch.equal(one[1][name]["weight"], wanted[name]["weight"]) for name in wanted)
    rows = [one[1][f"moe.deepspeed_moe.experts.deepspeed_experts.{n}.up_proj.weight"]["weight"] for n in range(EXPERTS)]
    assert all(not torch.equal(rows[0][INNER:], other[INNER:]) for other in rows[1:])


def test_counts_are_those_of_the_whole_model_and_of_the_experts_that_a_token_uses(workers: Pool) -> None:
    ((before, after),) = {answer["counts"] for answer in workers(2).run(grown_untrained, Native(2, 1))}
    for (total, active), hidden, inner in ((before, HIDDEN, INNER), (after, 2 * HIDDEN, 2 * INNER)):
        others = 2 * VOCABULARY * hidden + hidden + EXPERTS * hidden
        assert total == others + EXPERTS * 2 * hidden * inner
        assert active == others + TOP_K * 2 * hidden * inner


def trained(case: Native) -> dict[str, Any]:
    """A growth in the middle of training, and what a diagnosis says of the grown engine after another step."""
    import ds_sparkling
    from ds_sparkling.engine.watch.effective_rank import RankProbe
    from ds_sparkling.engine.watch.twins import TwinProbe

    engine = case.initialize(COPIES)
    train(engine, 2)
    found: dict[str, Any] = {"before": tiny.local_state(engine)}
    engine = ds_sparkling.grow(engine, {"hidden_size": 2 * HIDDEN, "inner": 2 * INNER})
    found |= {"after": tiny.local_state(engine), "plan": engine.sparkling.plan}
    train(engine, 3)
    twins, _ = TwinProbe(engine).measure()
    assert twins is not None
    found |= {"state": tiny.local_state(engine), "ranks": RankProbe(engine).measure(), "twins": twins.by_parameter}
    return found


@pytest.mark.parametrize("case", [Native(2, 0), Native(2, 2, check=False), Native(1, 1)], ids=str)
def test_state_and_diagnosis_are_those_of_one_process(case: Native, workers: Pool) -> None:
    answers = workers(2).run(trained, case)
    plan = answers[0]["plan"]
    before, after, last = (tiny.join([answer[when] for answer in answers]) for when in ("before", "after", "state"))
    wanted = tiny.reference(plan, before)
    assert wanted.keys() == after.keys()
    for name, tensors in wanted.items():
        assert all(torch.equal(after[name][key], tensor) for key, tensor in tensors.items()), name
    assert answers[0]["ranks"] == answers[1]["ranks"]
    for name, rank in answers[0]["ranks"].items():
        assert math.isclose(rank, effective_rank(last[name]["weight"]), rel_tol=1e-9), name
    assert answers[0]["twins"] == answers[1]["twins"]
    experts = {name for name in answers[0]["twins"] if "deepspeed_experts" in name}
    assert {name.split(".")[4] for name in experts} == {str(number) for number in range(EXPERTS)}
    for name, cosine in answers[0]["twins"].items():
        weight = last[name]["weight"].double()
        assert math.isclose(cosine, _twin_cosine(weight, plan, name), rel_tol=1e-6), name


def _twin_cosine(weight: Tensor, plan: GrowthPlan, name: str) -> float:
    """Mean cosine of all copied units with their sources, which lie as far apart as the dimension was long."""
    from ds_sparkling.monitoring.twin_distance import twin_cosine

    before, after = {"hidden_size": HIDDEN, "inner": INNER}, {"hidden_size": 2 * HIDDEN, "inner": 2 * INNER}
    axes = plan.param(name).axes
    return float(torch.cat([twin_cosine(weight, axes, axis, before, after) for axis in sorted(after)]).mean())
