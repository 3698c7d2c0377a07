"""The diagnosis of engines on every stage, against one process that has the full tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from distributed import Workers
from ds_sparkling.errors import CheckpointError, ConfigError
from ds_sparkling.monitoring.observations import Observations
from ds_sparkling.monitoring.spectrum import effective_rank
from ds_sparkling.spec.strategy import OptimizerState, Rewarmup, Scope, Strategy
from tiny import Case, Logged

Pool = Callable[[int], Workers]
Events = dict[tuple[str, int], float]

#: hidden 6 -> 12 and inner 5 -> 10: unit u's twin is unit u + half.
JOINT = {"hidden_size": 12, "moe_intermediate_size": 10}
SPARKLING: dict[str, Any] = {
    "stages": [{"at_step": 2, "widths": JOINT}],
    "checkpoint_before_growth": False,
    "diagnose_every": 5,
    "log_every": 0,
}
CASES = [
    Case(2, 0),
    Case(2, 0, 2),
    Case(2, 1, bf16=True),
    Case(2, 2, 2, accumulation=2),
    Case(3, 3, 1, zero={"sub_group_size": 500}),
    Case(2, 3, 2, tied=False),
]


def watched(engine: Any) -> Events:
    """From now on, what the diagnosis writes into the engine's monitors, by tag and x; nothing is written twice."""
    events: Events = {}

    def write_events(new: list[tuple[str, float, int]]) -> None:
        for tag, value, x in new:
            if not tag.startswith("Train/"):  # DeepSpeed's own
                assert (tag, x) not in events, tag
                events[tag, x] = value

    tiny.monitored(engine, write_events)
    return events


class Seen:
    """What went into and came out of the one block, and its router's logits, in training, on this rank."""

    def __init__(self, engine: Any) -> None:
        self.given: list[Tensor] = []
        self.made: list[Tensor] = []
        self.logits: list[Tensor] = []
        block = engine.module.layers[0]
        block.register_forward_hook(self._block)
        block.router.register_forward_hook(self._router)

    def _block(self, module: Any, args: Any, output: Tensor) -> None:
        if module.training:
            self.given.append(args[0].detach().double())
            self.made.append(output.detach().double())

    def _router(self, module: Any, _args: Any, output: Tensor) -> None:
        if module.training:
            self.logits.append(output.detach().double())

    def take(self) -> list[Tensor]:
        taken = [torch.cat(self.given), torch.cat(self.made), torch.cat(self.logits)]
        self.given, self.made, self.logits = [], [], []
        return taken


def gradients(engine: Any) -> dict[str, Tensor]:
    """Whole gradients of this rank's slice at the boundary, through DeepSpeed's public getter."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, param in engine.module.named_parameters():
        gradient = safe_get_full_grad(param)
        assert gradient is not None
        found[name] = gradient.detach().float().clone()
    return found


def step(engine: Any) -> dict[str, Tensor]:
    """One optimizer step; the gradients that it is taken with."""
    accumulation = engine.gradient_accumulation_steps()
    found: dict[str, Tensor] = {}
    for micro in range(accumulation):
        loss = engine(*tiny.batch(engine.global_steps * accumulation + micro))
        engine.backward(loss)
        if micro == accumulation - 1:
            found = gradients(engine)
        engine.step()
    return found


def diagnosed(case: Case) -> dict[str, Any]:
    """Two steps, a growth, one step: everything that was written, and everything it was about."""
    import ds_sparkling

    engine = tiny.initialize(case)
    events, seen = watched(engine), Seen(engine)
    step(engine)
    assert not events  # not due
    seen.take()
    step(engine)  # due, as the last one before a growth
    before = seen.take()
    engine = ds_sparkling.grow_if_due(engine)
    events |= (grown := watched(engine))
    seen = Seen(engine)
    hooks = len(engine.module.layers[0]._forward_hooks)
    tiny.evaluate(engine)  # doesn't count
    taken = step(engine)
    assert len(engine.module.layers[0]._forward_hooks) == hooks  # switched off again
    events |= grown
    state, slices = tiny.local_state(engine)
    after = seen.take()
    step(engine)
    assert len(grown) == len({key for key in grown if key[1] != engine.global_samples})  # step 4 isn't due
    return {
        "events": events,
        "before": before,
        "after": after,
        "weights": (state, slices),
        "gradients": ({name: {"weight": gradient} for name, gradient in taken.items()}, slices),
        "samples": engine.train_batch_size(),
    }


def twins(name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every copied unit of a parameter of the tiny model and its source, by the parameter's name."""
    last = name.split(".")[-2 if name.endswith("weight") else -1]
    if last == "o_proj":
        yield from ((tensor[6 + unit], tensor[unit]) for unit in range(6))
    elif last == "embed_tokens":
        yield from ((tensor[:, 6 + unit], tensor[:, unit]) for unit in range(6))
    elif last == "gate_up_proj":
        for expert in tensor:
            for half in expert.chunk(2):
                yield from ((half[5 + unit], half[unit]) for unit in range(5))
    elif last in ("w1", "w3"):
        for expert in tensor:
            yield from ((expert[5 + unit], expert[unit]) for unit in range(5))
    elif last in ("down_proj", "w2"):
        for expert in tensor:
            yield from ((expert[6 + unit], expert[unit]) for unit in range(6))


