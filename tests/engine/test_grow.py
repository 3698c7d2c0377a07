"""What a user can count on around a growth: continuity, twins, refusals, failures."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from distributed import Workers
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.spec.strategy import OptimizerState, Rewarmup, Scope, Strategy
from tiny import Case, Logged

Pool = Callable[[int], Workers]
JOINT = {"hidden_size": 12, "moe_intermediate_size": 10}


def states_equal(first: tiny.State, second: tiny.State) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name][key], tensor) for name, tensors in second.items() for key, tensor in tensors.items()
    )


# -- a rebuild changes nothing ----------------------------------------------------------------------------------


def rebuilt(case: Case, at: int | None) -> tuple[list[float], tiny.State, Any]:
    import ds_sparkling

    engine = tiny.initialize(case)
    losses = tiny.train(engine, 3)
    if at is not None:
        engine = ds_sparkling.rebuild(engine)
    losses += tiny.train(engine, 7)
    return losses, tiny.local_state(engine)[0], (engine.get_lr(), engine.global_samples, engine.micro_steps)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 2, zero={"sub_group_size": 300}),
        Case(3, 3, bf16=True, groups=True, frozen=True),
        Case(2, 2, 1, accumulation=3),
        Case(2, 2, zero={"round_robin_gradients": True}, groups=True),
        Case(2, 1, bf16=True),
        Case(1, 0, bf16=True),
    ],
    ids=str,
)
def test_rebuild_continues_bit_for_bit(case: Case, workers: Pool) -> None:
    pool = workers(case.ranks)
    plain, again = pool.run(rebuilt, case, None), pool.run(rebuilt, case, 3)
    for (losses, state, counters), (losses_again, state_again, counters_again) in zip(plain, again, strict=True):
        assert losses == losses_again
        assert counters == counters_again
        assert states_equal(state, state_again)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"type": "SGD", "params": {"lr": 1e-2}},
    "sgd-momentum": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9, "nesterov": True}},
    "adam-amsgrad": {"type": "AdamW", "params": {"lr": 1e-3, "amsgrad": True, "torch_adam": True}},
    "rmsprop": {"type": "RMSprop", "params": {"lr": 1e-3, "centered": True}},
    "muon": {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rebuild_and_growth_with_other_optimizers(name: str, workers: Pool) -> None:
    zero = {"sub_group_size": 300, **({"reduce_scatter": False} if name == "muon" else {})}
    top = {"optimizer": OPTIMIZERS[name], "zero_allow_untested_optimizer": True}
    case = Case(2, 3, 2, zero=zero, top=top)
    pool = workers(2)
    assert pool.run(losses_around, case, "rebuild") == pool.run(losses_around, case, None)
    for before, after, end in pool.run(losses_around, case, "grow"):
        assert after == pytest.approx(before, rel=1e-6)
        assert end != after


def losses_around(case: Case, what: str | None) -> tuple[float, float, float]:
    import ds_sparkling

    engine = tiny.initialize(case)
    tiny.train(engine, 3)
    before = tiny.evaluate(engine)
    if what == "rebuild":
        engine = ds_sparkling.rebuild(engine)
    elif what == "grow":
        engine = ds_sparkling.grow(engine, JOINT)
    after = tiny.evaluate(engine)
    tiny.train(engine, 6)
    return before, after, tiny.evaluate(engine)


# -- twins ------------------------------------------------------------------------------------------------------


def twin_cosine(state: OptimizerState, scope: Scope) -> float:
    """Mean cosine between copied units and their sources, 6 steps after the growth (Fig. 2)."""
    import ds_sparkling
    from ds_sparkling.engine.watch.twins import TwinProbe

    engine = tiny.initialize(Case(2, 3, 2))
    tiny.train(engine, 3)
    tiny.with_strategy(engine, Strategy(optimizer_state=state, rewarmup=Rewarmup(ratio=2.0, steps=2, scope=scope)))
    engine = ds_sparkling.grow(engine, {"moe_intermediate_size": 10})
    tiny.train(engine, 9)
    weights, _ = TwinProbe(engine).measure()
    assert weights is not None
    return weights.mean


@pytest.mark.parametrize("state", [OptimizerState.COPY, OptimizerState.DROP])
@pytest.mark.parametrize("scope", [Scope.NONE, Scope.ALL])
def test_symmetric_states_lock_the_twins(state: OptimizerState, scope: Scope, workers: Pool) -> None:
    assert min(workers(2).run(twin_cosine, state, scope)) > 1 - 1e-9


def test_asymmetric_reset_parts_the_twins_and_a_rewarmup_parts_them_faster(workers: Pool) -> None:
    parted = workers(2).run(twin_cosine, OptimizerState.ASYMMETRIC_RESET, Scope.NONE)
    faster = workers(2).run(twin_cosine, OptimizerState.ASYMMETRIC_RESET, Scope.NEW)
    assert max(parted) < 1 - 1e-4
    assert all(1 - new > 1.2 * (1 - none) for new, none in zip(faster, parted, strict=True))


# -- when growth happens ----------------------------------------------------------------------------------------


def accumulation() -> tuple[list[int], str, bool]:
    import ds_sparkling
    from ds_sparkling.errors import GrowthError

    engine = tiny.initialize(Case(2, 3, accumulation=2, sparkling={"stages": [{"at_step": 1, "widths": JOINT}]}))
    widths = []
    for micro_step in range(4):
        engine = ds_sparkling.grow_if_due(engine)
        widths.append(engine.sparkling.widths["hidden_size"])
        engine.backward(engine(*tiny.batch(micro_step)))
        engine.step()
    engine.backward(engine(*tiny.batch(4)))
    engine.step()
    try:
        ds_sparkling.grow(engine, {"hidden_size": 24})
    except GrowthError as error:
        return widths, str(error), ds_sparkling.grow_if_due(engine) is engine
    return widths, "grown", False


def test_growth_waits_for_the_accumulation_boundary(workers: Pool) -> None:
    for widths, message, same in workers(2).run(accumulation):
        assert widths == [6, 6, 12, 12]
        assert "middle of gradient accumulation" in message
        assert same


def used_up() -> list[str]:
    import ds_sparkling
    from ds_sparkling.errors import GrowthError

    old = tiny.initialize(Case(1, 3))
    new = ds_sparkling.grow(old, JOINT)
    messages = []
    for use in (lambda: old(*tiny.batch(0)), lambda: old.global_steps, lambda: ds_sparkling.grow(old, JOINT)):
        try:
            use()
        except GrowthError as error:
            messages.append(str(error))
    tiny.train(new, 1)
    return messages


def test_the_old_engine_says_that_it_is_gone(workers: Pool) -> None:
    (messages,) = workers(1).run(used_up)
    assert len(messages) == 3
    assert all("gone" in message for message in messages)


def grown_after_compiling() -> list[str]:
    """What is logged by a growth of an engine that isn't compiled, and by one of an engine that is."""
    import ds_sparkling

    logged = Logged()
    engine = ds_sparkling.grow(tiny.initialize(Case(1, 1)), {"hidden_size": 12})
    logged.messages.append("--")
    engine.compile(backend="eager")
    engine = ds_sparkling.grow(engine, {"moe_intermediate_size": 10})
    logged.close()
    tiny.train(engine, 1)
    return logged.messages


