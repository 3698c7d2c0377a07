"""The engine's step after growths: every element with the rate and age of its own birth, on every topology."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from distributed import Workers
from optimizers import CountingSGD
from tiny import Case
from ulp import ulps

Pool = Callable[[int], Workers]

STAGES = [
    {"at_step": 3, "widths": {"moe_intermediate_size": 8}},
    {"at_step": 5, "widths": {"hidden_size": 9, "moe_intermediate_size": 10}},
]
GROWING = {"stages": STAGES, "rewarmup": {"ratio": 1.5, "steps": 3}, "checkpoint_before_growth": False}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 1e-2, "weight_decay": 0.1, **params}}}


ADAMW = {"betas": [0.9, 0.95], "torch_adam": True}
CASES = [
    Case(2, 3, 2, zero={"sub_group_size": 500}),
    Case(3, 3, groups=True, top=optimizer("AdamW", fused=True, **ADAMW)),
    Case(4, 3, 4, bf16=True, top=optimizer("AdamW", fused=True, **ADAMW)),
    Case(2, 2, 2, groups=True, accumulation=2),
    Case(3, 1, bf16=True, frozen=True, top=optimizer("AdamW", fused=True, **ADAMW)),
    Case(1, 2, zero={"round_robin_gradients": True}, tied=False),
    Case(2, 0, groups=True, top=optimizer("AdamW", foreach=True, **ADAMW)),
    Case(1, 0, bf16=True),
]


def padded(tensor: Tensor) -> Tensor:
    """A copy of a multiple of 64 elements: torch's fused step rounds otherwise what its vectors leave over."""
    return torch.cat([tensor, torch.zeros(-tensor.numel() % 64)])


