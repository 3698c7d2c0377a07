"""The plan: what it refuses, what it says about a model's size, and that nothing changes it once it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch

from ds_sparkling.discovery.build import base_widths, build_on_meta
from ds_sparkling.discovery.reading import probe
from ds_sparkling.errors import PlanError
from ds_sparkling.growth import GrowthPlan, GrowthTables, make_plan
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.growth.scaling import AxisGrowth
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.strategy import Init, NewIndex, OptimizerState, Scaling, Strategy

Shapes = dict[str, tuple[int, ...]]

WIDTHS = {"hidden": 4, "inner": 3}
AXES = {
    "embed.weight": ParamAxes((FIXED, Dim("hidden", Role.FAN_OUT))),
    "experts.gate_up_proj": ParamAxes(
        (FIXED, Dim("inner", Role.FAN_OUT, segments=2, alive=(0,)), Dim("hidden", Role.FAN_IN)), stacked_experts=True
    ),
    "experts.down_proj": ParamAxes(
        (FIXED, Dim("hidden", Role.FAN_OUT), Dim("inner", Role.FAN_IN)), stacked_experts=True
    ),
    "out.weight": ParamAxes((Dim("hidden", Role.FAN_OUT, block=5), FIXED)),
    "norm.weight": ParamAxes((Dim("hidden", Role.GAIN),), norm=Norm.RMS, head_gain=True),
    "q_norm.weight": ParamAxes((FIXED,)),
    "scale": ParamAxes(()),
}
SHAPES: Shapes = {
    "embed.weight": (11, 4),
    "experts.gate_up_proj": (8, 6, 4),
    "experts.down_proj": (8, 4, 3),
    "out.weight": (20, 6),
    "norm.weight": (4,),
    "q_norm.weight": (6,),
    "scale": (),
}
AFTER: Shapes = {
    "embed.weight": (11, 6),
    "experts.gate_up_proj": (8, 14, 6),
    "experts.down_proj": (8, 6, 7),
    "out.weight": (30, 6),
    "norm.weight": (6,),
    "q_norm.weight": (6,),
    "scale": (),
}
WIDE = {"hidden": 6, "inner": 7}
#: The same without units of several entries, which make a normed axis rigid.
SUPPLE: dict[str, Any] = {
    "axes": {**AXES, "out.weight": ParamAxes((Dim("hidden", Role.FAN_OUT), FIXED))},
    "shapes": {**SHAPES, "out.weight": (4, 6)},
}
BLOCKS = "it isn't only the width that a norm divides by the RMS of"


def plan(**changes: Any) -> GrowthPlan:
    arguments: dict[str, Any] = {
        "shapes": SHAPES,
        "axes": AXES,
        "before": WIDTHS,
        "after": WIDE,
        "strategy": Strategy(),
        "number": 2,
        "active_share": 0.25,
        **changes,
    }
    return make_plan(**arguments)


# -- what it holds -------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_plan_at_its_grown_shape_in_the_models_order() -> None:
    made = plan()
    assert [param.name for param in made.params] == list(SHAPES)
    assert {param.name: param.before for param in made.params} == SHAPES
    assert {param.name: param.after for param in made.params} == AFTER
    assert {param.name: param.axes for param in made.params} == AXES
    assert {param.name for param in made.params if not param.grows} == {"q_norm.weight", "scale"}
    for param in made.params:
        assert param.new_elements == math.prod(AFTER[param.name]) - math.prod(SHAPES[param.name])
        assert made.param(param.name) is param


def test_only_the_axes_of_the_stage_grow() -> None:
    made = plan(after={"inner": 7})
    assert [param.name for param in made.params if param.grows] == ["experts.gate_up_proj", "experts.down_proj"]
    assert made.param("experts.gate_up_proj").after == (8, 14, 4)
    assert made.growths == (AxisGrowth("inner", 3, 7, normed=False),)
    assert GrowthTables(made).scales.keys() == {"inner"}


def test_an_axis_is_normed_if_a_gain_carries_it() -> None:
    assert plan(**SUPPLE).growths == (AxisGrowth("hidden", 4, 6, normed=True), AxisGrowth("inner", 3, 7, normed=False))


def test_what_makes_a_normed_axis_rigid_is_told() -> None:
    """At a ratio that isn't whole, its units can't each be made as loud as their copies ask for."""
    by_axis = {growth.axis: growth for growth in plan().growths}
    assert by_axis["hidden"] == AxisGrowth("hidden", 4, 6, normed=True, rigid=BLOCKS)
    assert not by_axis["inner"].rigid  # of two segments, but no norm divides by its RMS
    layer_norm = {**SUPPLE["axes"], "norm.weight": ParamAxes((Dim("hidden", Role.GAIN),), norm=Norm.LAYER)}
    assert "mean" in plan(**{**SUPPLE, "axes": layer_norm}).growths[0].rigid


def test_an_axis_that_no_parameter_carries_grows_along_at_the_ratio_of_one_that_they_do() -> None:
    """A model may take both a width and what follows from it (a hidden size of heads times their size)."""
    silent = {"before": {**WIDTHS, "heads": 2}, "after": {"hidden": 8, "heads": 4}}
    made = plan(**SUPPLE, **silent)
    assert made.growths == (
        AxisGrowth("hidden", 4, 8, normed=True, rigid="heads grows with it"),
        AxisGrowth("heads", 2, 4, normed=False),
    )
    assert made.params == plan(**SUPPLE, after={"hidden": 8}).params


def test_shapes_may_be_torch_sizes() -> None:
    """And come back as plain tuples: a plan is compared, hashed and saved."""
    sizes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    made = plan(shapes=sizes)
    assert made == plan()
    assert all(type(param.before) is tuple and type(param.after) is tuple for param in made.params)


def test_parameters_are_counted_in_total_and_per_token() -> None:
    def count(shapes: Shapes, expert_share: float) -> int:
        return round(sum((expert_share if "experts" in n else 1) * math.prod(shape) for n, shape in shapes.items()))

    assert plan().parameters() == (count(SHAPES, 1), count(AFTER, 1))
    assert plan().parameters(active=True) == (count(SHAPES, 0.25), count(AFTER, 0.25))


def test_compute_saved_is_eq_29() -> None:
    """1 - (N_small D_e + N_large (D - D_e)) / (N_large D), with N per token and D_e = fraction x D."""
    small, large = plan().parameters(active=True)
    assert small < large
    for fraction in (0.0, 0.3, 1.0):
        expected = 1 - (small * fraction + large * (1 - fraction)) / large
        assert plan().compute_saved(fraction) == pytest.approx(expected, abs=1e-12)


# -- what it refuses -----------------------------------------------------------------------------------------------


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"axes": without(AXES, "out.weight")}, ["'out.weight'", "every parameter"], id="unmatched"),
        pytest.param({"shapes": without(SHAPES, "out.weight")}, ["'out.weight'", "doesn't have"], id="absent"),
        pytest.param({"shapes": {**SHAPES, "out.weight": (21, 6)}}, ["out.weight", "(21, 6)", "hidden"], id="size"),
        pytest.param({"shapes": {**SHAPES, "out.weight": (20,)}}, ["out.weight", "(20,)"], id="too few dimensions"),
        pytest.param({"shapes": {**SHAPES, "scale": (4,)}}, ["scale", "(4,)"], id="too many dimensions"),
        pytest.param({"before": {"hidden": 4, "inner": 4}}, ["experts.gate_up_proj", "inner"], id="wrong width"),
        pytest.param({"after": {"hiden": 8}}, ["'hiden'", "hidden, inner"], id="unknown axis"),
        pytest.param({"before": {}, "after": {"hidden": 8}}, ["'hidden'", "none"], id="no axes at all"),
        pytest.param({"before": {**WIDTHS, "heads": 2}, "after": {"heads": 4}}, ["'heads'"], id="an axis of nothing"),
        pytest.param(
            {"before": {**WIDTHS, "heads": 2}, "after": {"hidden": 8, "heads": 6}},
            ["'heads'", "no parameter carries", "same ratio: to 4, not 6"],
            id="an axis of nothing at a ratio of its own",
        ),
        pytest.param({"after": {"hidden": 4}}, ["hidden", "4 -> 4"], id="equal"),
        pytest.param({"after": {"inner": 7, "hidden": 3}}, ["hidden", "4 -> 3"], id="shrinks"),
        pytest.param({"after": {"hidden": 0}}, ["hidden", "4 -> 0"], id="not positive"),
        pytest.param(
            {"strategy": Strategy(fan_out=Init.RANDOM, fan_in=Init.ZERO, scaling=Scaling.FUNCTION)},
            ["hidden", "random-zero"],
            id="a scaling that can't hold",
        ),
        pytest.param(
            {"strategy": Strategy(fan_out=Init.ZERO, scaling=Scaling.FUNCTION), "after": {"hidden": 8}},
            ["hidden", "zero-copy", BLOCKS, "copy-copy"],
            id="zero units on a rigid axis",
        ),
        pytest.param(
            {"strategy": Strategy(scaling=Scaling.FUNCTION)},
            ["hidden", "from 4 to 6", BLOCKS, "whole ratio"],
            id="an uneven ratio on a rigid axis",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        plan(**changes)
    for text in named:
        assert text in str(refused.value)


def test_function_scaling_holds_on_a_rigid_axis_at_whole_ratios() -> None:
    made = plan(strategy=Strategy(scaling=Scaling.FUNCTION), after={"hidden": 12})
    scales = GrowthTables(made).scales["hidden"]
    assert scales.fan_out.tolist() == [1.0] * 12
    assert scales.fan_in.tolist() == [1 / 3] * 12


# -- groups --------------------------------------------------------------------------------------------------------

#: Four query heads of two rows that share two key/value heads.
HEADS_AXES = {
    "query": ParamAxes((Dim("heads", Role.FAN_OUT, block=2, groups="shared"), FIXED)),
    "key": ParamAxes((Dim("shared", Role.FAN_OUT, block=2), FIXED)),
}
HEADS: dict[str, Any] = {
    "shapes": {"query": (8, 3), "key": (4, 3)},
    "axes": HEADS_AXES,
    "before": {"heads": 4, "shared": 2},
}


@pytest.mark.parametrize(
    ("after", "groups"),
    [({"heads": 8}, (2, 2)), ({"heads": 8, "shared": 4}, (2, 4)), ({"heads": 18, "shared": 6}, (2, 6))],
)
def test_an_axis_knows_its_groups_before_and_after(after: dict[str, int], groups: tuple[int, int]) -> None:
    growths = {growth.axis: growth for growth in plan(**HEADS, after=after).growths}
    assert growths["heads"].groups == groups
    assert all(growth.groups == (1, 1) for axis, growth in growths.items() if axis != "heads")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"after": {"shared": 4}}, ["shared", "groups of heads", "together"], id="groups alone"),
        pytest.param({"before": {"heads": 4}, "after": {"heads": 8}}, ["heads", "'shared'"], id="unknown groups"),
        pytest.param({"after": {"heads": 6, "shared": 4}}, ["heads", "2 -> 4 groups", "parted"], id="no equal parts"),
        pytest.param({"after": {"heads": 7}}, ["heads", "4 -> 7", "parted"], id="no equal parts of old groups"),
        pytest.param({"after": {"heads": 6, "shared": 6}}, ["heads", "2 -> 6 groups", "fewer"], id="fewer in each"),
        pytest.param(
            {
                "axes": {**HEADS_AXES, "out": ParamAxes((FIXED, Dim("heads", Role.FAN_IN, block=2)))},
                "shapes": {**HEADS["shapes"], "out": (3, 8)},
                "after": {"heads": 8},
            },
            ["heads", "grouped in different ways", "(1, 1)", "(2, 2)"],
            id="grouped here and not there",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(PlanError) as refused:
        plan(**{**HEADS, **changes})
    for text in named:
        assert text in str(refused.value)


def test_groups_may_be_a_number() -> None:
    axes = {"query": ParamAxes((Dim("heads", Role.FAN_OUT, block=2, groups=2), FIXED))}
    made = plan(shapes={"query": (8, 3)}, axes=axes, before={"heads": 4}, after={"heads": 6})
    assert made.growths == (AxisGrowth("heads", 4, 6, normed=False, groups=(2, 2)),)
    assert pickle.loads(pickle.dumps(made)) == made


def test_many_unmatched_parameters_are_named_and_counted() -> None:
    with pytest.raises(PlanError, match=r"'embed\.weight', 'experts\.gate_up_proj', 'experts\.down_proj' and 4 more"):
        plan(axes={})


def test_a_parameter_that_is_not_in_the_plan_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"'lm_head\.weight'"):
        plan().param("lm_head.weight")


# -- frozen and portable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(),
        Strategy(
            fan_out=Init.RANDOM,
            fan_in=Init.ZERO,
            norm=Init.RANDOM,
            scaling=Scaling.NONE,
            optimizer_state=OptimizerState.DROP,
            seed=7,
        ),
        Strategy(vocabulary=NewIndex.RANDOM),
        Strategy(
            fan_out=Init.ZERO,
            fan_in=Init.COPY,
            norm=Init.COPY,
            scaling=Scaling.FUNCTION,
            optimizer_state=OptimizerState.ASYMMETRIC_RESET_SCALED,
            seed=-1,
        ),
    ],
)
def test_a_plan_reaches_other_processes(strategy: Strategy) -> None:
    made = plan(strategy=strategy, active_share=1 / 3, **SUPPLE)
    loaded = pickle.loads(pickle.dumps(made))
    assert loaded == made
    assert hash(loaded) == hash(made)
    assert plan_in_words(loaded) == plan_in_words(made)


def test_plans_that_differ_in_any_part_are_not_equal() -> None:
    variants = [
        plan(),
        plan(number=3),
        plan(active_share=0.5),
        plan(strategy=Strategy(seed=1)),
        plan(after={"hidden": 6}),
        plan(axes={**AXES, "norm.weight": ParamAxes(AXES["norm.weight"].dims, norm=Norm.RMS)}),
    ]
    loaded = [pickle.loads(pickle.dumps(made)) for made in variants]
    assert len(set(loaded)) == len(variants)
    assert len({json.dumps(made.to_dict()) for made in variants}) == len(variants)


def test_a_plan_can_not_be_changed() -> None:
    made = plan()
    made.param("norm.weight")  # fills the plan's own look-up table, which must not count as a part of it
    for target, attribute in (
        (made, "number"),
        (made.growths[0], "after"),
        (made.params[0], "after"),
        (made.params[0].axes, "dims"),
        (made.params[0].axes.dims[1], "axis"),
        (made.strategy, "seed"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, attribute, 1)
    assert made == plan()
    assert hash(made) == hash(plan())


def test_changing_a_plans_dict_does_not_change_the_plan() -> None:
    made = plan()
    data = made.to_dict()
    data["growths"][0]["after"] = 999
    data["params"][0]["after"][1] = 999
    data["params"][0]["axes"]["dims"][1]["block"] = 999
    data["strategy"]["init"]["fan_out"] = "random"
    assert made == plan()


def test_changing_the_arguments_does_not_change_the_plan() -> None:
    shapes, axes, before, after = dict(SHAPES), dict(AXES), dict(WIDTHS), dict(WIDE)
    made = plan(shapes=shapes, axes=axes, before=before, after=after)
    for mapping in (shapes, axes, before, after):
        mapping.clear()
    assert made == plan()


# -- printed -------------------------------------------------------------------------------------------------------


def test_the_description_holds_the_widths_the_counts_and_the_strategy() -> None:
    made = plan()
    text = plan_in_words(made, fraction=0.5)
    for counts in (made.parameters(), made.parameters(active=True)):
        assert all(f"{count:,}" in text for count in counts)
    assert "growth 2: hidden 4 -> 6, inner 3 -> 7" in text
    assert f"{made.compute_saved(0.5):.1%}" in text
    assert "copy-copy; norm gains copy" in text
    assert "asymmetric_reset" in text
    assert "2 tensors keep their shape" in text
    assert "compute saved" not in plan_in_words(made)


def table(made: GrowthPlan) -> dict[str, list[str]]:
    """The rows by shape before: count, before, after ... new elements, split at spaces."""
    lines = plan_in_words(made).splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["tensors"])
    rows = [line.split() for line in lines[start + 1 : -1]]
    return {row[1]: row for row in rows}


def test_the_table_has_a_row_per_kind_with_its_factor_and_new_elements() -> None:
    rows = table(plan())
    assert rows.keys() == {"11x4", "8x6x4", "8x4x3", "20x6", "4"}
    assert rows["8x6x4"][:3] == ["1", "8x6x4", "8x14x6"]
    assert rows["8x6x4"][-1] == f"{8 * (14 * 6 - 6 * 4)}"
    hidden, inner = 1 / math.sqrt(1 + 3 * 0.5), 3 / 7
    assert float(rows["8x6x4"][-2]) == pytest.approx(hidden, rel=1e-5)  # hidden is its fan-in, inner its fan-out
    assert float(rows["8x4x3"][-2]) == pytest.approx(inner, rel=1e-5)
    assert float(rows["11x4"][-2]) == 1
    assert float(rows["4"][-2]) == pytest.approx(hidden, rel=1e-5)  # the gain that feeds the tied head


def test_tensors_of_one_kind_share_a_row() -> None:
    made = plan(shapes={**SHAPES, "embed2": (11, 4)}, axes={**AXES, "embed2": AXES["embed.weight"]})
    assert table(made)["11x4"][0] == "2"
    assert table(made)["11x4"][-1] == f"{2 * 11 * 2}"


def test_a_factor_that_differs_between_units_is_not_shown_as_one_number() -> None:
    assert table(plan(strategy=Strategy(scaling=Scaling.FUNCTION), **SUPPLE))["11x4"][-3:-1] == ["per", "unit"]


# -- the paper's model ---------------------------------------------------------------------------------------------


def build_paper_model(hidden_size: int = 1024, moe_intermediate_size: int = 512) -> OlmoeForCausalLM:
    return OlmoeForCausalLM(OlmoeConfig(hidden_size=hidden_size, moe_intermediate_size=moe_intermediate_size))


@pytest.fixture(scope="module")
def paper() -> tuple[Shapes, dict[str, ParamAxes], dict[str, int]]:
    widths = base_widths(build_paper_model, ["hidden_size", "moe_intermediate_size"], None)
    model = build_on_meta(build_paper_model, widths)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, probe(build_paper_model, widths), widths


@pytest.mark.parametrize(
    ("after", "total", "active", "saved"),
    [
        ({"moe_intermediate_size": 1024}, "4.98B", "751M", "20%"),
        ({"hidden_size": 2048}, "5.13B", "899M", "25%"),
        ({"hidden_size": 2048, "moe_intermediate_size": 1024}, "9.96B", "1503M", "35%"),
    ],
    ids=["inner", "hidden", "joint"],
)
def test_the_papers_sizes_and_savings(
    paper: tuple[Shapes, dict[str, ParamAxes], dict[str, int]],
    after: dict[str, int],
    total: str,
    active: str,
    saved: str,
) -> None:
    shapes, axes, widths = paper
    made = make_plan(shapes, axes, widths, after, Strategy(), number=1, active_share=8 / 64)
    totals, actives = made.parameters(), made.parameters(active=True)
    assert [f"{count / 1e9:.2f}B" for count in totals] == ["2.56B", total]
    assert [f"{count / 1e6:.0f}M" for count in actives] == ["450M", active]
    assert f"{made.compute_saved(0.5):.0%}" == saved