def test_a_growth_of_a_compiled_engine_says_that_the_new_one_isnt(workers: Pool) -> None:
    (said,) = workers(1).run(grown_after_compiling)
    before, after = " ".join(said).split("--")
    assert "engine.compile()" not in before
    assert "call engine.compile()" in after


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, every storage once.

    The least of some measurements: gloo's threads let go of the last collective's buffer a little after it is done.
    """
    import gc

    def measure() -> int:
        time.sleep(0.1)
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    return min(measure() for _ in range(4))


def memory_after_rebuild(stage: int) -> tuple[int, int]:
    import ds_sparkling

    engine = tiny.initialize(Case(2, stage, 2 if stage else 0, bf16=True))
    tiny.train(engine, 1)
    before = live_bytes()
    held = engine, engine.module, engine.optimizer, engine.lr_scheduler, list(engine.module.parameters())
    engine = ds_sparkling.rebuild(engine)
    tiny.train(engine, 2)
    after = live_bytes()
    del held  # by others, and until now
    return before, after


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_old_engine_leaves_no_memory_behind(stage: int, workers: Pool) -> None:
    for before, after in workers(2).run(memory_after_rebuild, stage):
        assert after < 1.01 * before


# -- what carries over ------------------------------------------------------------------------------------------


class Ramp(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((9,), index % tiny.VOCABULARY)


def everything_else(grown: bool) -> list[Any]:
    """Random numbers, data order, client-made optimizer and scheduler, with and without a growth in between."""
    import ds_sparkling

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    case = Case(2, 3)
    config = {key: value for key, value in case.config.items() if key not in ("optimizer", "scheduler")}
    config["zero_allow_untested_optimizer"] = True
    engine = ds_sparkling.initialize(
        case.build_model,
        config,
        optimizer=lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        training_data=Ramp(),
    )
    batches = iter(engine.training_dataloader)
    seen: list[Any] = [next(batches)[:, 0].tolist()]
    tiny.train(engine, 2)
    if grown:
        engine = ds_sparkling.grow(engine, JOINT)
    tiny.train(engine, 3)
    seen += [next(batches)[:, 0].tolist(), engine.training_dataloader is not None]
    seen += [
        torch.rand(3).tolist(),
        random.random(),
        float(np.random.rand()),
        engine.get_lr(),
        engine.lr_scheduler.last_epoch,
    ]
    seen += [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps]
    return seen


def test_random_state_data_order_and_schedule_carry_over(workers: Pool) -> None:
    assert workers(2).run(everything_else, True) == workers(2).run(everything_else, False)


def loss_scale(stage: int) -> tuple[float, int, int, bool]:
    """A loss scaler in the middle of its life (fp16 itself needs a GPU)."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    import ds_sparkling

    engine = tiny.initialize(Case(2, stage))
    scaler = DynamicLossScaler(2**16, 2.0, 10, 1.0, 2, False)
    for overflow in (False, True, False, True, False):
        scaler.update_scale(overflow)
    engine.optimizer.loss_scaler = scaler
    engine.skipped_steps = 2
    expected = (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter)
    engine = ds_sparkling.grow(engine, JOINT)
    carried = engine.optimizer.loss_scaler
    assert (carried.cur_scale, carried.cur_iter, carried.last_overflow_iter) == expected
    return carried.cur_scale, carried.last_overflow_iter, engine.skipped_steps, carried.dynamic


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_scale_carries_over(stage: int, workers: Pool) -> None:
    for scale, last_overflow, skipped, dynamic in workers(2).run(loss_scale, stage):
        assert scale < 2**16
        assert (last_overflow, skipped, dynamic) == (3, 2, True)


