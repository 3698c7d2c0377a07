"""Building models without storage, and the widths to start with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_sparkling.discovery.build import base_widths, build_on_meta, check_wide
from ds_sparkling.errors import PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.axes import FIXED, Dim, ParamAxes, Role

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
    with pytest.raises(PlanError, match=r"takes no 'widht' by name; did you mean 'width'\? build_model takes"):
        build_on_meta(build_model, {"widht": 4})
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
    with pytest.raises(PlanError, match=r"did you mean 'hidden_size'.*build_model takes.*in model.config: "):
        base_widths(build_olmoe, ["hiden_size"], None)
    with pytest.raises(PlanError, match="'width'"):
        base_widths(lambda width=None: nn.Linear(width or 4, 3), ["width"], None)


def test_widths_that_only_grow_by_one_ratio_are_named_with_the_values_that_would_do() -> None:
    """The shape of keys follows from the hidden size over the heads."""

    def build_model(hidden: int = 16, heads: int = 4, groups: int = 2) -> nn.Module:
        return nn.ModuleDict({"k": nn.Linear(3, hidden // heads * groups), "w": nn.Linear(hidden, heads)})

    widths = {"hidden": 16, "heads": 4, "groups": 2}
    axes = {
        "k.weight": ParamAxes((Dim("groups", Role.FAN_OUT, block=4), FIXED)),
        "k.bias": ParamAxes((Dim("groups", Role.FAN_OUT, block=4),)),
        "w.weight": ParamAxes((Dim("heads", Role.FAN_OUT), Dim("hidden", Role.FAN_IN))),
        "w.bias": ParamAxes((Dim("heads", Role.FAN_OUT),)),
    }
    check_wide(build_model, axes, widths, {"hidden": 32, "heads": 8, "groups": 4})
    named = "k.weight would become.*by the same ratio: with hidden 32 that is heads 8, groups 4"
    with pytest.raises(PlanError, match=named):
        check_wide(build_model, axes, widths, {"hidden": 32, "heads": 4 + 2})


def test_a_dimension_of_two_axes_is_checked_when_one_of_them_grows() -> None:
    parts = Dim(parts=(Dim("a", Role.FAN_OUT), Dim("b", Role.FAN_OUT)))
    axes = {"weight": ParamAxes((parts, FIXED)), "bias": ParamAxes((parts,))}
    check_wide(lambda a, b: nn.Linear(3, a + b), axes, {"a": 2, "b": 3}, {"a": 4})
