"""What is put into an engine is listed, and comes out again: a plain DeepSpeedEngine is left, which trains as one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from distributed import Workers

Pool = Callable[[int], Workers]
JOINT = {"hidden_size": 12, "moe_intermediate_size": 10}
CASES = [tiny.Case(), tiny.Case(stage=2, bf16=True), tiny.Case(stage=0, ranks=1)]


def replaced_in(engine: Any) -> set[str]:
    """What of DeepSpeed's own methods the engine has of its own, beside those that DeepSpeed puts there."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    own = {name for name, value in vars(engine).items() if callable(value) and hasattr(DeepSpeedEngine, name)}
    kind = set() if type(engine) is DeepSpeedEngine else {"__class__"}
    return own | kind | ({"sparkling"} & set(vars(engine)))


def hooks_on(engine: Any) -> int:
    """How many hooks the module and its parameters have."""
    module = engine.module
    return (
        len(module._forward_pre_hooks)
        + len(module._forward_hooks)
        + sum(len(param._post_accumulate_grad_hooks or ()) for param in module.parameters())
    )


def plain_engine(case: tiny.Case) -> Any:
    import deepspeed

    enabled = case.stage == 3
    with deepspeed.zero.Init(config_dict_or_path=case.config, enabled=enabled):
        model = case.build_model()
    config = {key: value for key, value in case.config.items() if key != "sparkling"}
    return deepspeed.initialize(model=model, config=config)[0]


def unhooked_early(case: tiny.Case) -> tuple[list[float], list[float], dict[str, Any]]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_sparkling.engine.hooks import HOOKS, unhook

    plain = plain_engine(case)
    plain_replaced, plain_hooks = replaced_in(plain), hooks_on(plain)
    expected = tiny.train(plain, 5)
    engine = tiny.initialize(case)
    found: dict[str, Any] = {"replaced": replaced_in(engine) - plain_replaced, "listed": {h.attribute for h in HOOKS}}
    losses = tiny.train(engine, 2)
    step = vars(engine.lr_scheduler.optimizer).get("step")
    assert unhook(engine) is engine
    found["type"] = type(engine) is DeepSpeedEngine
    found["left"] = replaced_in(engine) - plain_replaced
    found["hooks"] = hooks_on(engine) - plain_hooks
    found["scheduler"] = type(engine.lr_scheduler).__name__, type(plain.lr_scheduler).__name__
    found["step"] = vars(engine.lr_scheduler.optimizer).get("step") is not step
    return losses + tiny.train(engine, 5), expected, found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unhooked_engine_is_plain_and_trains_on_as_one(case: tiny.Case, workers: Pool) -> None:
    for losses, expected, found in workers(case.ranks).run(unhooked_early, case):
        assert losses == expected
        assert {"step", "backward", "save_checkpoint", "load_checkpoint", "sparkling"} <= found["replaced"] | {
            "backward"
        }
        assert found["replaced"] <= found["listed"]
        assert found["type"]
        assert found["step"]
        assert not found["left"]
        assert found["hooks"] == 0
        assert found["scheduler"][0] == found["scheduler"][1]


def unhooked_after_growth(directory: str) -> tuple[str, bool, int]:
    import ds_sparkling
    from ds_sparkling.engine.hooks import unhook
    from ds_sparkling.errors import GrowthError

    engine = tiny.initialize(tiny.Case())
    tiny.train(engine, 2)
    engine = unhook(ds_sparkling.grow(engine, JOINT))
    losses = tiny.train(engine, 4)
    engine.save_checkpoint(directory, "plain")
    try:
        ds_sparkling.grow(engine, {"hidden_size": 18})
    except GrowthError as error:
        return str(error), (Path(directory) / "plain" / "ds_sparkling.json").exists(), len(losses)
    return "", True, 0


def test_a_grown_engine_is_unhooked_too_and_grows_no_more(workers: Pool, tmp_path: Path) -> None:
    for error, recorded, steps in workers(2).run(unhooked_after_growth, str(tmp_path)):
        assert "can't grow" in error
        assert not recorded
        assert steps == 2


def test_hooks_are_of_attributes_that_are_there() -> None:
    """A version of DeepSpeed, torch or transformers that calls one otherwise shows here."""
    from ds_sparkling.engine.hooks import HOOKS

    own = {"sparkling", "lr_scheduler"}  # attributes of an engine and not of its class
    for hook in HOOKS:
        module, _, name = hook.owner.rpartition(".")
        owner = getattr(importlib.import_module(module), name)
        assert hook.attribute in own or hasattr(owner, hook.attribute), hook
        assert hook.why
        assert hook.lasts in ("run", "block")


def test_what_is_replaced_for_a_block_is_back_after_it_even_if_it_fails() -> None:
    from ds_sparkling.engine.hooks import Hook

    class Owner:
        @staticmethod
        def inherited() -> str:
            return "its own"

    class Heir(Owner):
        pass

    hook = Hook(owner="Owner", attribute="inherited", why="a test")
    kept = vars(Owner)["inherited"]
    thing = Heir()
    for owner in (Owner, Heir, thing):
        fail_within(hook, owner)
        assert thing.inherited() == "its own"
    assert vars(Owner)["inherited"] is kept
    assert "inherited" not in vars(Heir)
    assert "inherited" not in vars(thing)


def fail_within(hook: Any, owner: Any) -> None:
    seen = []
    with suppress(OSError), hook.during(owner, lambda: "replaced"):
        seen.append(owner.inherited())
        raise OSError
    assert seen == ["replaced"]


def test_undoing_goes_backwards() -> None:
    from ds_sparkling.engine.hooks import Hook, unhook

    engine: Any = SimpleNamespace(step="plain")
    hook = Hook(owner="Engine", attribute="step", why="a test")
    hook.install(engine, "first")
    hook.install(engine, "second")
    assert engine.step == "second"
    assert vars(unhook(engine)) == {"step": "plain"}