def cosines(state: tiny.State) -> list[float]:
    found = []
    for name, tensors in state.items():
        for new, source in twins(name, tensors["weight"].double()):
            if new.norm() > 0 and source.norm() > 0:
                found.append(float(torch.cosine_similarity(new, source, dim=0)))
    return found


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_written_is_what_full_tensors_give(case: Case, workers: Pool) -> None:
    answers = workers(case.ranks).run(diagnosed, replace(case, sparkling=SPARKLING))
    events, samples = answers[0]["events"], answers[0]["samples"]
    assert all(answer["events"].keys() == events.keys() for answer in answers)
    assert all(answer["events"][key] == pytest.approx(value) for answer in answers for key, value in events.items())
    ratios = {}
    for when, x in (("before", 2 * samples), ("after", 3 * samples)):
        given, made, logits = (torch.cat(parts) for parts in zip(*(answer[when] for answer in answers), strict=True))
        ratios[when] = rms(made) / rms(given)
        assert events["activation_rms/layers.0", x] == pytest.approx(rms(made), rel=1e-5)
        assert events["activation_ratio/layers.0", x] == pytest.approx(ratios[when], rel=1e-5)
        p = logits.flatten(0, -2).softmax(-1)
        load = F.one_hot(p.topk(2).indices, 12).double().mean((0, 1)) * 12
        assert events["router/entropy/layers.0", x] == pytest.approx(
            float(-(p * p.log()).sum(-1).mean()), rel=1e-2 if case.bf16 else 1e-5
        )
        assert events["router/load_max/layers.0", x] == pytest.approx(float(load.max()))
        assert events["router/load_min/layers.0", x] == pytest.approx(float(load.min()))
    x = 3 * samples
    assert events["activation_drift/layers.0", x] == pytest.approx(ratios["after"] / ratios["before"], rel=1e-5)
    assert ("activation_drift/layers.0", 2 * samples) not in events

    weights, slopes = (tiny.join([answer[kind] for answer in answers]) for kind in ("weights", "gradients"))
    found = cosines(weights)
    assert events["twins/cosine", x] == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert events["twins/cosine_max", x] == pytest.approx(max(found), abs=1e-6)
    assert max(found) < 1.0 - 1e-6
    found = cosines(slopes)
    tolerance = 1e-2 if case.bf16 else 1e-4
    assert events["twins/gradient_cosine", x] == pytest.approx(sum(found) / len(found), abs=tolerance)
    prefix = "effective_rank/"
    ranks = {tag.removeprefix(prefix): value for (tag, at), value in events.items() if at == x and prefix in tag}
    assert len(ranks) == 4
    for name, rank in ranks.items():
        whole = weights[name]["weight"]
        assert rank == pytest.approx(effective_rank(whole[0] if whole.dim() == 3 else whole), rel=1e-4)
    assert {tag.removeprefix(prefix) for tag, at in events if prefix in tag and at < x} == ranks.keys()


