"""Models that take more than token ids are tried on inputs that the user gives, by value or by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import Workers
from ds_sparkling.check.command import main as check_growth
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.spec.config import SparklingConfig, sparkling_config
from ds_sparkling.spec.record import GrowthRecord

UNKNOWN = "whether growing keeps the model's function is not known"


class Patches(nn.Module):
    """A classifier of patches [B, P, 12]; one that ``multiplies`` scales what it computes by its own width."""

    def __init__(self, hidden: int, multiplies: bool) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(12, hidden), nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 5, bias=False)
        self.factor = 1 / hidden if multiplies else 1.0

    def forward(self, patches: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(self.project(patches)).mean(1)) * self.factor
        return logits if labels is None else nn.functional.cross_entropy(logits.tanh(), labels)


def build(hidden: int = 8) -> nn.Module:
    return Patches(hidden, multiplies=False)


def build_multiplying(hidden: int = 8) -> nn.Module:
    return Patches(hidden, multiplies=True)


def images() -> dict[str, Tensor]:
    return {"patches": torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))}


def nothing() -> None:
    raise KeyError("no images")


@pytest.mark.parametrize(("name", "given"), [(f"{__name__}:images", None), (None, images())], ids=["name", "value"])
def test_what_token_ids_cannot_try_given_inputs_can(name: str | None, given: Any, caplog: Any) -> None:
    from ds_sparkling.engine.planning import knowing

    growths, config = [{"hidden": 16}], SparklingConfig(inputs=name)
    with caplog.at_level(logging.WARNING):
        assert knowing(GrowthRecord({}, {}), growths, build, config, given).tried == ("hidden",)
        assert not caplog.messages
        assert knowing(GrowthRecord({}, {}), growths, build, SparklingConfig()).axes
    assert UNKNOWN in caplog.messages[0]
    with pytest.raises(PlanError, match="growing hidden would change the model's function"):
        knowing(GrowthRecord({}, {}), growths, build_multiplying, config, given)


@pytest.mark.parametrize("name", [f"{__name__}:nothing", f"{__name__}:absent", "no_such_module:images"])
def test_a_name_that_gives_no_inputs_is_an_error_that_says_it(name: str) -> None:
    from ds_sparkling.engine.planning import knowing

    with pytest.raises(ConfigError, match=name):
        knowing(GrowthRecord({}, {}), [{"hidden": 16}], build, SparklingConfig(inputs=name))


def test_the_key_is_a_name() -> None:
    with pytest.raises(ConfigError, match=r"sparkling\.inputs must be module:function"):
        sparkling_config({"sparkling": {"inputs": ["images"]}})


def test_the_check_takes_them(capsys: Any) -> None:
    arguments = ["--model", f"{__name__}:build", "--widths", "hidden=16", "--no-picture", "--json"]
    check_growth([*arguments, "--inputs", f"{__name__}:images"])
    assert json.loads(capsys.readouterr().out)["logit_difference"] < 1e-9


def grown(checkpoint: str) -> list[tuple[float, list[str]]]:
    """Loss after a growth less that before, and what was logged until then, for an own engine and an adopted one."""
    import deepspeed

    import ds_sparkling
    import tiny

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "sparkling": {"stages": [{"at_step": 1, "widths": {"hidden": 16}}], "checkpoint_before_growth": False},
    }
    batch, labels = images()["patches"], torch.tensor([1, 2])
    seen = []
    for adopted in (False, True):
        logged = tiny.Logged()
        if adopted:
            engine, *_ = deepspeed.initialize(model=build(), config=config)
            ds_sparkling.adopt(engine, build, inputs=images())
        else:
            engine = ds_sparkling.initialize(build, config, inputs=images())
        engine.backward(engine(batch, labels))
        engine.step()
        before = float(engine(batch, labels))
        engine = ds_sparkling.grow_if_due(engine)
        seen.append((float(engine(batch, labels)) - before, logged.messages))
        logged.close()
    return seen


def test_engines_take_them(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    for answers in workers(2).run(grown, str(tmp_path)):
        for change, logged in answers:
            assert abs(change) < 1e-5
            assert not [message for message in logged if UNKNOWN in message]
