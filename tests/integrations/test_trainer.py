"""What the Trainer's callback refuses, and does to a grown model; growing inside a Trainer is tests/examples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ds_sparkling.errors import ConfigError, UnsupportedError
from ds_sparkling.integrations.trainer import SparklingCallback


class Model(nn.Module):
    """A model that remembers what was asked of it."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=pad, eos_token_id=pad)
        self.checkpointing: Any = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        self.checkpointing = gradient_checkpointing_kwargs


def trainer(**arguments: Any) -> Any:
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()), prepare=None)
    settings = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None, **arguments}
    return SimpleNamespace(
        accelerator=accelerator, args=SimpleNamespace(**settings), model=Model(3), model_wrapped=None
    )


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "use_liger_kernel"])
def test_what_a_growth_would_lose_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        SparklingCallback(trainer(**{name: 5.0}), Model)


def test_a_checkpoint_that_is_no_path_is_refused_with_the_way_to_find_it() -> None:
    with pytest.raises(ConfigError, match="get_last_checkpoint"):
        SparklingCallback(trainer(), Model, checkpoint=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("grows", [False, True])
def test_a_grown_model_is_set_up_as_the_trainer_did_and_the_best_is_forgotten(
    grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    callback = SparklingCallback(made, Model)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    grown, growths = Model(0), [1]
    made.model_wrapped = SimpleNamespace(
        module=grown, sparkling=SimpleNamespace(record=SimpleNamespace(growths=growths))
    )
    monkeypatch.setattr("ds_sparkling.grow_if_due", lambda _engine: growths.append(2) if grows else None, raising=False)
    state = SimpleNamespace(best_metric=1.0, best_model_checkpoint=None, best_global_step=4, is_world_process_zero=True)
    callback.on_step_begin(None, state, None)
    assert grown.checkpointing == ({"use_reentrant": False} if grows else None)
    assert grown.config.pad_token_id == (3 if grows else 0)
    assert (state.best_metric, state.best_global_step) == ((None, None) if grows else (1.0, 4))