def sampled(case: Case) -> tuple[float, float, tuple[tiny.State, Any]]:
    import ds_sparkling
    from ds_sparkling.engine.watch import twins as module

    entries, module.ENTRIES = module.ENTRIES, 48
    try:
        engine = tiny.initialize(case)
        tiny.train(engine, 2)
        engine = ds_sparkling.grow_if_due(engine)
        tiny.train(engine, 4)
        weights, gradients = module.TwinProbe(engine).measure()
        assert weights is not None
        assert gradients is None
        return weights.mean, weights.largest, tiny.local_state(engine)
    finally:
        module.ENTRIES = entries


@pytest.mark.parametrize("case", [Case(2, 1), Case(3, 3)], ids=str)
def test_of_large_parameters_every_unit_is_seen_through_some_entries(case: Case, workers: Pool) -> None:
    answers = workers(case.ranks).run(sampled, replace(case, sparkling=SPARKLING))
    state = tiny.join([answer[2] for answer in answers])
    thin: tiny.State = {}
    for name, tensors in state.items():
        weight, last = tensors["weight"], name.split(".")[-2 if name.endswith("weight") else -1]
        if last == "embed_tokens":  # [31, 12]: 4 tokens
            weight = weight[[0, 7, 15, 23]]
        elif last == "gate_up_proj":  # [12, 20, 12]: one expert, two columns
            weight = weight[:1][:, :, [0, 6]]
        elif last == "down_proj":  # [12, 12, 10]: one expert, four columns
            weight = weight[:1][:, :, [0, 2, 5, 7]]
        elif last == "o_proj":  # [12, 8]: four columns
            weight = weight[:, ::2]
        thin[name] = {"weight": weight}
    found = cosines(thin)
    for mean, largest, _ in answers:
        assert mean == pytest.approx(sum(found) / len(found), abs=1e-6)
        assert largest == pytest.approx(max(found), abs=1e-6)


# -- when, and what it leaves alone -------------------------------------------------------------------------------


