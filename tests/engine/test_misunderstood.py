"""What is called as DeepSpeed's own would be, and isn't meant so, says how it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from distributed import Workers
from ds_sparkling.discovery.build import require_factory
from ds_sparkling.errors import ConfigError, UnsupportedError
from ds_sparkling.integrations.accelerate import growing
from ds_sparkling.spec.unsupported import refuse_compiled
from tiny import Case


class Wrapper(nn.Module):
    """Looks like ``torch.compile``'s, which workers have switched off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class Compiled:
    """Builds the tiny model with a wrapper like ``torch.compile``'s around it, or around a part of it."""

    def __init__(self, case: Case, part: str) -> None:
        self.case, self.part = case, part

    def __call__(self, hidden_size: int = 6, moe_intermediate_size: int = 5) -> nn.Module:
        model = self.case.build_model(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size)
        if not self.part:
            return Wrapper(model)
        model.set_submodule(self.part, Wrapper(model.get_submodule(self.part)))
        return model


def compiled(case: Case) -> list[str]:
    """What ``initialize`` and ``adopt`` say of models that ``build_model`` compiles."""
    import deepspeed

    import ds_sparkling

    said = []
    for part in ("", "layers.0"):
        build_model = Compiled(case, part)
        with pytest.raises(UnsupportedError) as refused:
            ds_sparkling.initialize(build_model, case.config)
        said.append(str(refused.value))
        engine, *_ = deepspeed.initialize(model=build_model(), config=case.config)
        with pytest.raises(UnsupportedError) as refused:
            ds_sparkling.adopt(engine, build_model)
        said.append(str(refused.value))
        engine.destroy()
    return said


def test_models_that_are_compiled_while_zero_3_partitions_them_are_refused(workers: Callable[[int], Workers]) -> None:
    """DeepSpeed's own end is a RecursionError."""
    for said in workers(2).run(compiled, Case(2, 3, sparkling={"check": False})):
        assert all("build_model calls torch.compile" in text and "engine.compile()" in text for text in said)
        assert ["the model itself" in text for text in said] == [True, True, False, False]
        assert ["(layers.0)" in text for text in said] == [False, False, True, True]


def test_what_torch_compile_makes_is_told_from_what_compiles_in_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    refuse_compiled(model)
    model[0].compile(backend="eager")
    refuse_compiled(model)
    with pytest.raises(UnsupportedError, match="itself"):
        refuse_compiled(torch.compile(model, backend="eager"))  # type: ignore[arg-type]


def unpacked(case: Case) -> list[str]:
    import deepspeed

    import ds_sparkling

    engine = tiny.initialize(case)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    said = []
    for held in (engine, ds_sparkling.grow(engine, {"hidden_size": 12})):
        for take in (lambda engine: list(engine), lambda engine: engine[0], _four):
            with pytest.raises(TypeError) as error:
                take(held)
            said.append(str(error.value))
    return said


def _four(engine: Any) -> None:
    _, _, _, _ = engine


def test_the_one_value_that_initialize_returns_explains_itself(workers: Callable[[int], Workers]) -> None:
    (said,) = workers(1).run(unpacked, Case(1, 0))
    assert len(said) == 6
    assert all("returns one value, the engine" in text and "engine.optimizer" in text for text in said)


@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, {"hidden_size": 2}], ids=["model", "nothing", "config"])
def test_a_model_in_the_place_of_what_builds_it_is_refused_with_the_way_to_pass_it(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a function .* pass lambda \*\*widths: (Linear|Model)\("):
        require_factory(given)
    with pytest.raises(ConfigError, match="must be a function"):
        growing(object(), given)