def offloaded(cpu_adam: bool, device: str) -> tuple[list[float], float, float, dict[str, Any], GrowthPlan]:

    import ds_sparkling

    top: dict[str, Any] = {}
    if cpu_adam:
        top["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}}
    zero = {"offload_optimizer": {"device": device}, "sub_group_size": 500}
    engine = tiny.initialize(Case(2, 3, 2, bf16=True, zero=zero, top=top))
    losses = tiny.train(engine, 2)
    before, loss = tiny.local_state(engine), tiny.evaluate(engine)
    engine = ds_sparkling.grow(engine, JOINT)
    after, grown_loss = tiny.local_state(engine), tiny.evaluate(engine)
    losses += tiny.train(engine, 4)
    return losses, loss, grown_loss, {"before": before, "after": after}, engine.sparkling.plan


@pytest.mark.parametrize("cpu_adam", [False, True], ids=["torch_adam", "DeepSpeedCPUAdam"])
def test_offloaded_optimizer(cpu_adam: bool, workers: Pool) -> None:
    answers = workers(2).run(offloaded, cpu_adam, "cpu")
    plain = workers(2).run(offloaded, False, "none")
    plan = answers[0][4]
    before, after = (tiny.join([answer[3][when] for answer in answers]) for when in ("before", "after"))
    assert states_equal(tiny.reference(plan, before), after)
    for (losses, loss, grown_loss, *_), (losses_on_device, *_) in zip(answers, plain, strict=True):
        assert grown_loss == pytest.approx(loss, rel=1e-6)
        assert losses == pytest.approx(losses_on_device, rel=1e-3)


# -- TensorBoard ------------------------------------------------------------------------------------------------


def monitored(directory: str) -> int:
    import ds_sparkling

    tensorboard = {"enabled": True, "output_path": directory, "job_name": "run"}
    engine = tiny.initialize(Case(2, 3, 2, top={"tensorboard": tensorboard}))
    tiny.train(engine, 2)
    engine = ds_sparkling.grow(engine, JOINT)
    tiny.train(engine, 4)
    if engine.monitor.tb_monitor is not None:
        engine.monitor.tb_monitor.summary_writer.close()
    return int(engine.global_samples)


def test_tensorboard_goes_on_and_marks_the_growth(workers: Pool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

    samples = workers(2).run(monitored, str(tmp_path))[0]
    files = list((tmp_path / "run").glob("events*"))  # their names order them by the second they were made in
    assert len(files) == 2
    rates: list[ScalarEvent] = []
    tags: set[str] = set()
    for file in files:
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        rates += accumulator.Scalars("Train/Samples/lr")
        tags |= set(accumulator.Tags()["scalars"]) | set(accumulator.Tags()["tensors"])
    steps = [event.step for event in sorted(rates, key=lambda event: event.wall_time)]
    assert steps == [samples // 4 * step for step in (1, 2, 3, 4)]
    assert {"Growth/number", "Growth/parameters", "Growth/plan/text_summary", "Train/Samples/lr"} <= tags


# -- refusals ---------------------------------------------------------------------------------------------------


def refused(case: Case, arguments: dict[str, Any], widths: dict[str, int] | None) -> str:
    import ds_sparkling
    from ds_sparkling.errors import SparklingError

    try:
        engine = tiny.initialize(case, **arguments)
    except SparklingError as error:
        return f"{type(error).__name__}: {error}"
    if widths is None:
        return "accepted"
    tiny.train(engine, 1)
    before = tiny.local_state(engine)[0]
    try:
        ds_sparkling.grow(engine, widths)
    except SparklingError as error:
        assert states_equal(tiny.local_state(engine)[0], before)
        tiny.train(engine, 2)
        return f"{type(error).__name__}: {error}"
    return "grown"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"hidden_size": 6}, "PlanError.*hidden_size: width 6 -> 6 changes nothing"),
        ({"hidden_size": 3}, "PlanError.*hidden_size: width 6 -> 3 shrinks"),
        ({"hidden_sise": 12}, "PlanError.*hidden_sise"),
        ({}, "PlanError.*call rebuild"),
    ],
)
def test_a_growth_that_cannot_be_leaves_the_engine_usable(widths: dict[str, int], message: str, workers: Pool) -> None:
    import re

    for answer in workers(2).run(refused, Case(2, 3, 2), {}, widths):
        assert re.search(message, answer), answer


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(1, 3, zero={"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}), "offload_param.device = 'nvme'"),
        (Case(1, 3, zero={"mics_shard_size": 1}), "mics_shard_size = 1: MiCS"),
        (Case(1, 3, zero={"zero_hpz_partition_size": 2}), "zero_hpz_partition_size = 2: hpZeRO"),
        (Case(1, 3, zero={"zero_quantized_weights": True}), "zero_quantized_weights"),
        (Case(1, 1, top={"tensor_parallel": {"autotp_size": 2}}), "tensor_parallel.autotp_size = 2"),
        (Case(1, 1, top={"optimizer": {"type": "OneBitAdam", "params": {}}}), "optimizer.type = 'OneBitAdam'"),
        (Case(1, 1, sparkling={"stage": []}), "sparkling.stage: unknown key; did you mean 'stages'"),
        (
            Case(1, 1, sparkling={"stages": [{"at_step": 1, "widths": {"hidden_size": 4}}]}),
            "hidden_size: width 6 -> 4 shrinks",
        ),
    ],
    ids=lambda value: "" if isinstance(value, Case) else str(value)[:40],
)
def test_what_cannot_be_combined_is_refused_by_name(case: Case, message: str, workers: Pool) -> None:
    (answer,) = workers(1).run(refused, case, {}, None)
    assert message in answer


