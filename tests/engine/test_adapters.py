"""The table of DeepSpeed's optimizers: each class finds its adapter, and one that nobody knows is named."""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_sparkling.engine import optimizers
from ds_sparkling.engine.optimizers import ADAPTERS, adapter_of
from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.errors import UnsupportedError


def engine_with(kind: type) -> Any:
    """What an engine is to the table."""
    return SimpleNamespace(optimizer=object.__new__(kind))


@pytest.mark.parametrize("kind", ADAPTERS, ids=lambda kind: str(kind.__name__))
def test_a_class_and_what_is_derived_from_it_find_their_adapter(kind: type) -> None:
    derived = type("Derived", (kind,), {})
    assert type(adapter_of(engine_with(kind))) is ADAPTERS[kind]
    assert type(adapter_of(engine_with(derived))) is ADAPTERS[kind]


def test_any_torch_optimizer_is_its_own_base() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    engine: Any = SimpleNamespace(optimizer=optimizer)
    assert adapter_of(engine).base is optimizer


def test_an_unknown_optimizer_is_named() -> None:
    class Novel:
        pass

    with pytest.raises(UnsupportedError, match=r"Novel.*DeepSpeedZeroOptimizer_Stage3.*Optimizer"):
        adapter_of(engine_with(Novel))
    nothing: Any = SimpleNamespace(optimizer=None)
    with pytest.raises(UnsupportedError, match="no optimizer"):
        adapter_of(nothing)


def test_every_adapter_of_the_folder_is_in_the_table() -> None:
    found = set()
    for module in pkgutil.iter_modules(optimizers.__path__, f"{optimizers.__name__}."):
        for member in vars(importlib.import_module(module.name)).values():
            if isinstance(member, type) and issubclass(member, OptimizerAdapter) and member is not OptimizerAdapter:
                found.add(member)
    assert found == set(ADAPTERS.values())
