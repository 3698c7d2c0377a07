"""Building models without storage, and the widths to start with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_sparkling.errors import PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.probe import base_widths, build_on_meta

H, I = "hidden_size", "moe_intermediate_size"  # noqa: E741 - the paper's letters


def build_olmoe(hidden_size: int = 16, moe_intermediate_size: int | None = None) -> OlmoeForCausalLM:
    inner: dict[str, Any] = {} if moe_intermediate_size is None else {I: moe_intermediate_size}
    return OlmoeForCausalLM(
        OlmoeConfig(vocab_size=11, num_hidden_layers=1, num_experts=8, hidden_size=hidden_size, **inner)
    )


def test_a_model_on_meta_has_no_storage_and_leaves_the_default_device() -> None:
    model = build_on_meta(build_olmoe, {H: 8})
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_model_that_does_not_build_is_named_with_its_widths() -> None:
    def build_model(width: int) -> nn.Module:
        raise ValueError("too wide for us")

    with pytest.raises(PlanError, match=r"width.*8.*ValueError: too wide for us"):
        build_on_meta(build_model, {"width": 8})
    with pytest.raises(PlanError, match=r"depth.*TypeError"):
        build_on_meta(build_model, {"depth": 4})
    assert torch.empty(1).device.type == "cpu"


def test_starting_widths_are_the_given_ones_then_defaults_then_the_config() -> None:
    inner = OlmoeConfig().moe_intermediate_size
    assert base_widths(build_olmoe, [H, I], None) == {H: 16, I: inner}
    assert base_widths(build_olmoe, [H, I], {I: 4}) == {H: 16, I: 4}
    assert base_widths(build_olmoe, [H, I], {H: 32}) == {H: 32, I: inner}
    assert base_widths(build_olmoe, [I], {H: 32}) == {H: 32, I: inner}


def test_given_widths_are_not_changed_and_no_model_is_built_for_them() -> None:
    def build_model(**widths: int) -> nn.Module:
        raise AssertionError("not needed")

    given = {"width": 4}
    found = base_widths(build_model, ["width"], given)
    assert found == given
    assert found is not given


def test_an_axis_without_any_width_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no starting width.*'depth'.*sparkling.widths"):
        base_widths(build_olmoe, ["depth"], None)
    with pytest.raises(PlanError, match="'width'"):
        base_widths(lambda width=None: nn.Linear(width or 4, 3), ["width"], None)