def test_an_optimizer_instance_is_refused(workers: Pool) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    (answer,) = workers(1).run(refused, Case(1, 1), {"optimizer": optimizer}, None)
    assert "optimizer must be a function" in answer


def unknown_version() -> str:
    import deepspeed

    from ds_sparkling.engine.internals import check_version

    version, deepspeed.__version__ = deepspeed.__version__, "9.9.9"
    try:
        check_version()
    except NotImplementedError as error:
        return str(error)
    finally:
        deepspeed.__version__ = version
    return "accepted"


def test_an_unchecked_deepspeed_is_refused(workers: Pool) -> None:
    (message,) = workers(1).run(unknown_version)
    assert "9.9.9" in message
    assert "pip install deepspeed==" in message


# -- failures ---------------------------------------------------------------------------------------------------


def build_fails_on_one_rank() -> tuple[str, list[float]]:
    import ds_sparkling

    case = Case(2, 3, 2)
    build = case.build_model

    def build_model(**widths: int) -> torch.nn.Module:
        if widths.get("hidden_size", 0) > 20 and torch.distributed.get_rank() == 1:
            raise MemoryError("no room on this host")
        return build(**widths)

    engine = ds_sparkling.initialize(build_model, case.config)
    tiny.train(engine, 1)
    try:
        ds_sparkling.grow(engine, {"hidden_size": 24})
    except ds_sparkling.errors.SparklingError as error:
        return str(error), tiny.train(engine, 2)
    return "grown", []


