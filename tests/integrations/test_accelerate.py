"""What ``growing`` refuses before an engine is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn

from ds_sparkling.errors import ConfigError, UnsupportedError
from ds_sparkling.integrations.accelerate import growing


def build_model(width: int = 2) -> nn.Module:
    return nn.Linear(width, width)


class Accelerator:
    """The part of accelerate's that ``growing`` touches; what is prepared comes back as it is."""

    def __init__(self, plugin: Any) -> None:
        self.state = SimpleNamespace(deepspeed_plugin=plugin)

    def prepare(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


def test_only_deepspeed_grows() -> None:
    with pytest.raises(UnsupportedError, match="pass a deepspeed_plugin"):
        growing(Accelerator(None), build_model)


def test_a_scheduler_that_holds_its_optimizer_is_refused() -> None:
    accelerator = growing(Accelerator(object()), build_model)
    optimizer = torch.optim.AdamW(build_model().parameters())
    with pytest.raises(ConfigError, match=r"LambdaLR anew: put the scheduler into the DeepSpeed config"):
        accelerator.prepare(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


def test_what_is_no_training_engine_is_left_alone() -> None:
    accelerator = growing(Accelerator(object()), build_model)
    model, optimizer = build_model(), DummyOptim([])
    assert accelerator.prepare(model) is model
    assert accelerator.prepare(optimizer, DummyScheduler(optimizer))[0] is optimizer
