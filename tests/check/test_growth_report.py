"""The check of a growth: what strategies promise is kept by the reference model, and what isn't kept is said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_sparkling
from ds_sparkling.check.modules import ModuleLevel
from ds_sparkling.check.promise import BLOCK_BAND, LAYER_BAND
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.config import sparkling_config
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, Scaling, Split, Strategy
from pairwise import pairwise

H, I = "hidden_size", "moe_intermediate_size"  # noqa: E741 - the paper's letters


def build(hidden_size: int = 64, moe_intermediate_size: int = 32, tied: bool = True) -> nn.Module:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=tied,
            **sizes,
        )
    )


def grown(axes: tuple[str, ...], ratio: float) -> dict[str, int]:
    return {axis: int({H: 64, I: 32}[axis] * ratio) for axis in axes}


AXES = ((I,), (H,), (H, I))


def named(case: Mapping[str, Any]) -> str:
    return "-".join(str(getattr(value, "value", value)) for value in case.values())


def is_strategy(pair: tuple[Init, Init], scaling: Scaling, **_: Any) -> bool:
    """Random units change the function, which the strategy itself refuses to keep then."""
    try:
        Strategy(fan_out=pair[0], fan_in=pair[1], scaling=scaling)
    except ConfigError:
        assert scaling is Scaling.FUNCTION
        return False
    return True


STRATEGIES = pairwise({"pair": INIT_PAIRS, "scaling": list(Scaling), "axes": AXES, "ratio": (1.5, 2, 3)}, is_strategy)


@pytest.mark.parametrize("case", STRATEGIES, ids=named)
def test_the_reference_model_keeps_what_every_strategy_promises(case: Mapping[str, Any]) -> None:
    pair: tuple[Init, Init] = case["pair"]
    scaling, axes, ratio = case["scaling"], case["axes"], case["ratio"]
    strategy = Strategy(fan_out=pair[0], fan_in=pair[1], scaling=scaling)
    if pair[0] is Init.RANDOM and scaling is Scaling.FUNCTION and H in axes:
        with pytest.raises(PlanError, match=strategy.pair):
            ds_sparkling.check_growth(build, None, grown(axes, ratio), strategy)
        return
    report = ds_sparkling.check_growth(build, None, grown(axes, ratio), strategy)
    assert report.kept, report.describe()
    exact = scaling is Scaling.FUNCTION or (
        scaling is Scaling.RMS and pair == (Init.COPY, Init.COPY) and ratio == int(ratio)
    )
    assert (report.promise.difference is not None) == exact
    assert (report.promise.bands == {}) == (exact or scaling is Scaling.NONE)
    if exact:
        assert report.difference < 1e-5


TREATMENTS = pairwise(
    {
        "twins": [{"split": Split.parse("1:2")}, {"split": Split.parse("random")}, {"perturbation": 0.5}],
        "scaled": [(Scaling.RMS, 2), (Scaling.RMS, 3), (Scaling.FUNCTION, 1.5)],
        "axes": AXES,
    }
)


@pytest.mark.parametrize("case", TREATMENTS, ids=named)
def test_what_is_done_to_the_consumers_of_twins_keeps_the_function(case: Mapping[str, Any]) -> None:
    twins, (scaling, ratio), axes = case.values()
    report = ds_sparkling.check_growth(build, None, grown(axes, ratio), Strategy(scaling=scaling, **twins))
    assert report.kept, report.describe()
    assert report.promise.difference is not None
    assert report.difference < 1e-5


RECIPES = sorted(Path(__file__).parents[2].glob("configs/strategies/*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.stem))
def test_all_recipes_but_one_keep_the_function_along_the_inner_width(path: Path) -> None:
    strategy = sparkling_config({"sparkling": json.loads(path.read_text())}).strategy
    report = ds_sparkling.check_growth(build, None, {I: 64}, strategy)
    assert (report.difference < 1e-5) == (path.stem != "naive"), report.describe()


def test_integer_copies_are_exact_to_rounding() -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        report = ds_sparkling.check_growth(build, None, {H: 128, I: 64}, dtype=dtype)
        assert report.dtype is dtype
        assert report.difference < bound


def test_the_rows_are_the_layers_their_parts_and_what_stands_outside() -> None:
    report = ds_sparkling.check_growth(build, {H: 64}, {H: 128})
    places = {row.module: row.place for row in report.rows}
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    assert places == {
        "embed_tokens": ModuleLevel.OUTSIDE,
        **{f"layers.{i}.{part}": ModuleLevel.BLOCK for i in (0, 1) for part in parts},
        **{f"layers.{i}": ModuleLevel.LAYER for i in (0, 1)},
        "norm": ModuleLevel.OUTSIDE,
        "lm_head": ModuleLevel.OUTSIDE,
    }
    assert list(places)[:3] == ["embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn"]  # as they ran
    for row in report.rows:
        assert row.expected == (0.5 if row.module == "norm" else 1.0)  # the tied head's factor
        assert row.ratio == pytest.approx(row.expected, rel=1e-12)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy(), {"old": 1, "copied": 3, "random": 0, "zero": 0}),
        (Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM), {"old": 1, "copied": 0, "random": 3, "zero": 0}),
        # New rows are random, and new columns zero, in new rows too.
        (Strategy(fan_out=Init.RANDOM, fan_in=Init.ZERO), {"old": 1, "copied": 0, "random": 1, "zero": 2}),
        (Strategy(fan_out=Init.RANDOM, fan_in=Init.COPY), {"old": 1, "copied": 1, "random": 2, "zero": 0}),
        (Strategy(fan_out=Init.ZERO, fan_in=Init.COPY), {"old": 1, "copied": 1, "random": 0, "zero": 2}),
    ],
    ids=lambda value: value.pair if isinstance(value, Strategy) else "",
)
def test_what_was_copied_drawn_and_zero(strategy: Strategy, expected: Mapping[str, int]) -> None:
    report = ds_sparkling.check_growth(build, None, {H: 128, I: 64}, strategy)
    (down,) = (tally for tally in report.tallies if tally.name == "layers.*.mlp.experts.down_proj")
    assert (down.tensors, down.before, down.after) == (2, (4, 64, 32), (4, 128, 64))
    quarter = 2 * 4 * 64 * 32
    assert {name: getattr(down, name) for name in expected} == {n: quarter * share for n, share in expected.items()}
    (gate_up,) = (tally for tally in report.tallies if tally.name == "layers.*.mlp.experts.gate_up_proj")
    kinds = (gate_up.old, gate_up.copied, gate_up.random, gate_up.zero)
    assert sum(kinds) == 2 * math.prod(gate_up.after)
    if strategy.fan_out is Init.ZERO:  # the gate's new rows are copies, or up would never come alive
        assert kinds == (2 * quarter, 4 * quarter, 0, 2 * quarter)


def test_scales_show_in_the_tensors_rms() -> None:
    report = ds_sparkling.check_growth(build, None, {H: 128})
    ratios = {tally.name: tally.rms_after / tally.rms_before for tally in report.tallies}
    assert ratios["embed_tokens.weight"] == pytest.approx(1)
    assert ratios["layers.*.self_attn.q_proj.weight"] == pytest.approx(0.5)
    assert ratios["norm.weight"] == pytest.approx(0.5)
    assert "layers.*.self_attn.q_norm.weight" not in ratios  # stays as it is


def scaled_by_width(**widths: int) -> nn.Module:
    """The reference model, whose first attention is multiplied by the width over 64."""
    model = build(widths[H], widths[I])
    factor = widths[H] / 64
    model.get_submodule("layers.0.self_attn").register_forward_hook(lambda _module, _args, output: output * factor)
    return model


@pytest.mark.parametrize(
    "strategy", [Strategy(), Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM), Strategy(scaling=Scaling.NONE)]
)
def test_a_model_that_scales_by_its_own_width_breaks_every_promise(strategy: Strategy) -> None:
    report = ds_sparkling.check_growth(scaled_by_width, {H: 64, I: 32}, {H: 96, I: 48}, strategy)
    assert not report.kept
    text = report.describe()
    assert "BROKEN: growing hidden_size would change the model's function" in text
    assert "The first module to give something else is layers.0.self_attn (Attention)" in text


def test_bands_are_held_against_each_module_by_its_place() -> None:
    report = ds_sparkling.check_growth(build, None, {H: 96}, Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM))
    assert report.promise.bands[ModuleLevel.LAYER] == (1 / LAYER_BAND, LAYER_BAND)
    assert report.promise.bands[ModuleLevel.BLOCK] == (1 / BLOCK_BAND, BLOCK_BAND)
    wrong = ds_sparkling.check_growth(
        scaled_by_width, {H: 64, I: 32}, {H: 256}, Strategy(fan_out=Init.RANDOM, fan_in=Init.RANDOM)
    )
    lines = [line for line in wrong.broken if line.startswith("layers.0.self_attn: the RMS ratio is ")]
    assert len(lines) == 1
    assert lines[0].endswith("promised is 0.667 to 1.5")
    assert any(line.startswith("layers.0: the RMS ratio is ") and line.endswith("0.8 to 1.25") for line in wrong.broken)


def test_the_report_is_json_and_text() -> None:
    report = ds_sparkling.check_growth(build, None, {I: 64})
    data = json.loads(json.dumps(report.to_dict()))
    assert data["kept"] is True
    assert data["small"] == {
        "note": "",
        "widths": {I: [32, 64]},
        "parameters": list(report.small.parameters()),
        "dtype": "float64",
    }
    assert data["modules"][0]["module"] == "embed_tokens"
    assert {entry["name"] for entry in data["tensors"]} == {
        f"layers.*.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    text = report.describe()
    assert "ran the model as it is" in text
    assert text.endswith("\nkept")


def test_as_is_runs_the_model_itself() -> None:
    def deep(hidden_size: int = 128, moe_intermediate_size: int = 64) -> nn.Module:
        return OlmoeForCausalLM(
            OlmoeConfig(
                vocab_size=50304,
                hidden_size=hidden_size,
                moe_intermediate_size=moe_intermediate_size,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_experts=8,
            )
        )

    small = ds_sparkling.check_growth(deep, None, {I: 128})
    whole = ds_sparkling.check_growth(deep, None, {I: 128}, as_is=True)
    assert small.kept
    assert whole.kept
    assert small.note.startswith("2 of 3 modules of layers")
    assert whole.note == ""
    assert whole.small.parameters() == whole.plan.parameters() == small.plan.parameters()
    assert small.small.parameters() < whole.small.parameters()


def test_a_model_that_can_not_be_run_is_an_error_that_says_so() -> None:
    with pytest.raises(PlanError, match=r"Linear has no nn\.Embedding to take token ids; pass inputs"):
        ds_sparkling.check_growth(lambda width=8: nn.Linear(width, 3), None, {"width": 16})