def due_steps(every: int, monitored: bool) -> tuple[list[int], list[str], int, list[float]]:
    """Steps that something was written at, the tags, the most hooks on the block in a forward pass, and all losses."""
    import ds_sparkling

    sparkling = {**SPARKLING, "diagnose_every": every}
    engine = tiny.initialize(Case(1, 2, sparkling=sparkling))
    events: Events = {}
    counted: list[int] = []
    losses: list[float] = []
    new = watched(engine) if monitored else {}
    while engine.global_steps < 11:
        if engine.sparkling.due(engine.global_steps):
            events |= new
            engine = ds_sparkling.grow_if_due(engine)
            new = watched(engine) if monitored else {}
        block = engine.module.layers[0]
        handle = block.router.register_forward_hook(lambda *_, hooks=block._forward_hooks: counted.append(len(hooks)))
        losses += tiny.train(engine, engine.global_steps + 1)
        handle.remove()
    events |= new
    hooks = max(counted)
    batch = engine.train_batch_size()
    return sorted({x // batch for _, x in events}), sorted({tag.split("/")[0] for tag, _ in events}), hooks, losses


def test_due_steps_are_every_so_many_and_those_around_a_growth(workers: Pool) -> None:
    ((steps, tags, hooks, losses),) = workers(1).run(due_steps, 5, True)
    assert steps == [2, 3, 5, 10]
    assert tags == sorted(
        ["activation_drift", "activation_ratio", "activation_rms", "effective_rank", "router", "twins"]
    )
    ((steps, tags, unhooked, plain),) = workers(1).run(due_steps, 0, True)
    assert (steps, tags) == ([], [])
    assert hooks == unhooked + 1
    assert losses == plain  # looking changes nothing
    ((steps, _, unmonitored, plain),) = workers(1).run(due_steps, 5, False)
    assert (steps, unmonitored) == ([], unhooked)
    assert losses == plain


def adopted() -> tuple[Events, Events]:
    """What an engine that was made to grow writes, and one of plain DeepSpeed that grows in place."""
    import deepspeed

    import ds_sparkling

    case = Case(2, 3, 2, sparkling=SPARKLING)
    plain, *_ = deepspeed.initialize(model=case.build_model(), config=case.config)
    found = []
    for engine in (tiny.initialize(case), ds_sparkling.adopt(plain, case.build_model)):
        events = watched(engine)
        tiny.train(engine, 2)
        grown = ds_sparkling.grow_if_due(engine)
        after = watched(grown)
        tiny.train(grown, 5)
        found.append({**events, **after})
    return found[0], found[1]


def test_an_adopted_engine_is_diagnosed_like_any_other(workers: Pool) -> None:
    for expected, events in workers(2).run(adopted):
        assert len(expected) > 20
        assert events == expected


def of_the_first_rank(directory: str) -> list[str]:
    """Tags that were written where only the first rank's config has a monitor, as is enough for plain DeepSpeed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = torch.distributed.get_rank() == 0
    tensorboard = {"enabled": first, "output_path": directory, "job_name": "run"}
    case = Case(2, 3, 2, sparkling={**SPARKLING, "diagnose_every": 1, "log_every": 1}, top={"tensorboard": tensorboard})
    engine = tiny.initialize(case)
    tiny.train(engine, 1)
    if not first:
        return []
    engine.monitor.tb_monitor.summary_writer.close()
    events = EventAccumulator(f"{directory}/run")
    events.Reload()
    return list(events.Tags()["scalars"])


def test_a_monitor_of_the_first_rank_is_enough(workers: Pool, tmp_path: Path) -> None:
    tags, _ = workers(2).run(of_the_first_rank, str(tmp_path))
    assert {"router/entropy/layers.0", "Train/Samples/train_loss", "By_compute/train_loss"} <= set(tags)


def differing() -> None:
    every = 5 + torch.distributed.get_rank()
    with pytest.raises(ConfigError, match=r'rank 1: the "sparkling" block isn.t that of the first rank'):
        tiny.initialize(Case(2, 1, sparkling={"diagnose_every": every}))


def test_ranks_that_would_measure_at_different_steps_are_refused(workers: Pool) -> None:
    workers(2).run(differing)


def without_gradients() -> tuple[Events, Events]:
    """What a diagnosed step writes, without and with other forward passes in training mode before its own."""
    found = []
    for others in (False, True):
        engine = tiny.initialize(Case(2, 1, sparkling={"diagnose_every": 1, "log_every": 0}))
        events = watched(engine)
        if others:
            with torch.no_grad():
                engine(*tiny.batch(7))
        tiny.train(engine, 1)
        found.append(events)
    return found[0], found[1]


def test_forward_passes_without_gradients_do_not_count(workers: Pool) -> None:
    for expected, events in workers(2).run(without_gradients):
        assert len(expected) > 4
        assert events == expected


def losses_alone() -> list[str]:
    engine = tiny.initialize(Case(1, 1, sparkling={"diagnose_every": 0, "log_every": 2}))
    tags: list[str] = []
    tiny.monitored(engine, lambda events: tags.extend(tag for tag, _, _ in events))
    tiny.train(engine, 4)
    return tags


def test_losses_are_written_without_diagnoses_too(workers: Pool) -> None:
    (tags,) = workers(1).run(losses_alone)
    assert tags.count("Train/Samples/train_loss") >= 2


def moved(case: Case) -> dict[str, float]:
    """RMS of the updates of a step after a growth."""
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, 2)
    engine = ds_sparkling.grow_if_due(engine)
    found: dict[str, float] = {}
    tiny.monitored(engine, lambda events: found.update((tag, value) for tag, value, _ in events))
    tiny.train(engine, 3)
    return {tag: value for tag, value in found.items() if tag.startswith("update_rms")}


def test_updates_are_the_same_however_often_ranks_hold_an_element(workers: Pool) -> None:
    """On stage 0 all ranks hold the dense parameters, and every second one the same experts."""
    case = Case(4, 0, 2, sparkling={**SPARKLING, "log_every": 1}, top={"gradient_clipping": 0.0})
    whole, cut = (workers(4).run(moved, replace(case, stage=stage)) for stage in (0, 2))
    assert set(whole[0]) == {"update_rms/old", "update_rms/new"}
    assert whole[0] == pytest.approx(cut[0], rel=1e-3)
    assert all(answer == whole[0] for answer in whole)


# -- alarms -----------------------------------------------------------------------------------------------------


def spiking(factor: float) -> list[str]:
    """Alarms of a run without a monitor whose 27th loss is ``factor`` times what it should be."""
    logged = Logged()
    engine = tiny.initialize(Case(2, 1, sparkling=SPARKLING, accumulation=2))
    for number in range(62):
        loss = engine(*tiny.batch(number)) * (factor if number // 2 == 26 else 1.0)
        if number % 4 < 2:
            engine.backward(loss)
        else:  # as transformers.Trainer does
            engine.backward(loss / 2, scale_wrt_gas=False)
        engine.step()
    logged.close()
    return logged.messages


def test_a_loss_spike_is_told_by_the_first_rank_without_a_monitor(workers: Pool) -> None:
    first, second = workers(2).run(spiking, 3.0)
    assert len(first) == 1
    assert first[0].startswith("loss spike at step 27: the loss is 1")
    assert second == []
    assert workers(2).run(spiking, 1.0) == [[], []]


def breaking_off(directory: str) -> tuple[list[str], list[str]]:
    """Alarms before and after a run saves that has just got a loss which isn't finite."""
    logged = Logged()
    engine = tiny.initialize(Case(2, 1, sparkling=SPARKLING))
    tiny.train(engine, 1)
    engine.backward(engine(*tiny.batch(1)) * math.inf)
    engine.step()
    before = list(logged.messages)
    engine.save_checkpoint(directory)
    logged.close()
    return before, logged.messages


def test_the_last_losses_are_looked_at_before_a_checkpoint(workers: Pool, tmp_path: Path) -> None:
    (before, (message,)), second = workers(2).run(breaking_off, str(tmp_path))
    assert before == []
    assert message.startswith("loss spike at step 2: the loss is inf")
    assert second == ([], [])


def twin_alarms(state: OptimizerState) -> list[str]:
    """Alarms of eight steps after a growth that is re-warmed in four, every second one diagnosed."""
    import ds_sparkling

    engine = tiny.initialize(Case(2, 3, 2, sparkling={"diagnose_every": 2}))
    tiny.train(engine, 2)
    tiny.with_strategy(engine, Strategy(optimizer_state=state, rewarmup=Rewarmup(ratio=2.0, steps=4, scope=Scope.ALL)))
    engine = ds_sparkling.grow(engine, {"moe_intermediate_size": 10})
    watched(engine)
    logged = Logged()
    tiny.train(engine, 10)
    logged.close()
    return logged.messages


def test_locked_twins_are_told_once_and_parted_ones_never(workers: Pool) -> None:
    (message,), second = workers(2).run(twin_alarms, OptimizerState.COPY)
    assert message.startswith("locked twins: 4 steps after growth 1")
    assert "in 2 of 2 parameters looked at" in message
    assert second == []
    assert workers(2).run(twin_alarms, OptimizerState.ASYMMETRIC_RESET) == [[], []]


def expert_alarms(dead: bool, ep: int) -> list[str]:
    from ds_sparkling.monitoring import alarms

    fewest, alarms._FEWEST_TOKENS = alarms._FEWEST_TOKENS, 5
    logged = Logged()
    engine = tiny.initialize(Case(2, 1, ep, sparkling={"diagnose_every": 1}, top={"gradient_clipping": 0.0}))
    watched(engine)
    if dead:
        # The other experts' logits are far from zero on either side.
        with torch.no_grad():
            weight = engine.module.layers[0].router.weight
            weight.mul_(1000.0)
            weight[3] = 0.0
        engine.module.layers[0].router.weight.register_hook(torch.zeros_like)
    for number in range(6):  # an alarm takes four measurements; the later ones are told already
        engine(*tiny.batch(number))
        loss = engine(*tiny.batch(number + 10)) * 0.0
        engine.backward(loss)
        engine.step()
        if dead:
            with torch.no_grad():
                weight[3] = 0.0
    logged.close()
    alarms._FEWEST_TOKENS = fewest
    return logged.messages


@pytest.mark.parametrize("ep", [0, 2])
def test_dead_experts_are_told_once(ep: int, workers: Pool) -> None:
    first, second = workers(2).run(expert_alarms, True, ep)
    assert sum("experts 3 of 12" in message or " 3," in message for message in first) == 1
    assert first[0].startswith("dead experts at step 4 in layers.0: experts ")
    assert second == []


# -- TensorBoard ------------------------------------------------------------------------------------------------


def in_tensorboard(directory: str) -> None:
    import ds_sparkling

    tensorboard = {"enabled": True, "output_path": directory, "job_name": "run"}
    engine = tiny.initialize(
        Case(2, 3, 2, sparkling=SPARKLING, top={"tensorboard": tensorboard, "wandb": {"team": "t"}})
    )
    tiny.train(engine, 2)
    engine = ds_sparkling.grow_if_due(engine)
    tiny.train(engine, 3)
    if engine.monitor.tb_monitor is not None:
        engine.monitor.tb_monitor.summary_writer.close()


def test_tensorboard_has_a_page_of_curves_and_the_settings_in_the_runs_own_file(workers: Pool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    workers(2).run(in_tensorboard, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no run of its own for the settings
    files = list((tmp_path / "run").iterdir())
    assert len(files) == 2
    assert all(file.is_file() for file in files)
    found = [EventAccumulator(str(file)) for file in files]
    for events in found:
        events.Reload()
    first, second = sorted(found, key=lambda events: events.FirstEventTimestamp())
    layout = Layout()
    layout.ParseFromString(second.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert layout.category[0].title == "Growth"
    start = HParamsPluginData()
    start.ParseFromString(first.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    shown = start.session_start_info.hparams
    assert shown["optimizer.params.lr"].number_value == 1e-2
    assert shown["sparkling.rewarmup.ratio"].number_value == 1.3
    assert shown["widths.hidden_size"].number_value == 6
    assert not any(name.startswith(("wandb", "tensorboard")) for name in shown)
    columns = HParamsPluginData()
    columns.ParseFromString(first.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert columns.experiment.hparam_infos[0].name == "optimizer.params.lr"
    assert "Run/config/text_summary" in first.Tags()["tensors"]
    assert "_hparams_/session_start_info" not in second.Tags()["tensors"]
    assert "twins/cosines" in second.Tags()["histograms"]
    loads = second.Histograms("router/load/layers.0")[-1].histogram_value
    assert list(loads.bucket_limit) == list(range(1, 13))  # a bar per expert
    assert sum(loads.bucket) == pytest.approx(12)
    assert max(loads.bucket) == pytest.approx(second.Scalars("router/load_max/layers.0")[-1].value)
    assert math.isclose(second.Scalars("twins/cosine")[0].step, 12)


# -- checkpoints ------------------------------------------------------------------------------------------------


def resumed(directory: str) -> tuple[Events, Events]:
    """What the step after a saved one writes, in the run that goes on and in one that is resumed."""
    import ds_sparkling

    case = Case(2, 3, 2, sparkling={**SPARKLING, "diagnose_every": 1})
    engine = tiny.initialize(case)
    watched(engine)
    tiny.train(engine, 2)
    engine = ds_sparkling.grow_if_due(engine)
    watched(engine)
    tiny.train(engine, 3)
    engine.save_checkpoint(directory)
    expected = watched(engine)
    tiny.train(engine, 4)
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    events = watched(engine)
    tiny.train(engine, 4)
    return expected, events


def test_a_resumed_run_still_knows_the_ratios_before_the_growth(workers: Pool, tmp_path: Path) -> None:
    for expected, events in workers(2).run(resumed, str(tmp_path)):
        assert any(tag.startswith("activation_drift/") for tag, _ in expected)
        assert events == pytest.approx(expected)


def test_observations_that_cant_be_read_are_named(tmp_path: Path) -> None:
    observations = Observations(ratios={"layers.0": 1.5})
    observations.grown()
    observations.write(tmp_path)
    other = Observations()
    other.read(tmp_path)
    assert other.ratios_before == {"layers.0": 1.5}
    (tmp_path / "ds_sparkling_diagnostics.json").write_text('{"ratios": 1}')
    with pytest.raises(CheckpointError, match=r"ds_sparkling_diagnostics\.json can't be read .* remove it"):
        other.read(tmp_path)
    other.read(tmp_path / "elsewhere")
    assert other.ratios_before == {}