def test_a_model_that_one_rank_cannot_build_fails_on_all_before_anything_is_touched(workers: Pool) -> None:
    messages = {message for message, losses in workers(2).run(build_fails_on_one_rank) if losses}
    assert len(messages) == 1
    assert "rank 1" in messages.pop()


def move_fails_on_one_rank(directory: str) -> tuple[str, float, float]:
    import ds_sparkling
    from ds_sparkling.engine import move_shards
    from ds_sparkling.errors import GrowthError

    case = Case(2, 3, 2)
    engine = tiny.initialize(case, checkpoint=directory)
    tiny.train(engine, 2)
    loss = tiny.evaluate(engine)
    fill = move_shards._fill

    def failing(arrival: Any, *rest: Any) -> None:
        if torch.distributed.get_rank() == 1 and arrival.transfer.widener.param.name.endswith("k_proj.weight"):
            raise RuntimeError("out of memory")
        fill(arrival, *rest)

    move_shards._fill = failing  # type: ignore[assignment]
    message = "grown"
    try:
        ds_sparkling.grow(engine, JOINT)
    except GrowthError as error:
        message = str(error)
    finally:
        move_shards._fill = fill
    engine = tiny.initialize(case, checkpoint=directory)
    engine.load_checkpoint(directory)
    return message, loss, tiny.evaluate(engine)


def test_a_growth_that_fails_half_way_leaves_the_checkpoint_and_tells_every_rank(workers: Pool, tmp_path: Path) -> None:
    answers = workers(2).run(move_fails_on_one_rank, str(tmp_path))
    assert len({message for message, *_ in answers}) == 1
    assert "rank 1: RuntimeError: out of memory" in answers[0][0]
    assert str(tmp_path) in answers[0][0]
    for _, loss, loaded in answers:
        assert loss == loaded