def birth_by_index(axes: Any, shape: tuple[int, ...], history: dict[str, tuple[int, ...]]) -> Tensor:
    """Birth of every element, by looking at the units of its indices."""
    births = torch.zeros(shape, dtype=torch.int64)
    for position, (dim, size) in enumerate(zip(axes.dims, shape, strict=True)):
        if dim.axis is None:
            continue
        ages = []
        for index in range(size):
            unit = index % (size // dim.segments) // dim.block
            ages.append(next(stage for stage, width in enumerate(history[dim.axis]) if unit < width))
        births = torch.maximum(births, torch.tensor(ages).view(-1, *[1] * (len(shape) - position - 1)))
    return births


def grown(case: Case) -> Any:
    """An engine two steps after its second growth, its stages of three different ages."""
    import ds_sparkling

    engine = tiny.initialize(replace(case, sparkling={**GROWING, **case.sparkling}))
    while engine.global_steps < 7:
        engine = ds_sparkling.grow_if_due(engine)
        tiny.train(engine, engine.global_steps + 1)
    assert [birth.age for birth in engine.lr_scheduler.births] == [4, 2]
    return engine


class Recorder:
    """What goes into the base optimizer's step and what comes out, tensor by tensor."""

    def __init__(self, engine: Any) -> None:
        from ds_sparkling.engine.optimizers import adapter_of

        self.base = adapter_of(engine).base
        self.before: dict[Tensor, tuple[dict[str, Any], Tensor, Tensor, dict[str, Any]]] = {}
        step = self.base.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            for group in self.base.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        state = {
                            key: value.clone() if isinstance(value, Tensor) else value
                            for key, value in self.base.state[param].items()
                        }
                        self.before[param] = (dict(group), param.detach().clone(), param.grad.clone(), state)
            return step(*args, **kwargs)

        self.base.step = recorded  # type: ignore[method-assign]


@dataclass(frozen=True)
class Elements:
    """One shard's elements of one birth around an optimizer step.

    Attributes:
        name: the parameter's.
        stage: the birth.
        rate, age: what it is to get; no age means the tensor's own step count.
        group: the parameter group's settings.
        before: ``weight``, ``grad`` and per-element state.
        step: the tensor's step count before, if it has one.
        after: ``weight`` and per-element state.
    """

    name: str
    stage: int
    rate: float
    age: int | None
    group: dict[str, Any]
    before: dict[str, Tensor]
    step: Any
    after: dict[str, Tensor]


def take_a_step(engine: Any) -> tuple[Recorder, list[Elements]]:
    """Train one step further; every trained element on this rank, by shard and birth."""
    from ds_sparkling.engine import access
    from ds_sparkling.engine.logical_names import engine_axes

    recorder = Recorder(engine)
    groups = access.master_groups(engine)
    rates = [engine.lr_scheduler.rates(group) for group in range(len(recorder.base.param_groups))]
    ages = [None, *(birth.age for birth in engine.lr_scheduler.births)]
    tiny.train(engine, engine.global_steps + 1)
    record = engine.sparkling.record
    axes = engine_axes(engine, record.axes)
    found = []
    for shard in access.shards(engine).values():
        if shard.master is None:
            continue
        group, param, grad, state = recorder.before[shard.master]
        inside = slice(shard.offset, shard.offset + shard.piece.numel)
        births = birth_by_index(axes[shard.name], shard.shape, record.width_history).flatten()
        births = births[shard.piece.start : shard.piece.stop]
        whole = {"weight": param, "grad": grad, **{key: state[key] for key in shard.states}}
        after = {"weight": shard.weight, **shard.states}
        for stage, (rate, age) in enumerate(zip(rates[groups[shard.master]], ages, strict=True)):
            chosen = births == stage
            found.append(
                Elements(
                    shard.name,
                    stage,
                    rate,
                    age,
                    group,
                    {key: tensor.view(-1)[inside][chosen] for key, tensor in whole.items()},
                    state.get("step"),
                    {key: tensor[: shard.piece.numel][chosen] for key, tensor in after.items()},
                )
            )
    return recorder, found


def step_errors(case: Case) -> tuple[int, list[int], list[list[float]]]:
    """Largest distance in ulp from one parameter per birth, elements per stage, and rates by group."""
    engine = grown(case)
    rates = [engine.lr_scheduler.rates(group) for group in range(len(engine.get_lr()))]
    worst, counts = 0, [0, 0, 0]
    for elements in take_a_step(engine)[1]:
        own = padded(elements.before["weight"])
        own.grad = padded(elements.before["grad"])
        settings = {key: elements.group[key] for key in ("betas", "eps", "weight_decay", "fused")}
        reference = torch.optim.AdamW([own], lr=elements.rate, **settings)
        moments = {key: padded(elements.before[key]) for key in ("exp_avg", "exp_avg_sq")}
        step = elements.step.clone() if elements.age is None else torch.tensor(float(elements.age))
        reference.state[own] = {"step": step, **moments}
        reference.step()
        for key, value in {"weight": own, **moments}.items():
            worst = max(worst, ulps(elements.after[key], value[: elements.after[key].numel()]))
        counts[elements.stage] += elements.after["weight"].numel()
    return worst, counts, rates


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_gets_its_own_rate_and_age(case: Case, workers: Pool) -> None:
    answers = workers(case.ranks).run(step_errors, case)
    assert max(worst for worst, _, _ in answers) <= 2
    assert all(sum(counts[stage] for _, counts, _ in answers) for stage in range(3))  # every stage was looked at
    for _, _, rates in answers:
        assert len({round(rate, 15) for rate in rates[0]}) == 3
        for group in rates[1:]:  # groups keep their own base rates, times the same re-warm-up
            assert [rate / group[0] for rate in group] == pytest.approx([rate / rates[0][0] for rate in rates[0]])
        if case.groups:
            assert rates[2][0] == pytest.approx(0.1 * rates[0][0])


def cpu_adam_errors(case: Case) -> tuple[str, float]:
    """The base optimizer's class, and the largest difference to AdamW's formula, in learning rates."""
    recorder, found = take_a_step(grown(case))
    worst = 0.0
    for elements in found:
        p, g, m, v = (elements.before[key].double() for key in ("weight", "grad", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = elements.group["betas"]
        t = (elements.step if elements.age is None else elements.age) + 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + elements.group["eps"])
        expected = p - elements.rate * (elements.group["weight_decay"] * p + update)
        if p.numel():
            worst = max(worst, float((elements.after["weight"].double() - expected).abs().max()) / elements.rate)
    return type(recorder.base).__name__, worst


def test_an_offloaded_optimizer_tells_elements_apart_too(workers: Pool) -> None:
    case = Case(2, 3, 2, zero={"offload_optimizer": {"device": "cpu"}}, top=optimizer("AdamW", betas=[0.9, 0.95]))
    for kind, worst in workers(2).run(cpu_adam_errors, case):
        assert kind == "DeepSpeedCPUAdam"
        assert worst < 1e-4


def adapted_rates(case: Case) -> list[tuple[str, int, float, float, float, float]]:
    """By parameter and birth, summed up: squares of weights, update over rate, how far rounding moves that, and
    the gradient.
    """
    found = []
    for elements in take_a_step(grown(case))[1]:
        weight, grad = elements.before["weight"].double(), elements.before["grad"].double()
        update = (elements.after["weight"].double() - weight).abs().sum() / elements.rate
        rounding = 2.0**-23 * weight.abs().sum() / elements.rate
        square, change = float(weight.square().sum()), float(grad.abs().sum())
        found.append((elements.name, elements.stage, square, float(update), float(rounding), change))
    return found


@pytest.mark.parametrize(
    "case", [Case(2, 3, 2, zero={"sub_group_size": 500}), Case(3, 2, tied=False), Case(2, 0, 2)], ids=str
)
def test_a_rate_follows_the_weight_norms_of_its_parameter(case: Case, workers: Pool) -> None:
    """With plain SGD, whose update is the rate times the gradient; whichever ranks hold the parameter."""
    rewarmup = {"curve": "weight_norm", "ratio": 1.0, "steps": 0}
    top = {"optimizer": {"type": "SGD", "params": {"lr": 0.3}}, "zero_allow_untested_optimizer": True}
    case = replace(case, top=top, sparkling={"rewarmup": rewarmup, "init": {"split": "1:2"}})
    squares: dict[tuple[str, int], float] = defaultdict(float)
    answers = [found for rank in workers(case.ranks).run(adapted_rates, case) for found in rank]
    for name, stage, square, *_ in answers:
        squares[name, stage] += square
    looked_at = set()
    for name, stage, _, update, rounding, grad in answers:
        if grad > 0:
            ratio = math.sqrt(squares[name, stage] / squares[name, 0])
            assert update == pytest.approx(ratio * grad, rel=1e-4, abs=rounding), (name, stage)
            looked_at.add((stage, round(ratio, 2)))
    assert len(looked_at) > 5


def muon_case(stage: int, *, ranks: int = 2, ep: int = 0, weight_decay: float = 0.0, **sparkling: Any) -> Case:
    params = {"lr": 1e-2, "momentum": 0.9, **({"weight_decay": weight_decay} if weight_decay else {})}
    top = {"optimizer": {"type": "Muon", "params": params}, "zero_allow_untested_optimizer": True}
    return Case(ranks, stage, ep, zero={"reduce_scatter": False} if stage > 1 else {}, top=top, sparkling=sparkling)


def muon_error(case: Case) -> tuple[int, int]:
    """Largest distance from the orthogonalised update at each stage's rate, and how many elements took part."""
    worst, count = 0, 0
    for elements in take_a_step(grown(case))[1]:
        if elements.group["use_muon"]:
            own = elements.before["weight"].clone()
            own.mul_(1 - elements.rate * elements.group["weight_decay"])
            own.add_(elements.before["grad"], alpha=-elements.rate)
            worst = max(worst, ulps(elements.after["weight"], own))
            count += own.numel()
    return worst, count


@pytest.mark.parametrize(("stage", "ep"), [(1, 0), (2, 0), (3, 2)])
def test_muon_scales_its_update_per_element(stage: int, ep: int, workers: Pool) -> None:
    for worst, count in workers(2).run(muon_error, muon_case(stage, ep=ep, weight_decay=0.1)):
        assert worst <= 2
        assert count > 100


# -- skipped steps, other schedulers, refusals -------------------------------------------------------------------


def fused_adam_matches_torch(top: dict[str, Any], bf16: bool) -> tuple[list[float], list[int]]:
    """Losses after a growth without ZeRO, where DeepSpeed's FusedAdam counts steps in one tensor of a group."""
    engine = grown(Case(1, 0, bf16=bf16, top=top))
    losses = tiny.train(engine, 11)
    from ds_sparkling.engine.optimizers import adapter_of

    steps = [int(state["step"]) for state in adapter_of(engine).base.state.values() if "step" in state]
    return losses, steps


@pytest.mark.parametrize("bf16", [False, True])
def test_fused_adam_without_zero_steps_like_torchs(bf16: bool, workers: Pool) -> None:
    fused = optimizer("AdamW", betas=[0.9, 0.95])
    ((losses, steps),) = workers(1).run(fused_adam_matches_torch, fused, bf16)
    ((expected, _),) = workers(1).run(fused_adam_matches_torch, optimizer("AdamW", **ADAMW), bf16)
    assert max(steps) == (12 if bf16 else 11)  # DeepSpeed's bf16 wrapper takes a step on zeros at the start
    assert losses == pytest.approx(expected, rel=2e-2 if bf16 else 1e-5)


def muon_momentum(
    stage: int, ranks: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Whole momenta before a growth, after it and as one process grows them; losses from there on."""
    import ds_sparkling
    from ds_sparkling.engine import access
    from ds_sparkling.growth import Widener

    def momenta(engine: Any) -> dict[str, Tensor]:
        whole = {}
        for name, shard in access.shards(engine).items():
            for key, held in shard.wholes.items():
                whole[name] = shard.whole(key, engine.device).clone()
                assert torch.equal(held, whole[name] if shard.piece.numel else held[:0]), name
        return whole

    case = muon_case(stage, ranks=ranks)
    engine = tiny.initialize(case)
    uninterrupted = tiny.train(engine, 5)
    engine = tiny.initialize(case)
    losses = tiny.train(engine, 3)
    before = momenta(engine)
    rebuilt = ds_sparkling.rebuild(engine)
    same = momenta(rebuilt)
    assert before.keys() == same.keys()
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert losses + tiny.train(rebuilt, 5) == pytest.approx(uninterrupted, rel=1e-6)
    before = momenta(rebuilt)
    engine = ds_sparkling.grow(rebuilt, {"hidden_size": 9, "moe_intermediate_size": 8})
    after = momenta(engine)
    expected = {}
    for name, old in before.items():
        widener = Widener(engine.sparkling.plan, name)
        expected[name] = torch.empty(math.prod(widener.after), dtype=old.dtype)
        widener.state("momentum_buffer", old, expected[name])
    return before, after, expected, tiny.train(engine, 8)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_muons_momentum_grows_where_ranks_hold_whole_matrices(stage: int, ranks: int, workers: Pool) -> None:
    for before, after, expected, losses in workers(ranks).run(muon_momentum, stage, ranks):
        assert before
        assert any(momentum.any() for momentum in before.values())
        assert after.keys() == expected.keys()
        assert all(torch.equal(after[name], momentum) for name, momentum in expected.items())
        assert all(math.isfinite(loss) for loss in losses)


def muon_resumed(stage: int, directory: str) -> tuple[list[float], list[float]]:
    import ds_sparkling

    case = muon_case(stage, rewarmup={"ratio": 1.5, "steps": 4})
    engine = tiny.initialize(case)
    tiny.train(engine, 3)
    engine = ds_sparkling.grow(engine, {"hidden_size": 9})
    tiny.train(engine, 5)
    engine.save_checkpoint(directory)
    expected = tiny.train(engine, 8)
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    return expected, tiny.train(engine, 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_muon_run_goes_on(stage: int, workers: Pool, tmp_path: Path) -> None:
    """Bit for bit but for MKL, whose products round by where in memory their operands happen to lie."""
    for expected, losses in workers(2).run(muon_resumed, stage, str(tmp_path)):
        assert losses == pytest.approx(expected, rel=1e-6)


def cosine_on_a_constant_rate() -> tuple[str, int]:
    import ds_sparkling
    from ds_sparkling.errors import ConfigError

    top = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}
    engine = tiny.initialize(Case(1, 3, sparkling={"rewarmup": {"curve": "cosine"}}, top=top))
    tiny.train(engine, 2)
    try:
        ds_sparkling.grow(engine, {"moe_intermediate_size": 10})
    except ConfigError as error:
        tiny.train(engine, 3)
        return str(error), engine.global_steps
    return "grown", 0


def test_a_curve_that_cant_be_is_refused_before_the_engine_is_touched(workers: Pool) -> None:
    ((message, steps),) = workers(1).run(cosine_on_a_constant_rate)
    assert "WarmupLR doesn't tell where a cosine ends" in message
    assert steps == 3


def with_skipped_steps(stage: int, bad: tuple[int, ...]) -> tuple[Any, int, list[float], list[int]]:
    """Train on after a growth; at the micro steps ``bad`` there is an extra batch whose gradients are infinite."""
    engine = grown(Case(2, stage, bf16=True))
    for number in range(3):
        if number in bad:
            loss = engine(*tiny.batch(99)) * math.inf
            engine.backward(loss)
            engine.step()
        loss = engine(*tiny.batch(100 + number))
        engine.backward(loss)
        engine.step()
    ages = [birth.age for birth in engine.lr_scheduler.births]
    return tiny.local_state(engine)[0], engine.skipped_steps, engine.lr_scheduler.rates(0), ages


@pytest.mark.parametrize("stage", [1, 2])
def test_a_skipped_step_is_no_step_for_rates_and_ages(stage: int, workers: Pool) -> None:
    clean = workers(2).run(with_skipped_steps, stage, ())
    skipping = workers(2).run(with_skipped_steps, stage, (0, 2))
    for (state, none, rates, ages), (other, two, other_rates, other_ages) in zip(clean, skipping, strict=True):
        assert (none, two) == (0, 2)
        assert ages == [7, 5]
        assert (other_rates, other_ages) == (rates, ages)
        assert all(torch.equal(other[name][key], t) for name, ts in state.items() for key, t in ts.items())


def rates_under(top: dict[str, Any], client: bool) -> tuple[list[float], list[float]]:
    import ds_sparkling

    arguments: dict[str, Any] = {}
    case = Case(1, 3, sparkling=GROWING, top=top)
    if client:
        arguments["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    engine = tiny.initialize(case, **arguments)
    while engine.global_steps < 8:
        engine = ds_sparkling.grow_if_due(engine)
        tiny.train(engine, engine.global_steps + 1)
    return engine.get_lr(), engine.lr_scheduler.rates(0)


@pytest.mark.parametrize(
    ("scheduler", "client"),
    [
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 2}}, False),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "decay_lr_rate": 0.1}}, False),
        (None, True),
        (None, False),
    ],
)
def test_any_base_schedule_gets_a_factor(scheduler: Any, client: bool, workers: Pool) -> None:
    ((base, *_), rates) = workers(1).run(rates_under, {"scheduler": scheduler} if scheduler else {}, client)[0]
    if scheduler is None and not client:
        return  # the tiny case's own WarmupCosineLR
    assert rates == pytest.approx([base, 1.5 * base, 1.5 * base])


def refused_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> str:
    import ds_sparkling
    from ds_sparkling.errors import UnsupportedError

    case = Case(1, 0, sparkling=GROWING)
    config = {key: value for key, value in case.config.items() if key not in ("optimizer", "scheduler")}
    try:
        ds_sparkling.initialize(case.build_model, config, optimizer=make)
    except UnsupportedError as error:
        return str(error)
    return "made"


def refused_restart() -> tuple[str, bool]:
    import ds_sparkling
    from ds_sparkling.errors import UnsupportedError

    engine = tiny.initialize(Case(1, 0, top=optimizer("NAdam")))
    tiny.train(engine, 2)
    try:
        ds_sparkling.grow(engine, {"moe_intermediate_size": 10})
    except UnsupportedError as error:
        tiny.train(engine, 3)
        return str(error), engine.global_steps == 3
    return "grown", False


def test_optimizers_that_cant_tell_elements_apart_are_refused(workers: Pool) -> None:
    (message,) = workers(1).run(refused_optimizer, partial(CountingSGD, late=True))
    assert "CountingSGD updates an element by looking at others, or counts in its groups" in message
    assert 'rewarmup.scope to "none"' in message
    (message,) = workers(1).run(refused_optimizer, torch.optim.Adafactor)
    assert "Adafactor keeps state 'row_var'" in message
    ((message, goes_on),) = workers(1).run(refused_restart)
    assert "mu_product" in message
    assert 'bias_correction to "inherit"' in message
    assert goes_on


# -- checkpoints without a schedule, and universal ones ---------------------------------------------------------


def save(case: Case, directory: str) -> Any:
    engine = grown(case)
    engine.save_checkpoint(directory)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.optimizer.param_groups]
    return groups, engine.lr_scheduler.rates(0), tiny.evaluate(engine)


def load_without_schedule(case: Case, directory: str) -> tuple[list[float], list[float]]:
    engine = tiny.initialize(replace(case, sparkling=GROWING), checkpoint=directory)
    engine.load_checkpoint(directory, load_lr_scheduler_states=False)
    rates = engine.lr_scheduler.rates(0)
    tiny.train(engine, 8)
    return rates, engine.get_lr()


def test_without_the_schedule_elements_follow_the_base_rate(workers: Pool, tmp_path: Path) -> None:
    workers(2).run(save, CASES[0], str(tmp_path))
    for rates, _ in workers(2).run(load_without_schedule, CASES[0], str(tmp_path)):
        assert rates == [rates[0]] * 3


def load_universal(case: Case, directory: str) -> Any:
    top = {**case.top, "checkpoint": {"load_universal": True}}
    engine = tiny.initialize(replace(case, sparkling=GROWING, top=top), checkpoint=directory)
    engine.load_checkpoint(directory)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.optimizer.param_groups]
    return groups, engine.lr_scheduler.rates(0), tiny.evaluate(engine)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_universal_checkpoint_keeps_groups_and_rates(ranks: int, workers: Pool, tmp_path: Path) -> None:
    import shutil
    import subprocess
    import sys

    case = Case(2, 3, groups=True)
    saved = workers(2).run(save, case, str(tmp_path))
    groups, rates, _ = saved[0]
    tag = tmp_path / "global_step7"
    universal = tmp_path / "global_step7_universal"
    converter = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    done = subprocess.run(
        [*converter, "--input_folder", str(tag), "--output_folder", str(universal)], capture_output=True, text=True
    )
    assert universal.is_dir(), done.stderr
    shutil.copy(tag / "ds_sparkling.json", universal)
    loaded = workers(ranks).run(load_universal, case, str(tmp_path))
    for (loaded_groups, loaded_rates, loaded_loss), (_, _, loss) in zip(loaded, saved, strict=False):
        assert [(g["lr"], g["weight_decay"], g["betas"]) for g in loaded_groups] == [
            (g["lr"], g["weight_decay"], g["betas"]) for g in groups
        ]
        assert loaded_rates == rates
        assert loaded_loss == pytest.approx(loss, rel=1e-6)
