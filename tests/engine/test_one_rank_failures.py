"""Whatever fails on one rank alone, at any step of a growth or of a save: the same error on all ranks, and soon.

The suite tries some places; ``ONE_RANK_FAILURES=all`` tries every one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from distributed import Workers
from hurry import in_a_hurry

Pool = Callable[[int], Workers]
JOINT = {"hidden_size": 12, "moe_intermediate_size": 10}
#: What fails on the second rank before anything is destroyed: the engine trains on as if nothing had been tried.
UNTOUCHED = (
    "ds_sparkling.engine.gradients.GradientWatch.refuse_held",
    "ds_sparkling.engine.planning.build_on_meta",
    "ds_sparkling.engine.transition.plan_growth",
    "ds_sparkling.engine.transition.check_wide",
    "ds_sparkling.engine.transition.check_optimizer",
    "ds_sparkling.engine.optimizers.zero3.Zero3.partition_group",
    "ds_sparkling.engine.access.shards",
    "ds_sparkling.engine.transition.Carried",
    "ds_sparkling.engine.transition.Held",
    # the checkpoint before the growth
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.save",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.commit",
)
#: The same while the engine is replaced: it is lost.
LOST = (
    "ds_sparkling.engine.grow.close_writer",
    "ds_sparkling.engine.access.strip",
    "tiny.OlmoeForCausalLM",  # build_model itself, where it isn't on the meta device
    "deepspeed.zero.Init",
    "deepspeed.initialize",
    "deepspeed.runtime.engine.DeepSpeedEngine._configure_optimizer",
    "deepspeed.runtime.engine.DeepSpeedEngine._configure_lr_scheduler",
    "ds_sparkling.engine.new_engine.parameter_counts",
    "ds_sparkling.engine.new_engine.hook_step",
    "ds_sparkling.engine.new_engine.hook_checkpoints",
    "ds_sparkling.engine.new_engine.introduce_run",
    "ds_sparkling.engine.optimizers.zero3.Zero3.begin_writing",
    "ds_sparkling.engine.access.make_states",
    "ds_sparkling.engine.move_shards.Widener",
    "ds_sparkling.engine.move_shards._fill",
    "ds_sparkling.engine.exchange.Exchange._post",
    "ds_sparkling.engine.exchange.dist.all_to_all_single",
    "ds_sparkling.engine.optimizers.zero3.Zero3.finish_writing",
    "ds_sparkling.engine.carry_over.Carried.restore",
    "ds_sparkling.engine.transition.mark_growth",
)
#: What fails on the second rank while it saves by itself.
SAVING = (
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.save",
    "deepspeed.runtime.engine.DeepSpeedEngine._create_zero_checkpoint_files",
    "deepspeed.runtime.engine.DeepSpeedEngine._get_zero_ckpt_name",
)
ALL = os.environ.get("ONE_RANK_FAILURES") == "all"
SOME = {
    "ds_sparkling.engine.planning.build_on_meta",
    "ds_sparkling.engine.transition.Carried",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.save",
    "tiny.OlmoeForCausalLM",
    "deepspeed.runtime.engine.DeepSpeedEngine._configure_optimizer",
    "ds_sparkling.engine.move_shards._fill",
}


def fail_on_second_rank(patch: pytest.MonkeyPatch, place: str) -> None:
    """Have what is at ``place`` raise; OlmoeForCausalLM only where it gets storage."""
    import torch

    if torch.distributed.get_rank() != 1 or place == "nowhere":
        return

    def broken(*_args: object, **_kwargs: object) -> Any:
        if place.startswith("tiny.") and torch.empty(0).is_meta:
            return plain(*_args, **_kwargs)
        raise OSError("injected")

    *owners, name = place.split(".")
    plain: Any = getattr(tiny, name, None)
    patch.setattr(".".join([*owners, name]), broken)


def attempt(action: Callable[[], Any], place: str) -> tuple[str, str, float]:
    """Kind and text of the error of ``action``, and how long it took."""
    began = time.monotonic()
    with in_a_hurry(), pytest.MonkeyPatch.context() as patch:
        fail_on_second_rank(patch, place)
        try:
            action()
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


def growing(place: str, checkpoints: str, lost: bool) -> tuple[tuple[str, str, float], list[float], str | None]:
    import ds_sparkling

    engine = tiny.initialize(tiny.Case(), checkpoint=checkpoints)
    tiny.train(engine, 2)
    heard = attempt(lambda: ds_sparkling.grow(engine, JOINT), place)
    latest = Path(checkpoints) / "latest"
    return heard, [] if lost else tiny.train(engine, 4), latest.read_text() if latest.exists() else None


def saving(place: str, checkpoints: str) -> tuple[tuple[str, str, float], str]:
    engine = tiny.initialize(tiny.Case())
    tiny.train(engine, 1)
    engine.save_checkpoint(checkpoints)
    heard = attempt(lambda: engine.save_checkpoint(checkpoints, "second"), place)
    return heard, (Path(checkpoints) / "latest").read_text()


def growing_apart(how: str) -> tuple[str, str, float]:
    """What ranks hear when the second one does something else."""
    from dataclasses import replace

    import torch

    import ds_sparkling

    second = torch.distributed.get_rank() == 1
    engine = tiny.initialize(tiny.Case(sparkling={"patience": 2}))
    widths = dict(JOINT)
    if second and how == "to other widths":
        widths["hidden_size"] = 18
    if second and how == "to another model":
        build = engine.sparkling.build_model

        def deeper(**widths: int) -> Any:
            model = build(**widths)
            model.layers.append(torch.nn.Linear(2, 2))
            return model

        engine.sparkling = replace(engine.sparkling, build_model=deeper)
    if second and how == "to the same model in another order":
        plain = engine.sparkling.build_model

        def reordered(**widths: int) -> Any:
            model = plain(**widths)
            model.norm = model._modules.pop("norm")
            model.embed_tokens = model._modules.pop("embed_tokens")
            return model

        engine.sparkling = replace(engine.sparkling, build_model=reordered)
    if second and how == "not at all":
        time.sleep(8)
        return "GrowthError", "", 0.0
    return attempt(lambda: ds_sparkling.grow(engine, widths), "nowhere")


def starting_apart(case: tiny.Case, second: tiny.Case) -> tuple[str, str, float]:
    import torch

    return attempt(lambda: tiny.initialize(second if torch.distributed.get_rank() == 1 else case), "nowhere")


def undisturbed() -> list[float]:
    engine = tiny.initialize(tiny.Case())
    tiny.train(engine, 2)
    return tiny.train(engine, 4)


def check_the_same(heard: list[tuple[str, str, float]]) -> None:
    kinds, texts, times = zip(*heard, strict=True)
    assert len(set(texts)) == len(set(kinds)) == 1, heard
    assert "rank 1" in texts[0]
    assert "injected" in texts[0]
    assert max(times) < 30


def chosen(places: tuple[str, ...]) -> list[str]:
    return [place for place in places if ALL or place in SOME]


@pytest.mark.parametrize("place", chosen(UNTOUCHED))
def test_a_failure_before_the_engine_is_touched_leaves_it_as_it_was(place: str, workers: Pool, tmp_path: Path) -> None:
    answers = workers(2).run(growing, place, str(tmp_path), False)
    check_the_same([heard for heard, *_ in answers])
    assert [losses for _, losses, _ in answers] == workers(2).run(undisturbed)
    assert [latest for *_, latest in answers] == [None, None]


@pytest.mark.parametrize("place", chosen(LOST))
def test_a_failure_that_costs_the_engine_names_the_way_out(place: str, workers: Pool, tmp_path: Path) -> None:
    answers = workers(2).run(growing, place, str(tmp_path), True)
    workers(2).stop()  # their collectives may be out of step
    check_the_same([heard for heard, *_ in answers])
    assert f"{tmp_path}/global_step2-before-growth1" in answers[0][0][1]
    assert answers[0][2] == "global_step2-before-growth1"


@pytest.mark.parametrize("place", chosen(SAVING))
def test_a_failure_while_saving_leaves_the_checkpoint_before_as_the_latest(
    place: str, workers: Pool, tmp_path: Path
) -> None:
    answers = workers(2).run(saving, place, str(tmp_path))
    workers(2).stop()
    check_the_same([heard for heard, _ in answers])
    assert [latest for _, latest in answers] == ["global_step1"] * 2


def saving_apart(checkpoints: str) -> tuple[tuple[str, str, float], bool]:
    import torch

    engine = tiny.initialize(tiny.Case())
    tiny.train(engine, 1)
    first = torch.distributed.get_rank() == 0
    heard = attempt(lambda: engine.save_checkpoint(checkpoints, save_latest=first), "nowhere")
    engine.save_checkpoint(checkpoints)
    return heard, (Path(checkpoints) / "latest").exists()


def test_ranks_that_save_apart_are_told_and_go_on(workers: Pool, tmp_path: Path) -> None:
    for (kind, text, _), saved in workers(2).run(saving_apart, str(tmp_path)):
        assert kind == "GrowthError"
        assert "save_latest=False" in text
        assert saved


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("to other widths", "'hidden_size': 18"),
        ("to another model", "layers.1.bias is trained torch.float32 (2,) here, and missing on rank 0"),
        ("to the same model in another order", "is tensor 1 here, and tensor 2 on rank 0"),
        ("not at all", "of 2 ranks, 1 didn't come"),
    ],
)
def test_ranks_that_grow_apart_are_told(how: str, says: str, workers: Pool) -> None:
    answers = workers(2).run(growing_apart, how)
    workers(2).stop()
    for kind, text, seconds in answers[: 1 if how == "not at all" else 2]:
        assert kind == ("PlanError" if "model" in how else "GrowthError")
        assert says in text
        assert seconds < 60


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (tiny.Case(stage=1), "zero_optimization.stage is 1 here, and 3 on rank 0"),
        (tiny.Case(accumulation=2), "gradient_accumulation_steps is 2 here, and 1 on rank 0"),
    ],
    ids=str,
)
def test_ranks_with_other_configs_are_told(second: tiny.Case, says: str, workers: Pool) -> None:
    for kind, text, seconds in workers(2).run(starting_apart, tiny.Case(), second):
        assert kind == "ConfigError"
        assert says in text
        assert seconds < 60
