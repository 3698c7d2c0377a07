"""The JSON block: its defaults, and an error with a path and a way out for everything that can be wrong in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.config import GrowthConfig, SparklingConfig, read_json, sparkling_config
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, NewIndex, OptimizerState, Scaling, Strategy

FULL = {
    "growths": [
        {"at_step": 0, "widths": {"moe_intermediate_size": 64}},
        {"at_step": 1000, "widths": {"hidden_size": 128, "moe_intermediate_size": 96}},
    ],
    "widths": {"hidden_size": 64, "moe_intermediate_size": 32},
    "init": {"fan_out": "random", "fan_in": "zero", "norm": "random", "vocabulary": "random"},
    "scaling": "none",
    "optimizer_state": "drop",
    "seed": 7,
    "checkpoint_dir": "ckpt",
    "checkpoint_before_growth": False,
}


def stage(at_step: Any = 1, widths: Any = None, **more: Any) -> dict[str, Any]:
    return {"at_step": at_step, "widths": {"hidden_size": 8} if widths is None else widths, **more}


def refusal(block: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        sparkling_config({"train_batch_size": 8, "sparkling": block})
    return str(refused.value)


# -- what it accepts -----------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    expected = SparklingConfig(
        growths=(),
        widths=None,
        strategy=Strategy(
            fan_out=Init.COPY,
            fan_in=Init.COPY,
            norm=Init.COPY,
            scaling=Scaling.RMS,
            optimizer_state=OptimizerState.ASYMMETRIC_RESET,
            seed=0,
        ),
        checkpoint_dir=None,
        checkpoint_before_growth=True,
    )
    assert SparklingConfig() == expected
    assert sparkling_config({"sparkling": {}}) == expected
    assert sparkling_config({"sparkling": {"init": {}, "growths": []}}) == expected
    assert sparkling_config({"train_batch_size": 8, "zero_optimization": {"stage": 3}}) == expected


def test_every_key_reaches_its_field() -> None:
    assert sparkling_config({"sparkling": FULL}) == SparklingConfig(
        growths=(
            GrowthConfig(0, {"moe_intermediate_size": 64}),
            GrowthConfig(1000, {"hidden_size": 128, "moe_intermediate_size": 96}),
        ),
        widths={"hidden_size": 64, "moe_intermediate_size": 32},
        strategy=Strategy(
            fan_out=Init.RANDOM,
            fan_in=Init.ZERO,
            norm=Init.RANDOM,
            scaling=Scaling.NONE,
            optimizer_state=OptimizerState.DROP,
            seed=7,
            vocabulary=NewIndex.RANDOM,
        ),
        checkpoint_dir="ckpt",
        checkpoint_before_growth=False,
    )


@pytest.mark.parametrize("pair", INIT_PAIRS)
@pytest.mark.parametrize("state", OptimizerState)
@pytest.mark.parametrize("vocabulary", NewIndex)
def test_every_strategy_survives_its_dict(pair: tuple[Init, Init], state: OptimizerState, vocabulary: NewIndex) -> None:
    strategy = Strategy(
        fan_out=pair[0],
        fan_in=pair[1],
        norm=Init.RANDOM,
        scaling=Scaling.NONE,
        optimizer_state=state,
        seed=3,
        vocabulary=vocabulary,
    )
    assert Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy
    block = strategy.to_dict()
    assert sparkling_config({"sparkling": block}).strategy == strategy


def test_the_config_keeps_no_hold_of_the_json() -> None:
    block = json.loads(json.dumps(FULL))
    config = sparkling_config({"sparkling": block})
    block["growths"][0]["widths"]["moe_intermediate_size"] = 1
    block["widths"].clear()
    assert config == sparkling_config({"sparkling": FULL})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.checkpoint_dir = "elsewhere"  # type: ignore[misc]


def test_the_key_of_version_0_1_is_read_and_named_as_it_was_written() -> None:
    old = {("stages" if key == "growths" else key): value for key, value in FULL.items()}
    assert sparkling_config({"sparkling": old}) == sparkling_config({"sparkling": FULL})
    assert sparkling_config({"sparkling": old}).growths_key == "stages"
    assert sparkling_config({"sparkling": FULL}).growths_key == SparklingConfig().growths_key == "growths"
    for key in ("growths", "stages"):
        assert refusal({key: [stage("1")]}).startswith(f"sparkling.{key}[0].at_step must be an integer")
        text = refusal({key: [stage(5), stage(3)]})
        assert text == f"sparkling.{key}[1].at_step (3) must come after sparkling.{key}[0].at_step (5)"
    assert refusal({"growths": [], "stages": []}) == (
        "sparkling has both 'growths' and 'stages', which mean the same; keep the first"
    )


# -- unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "path", "nearest"),
    [
        ({"stage": []}, "sparkling.stage", "stages"),
        ({"growth": []}, "sparkling.growth", "growths"),
        ({"scalling": "rms"}, "sparkling.scalling", "scaling"),
        ({"optimiser_state": "drop"}, "sparkling.optimiser_state", "optimizer_state"),
        ({"Seed": 1}, "sparkling.Seed", "seed"),
        ({"checkpoint_directory": "x"}, "sparkling.checkpoint_directory", "checkpoint_dir"),
        ({"init": {"fanout": "copy"}}, "sparkling.init.fanout", "fan_out"),
        ({"init": {"norms": "copy"}}, "sparkling.init.norms", "norm"),
        ({"init": {"vocab": "mean"}}, "sparkling.init.vocab", "vocabulary"),
        ({"growths": [stage(), stage(2, at_steps=3)]}, "sparkling.growths[1].at_steps", "at_step"),
        ({"growths": [{"at_step": 1, "width": {}}]}, "sparkling.growths[0].width", "widths"),
    ],
)
def test_a_near_miss_is_named_by_its_path_with_the_key_that_was_meant(
    block: dict[str, Any], path: str, nearest: str
) -> None:
    text = refusal(block)
    assert text.startswith(f"{path}: unknown key")
    assert f"did you mean '{nearest}'?" in text


def test_a_far_miss_lists_what_is_known() -> None:
    text = refusal({"zzz": 1})
    assert "sparkling.zzz" in text
    assert "did you mean" not in text
    for key in FULL:
        assert key in text


@given(st.text(min_size=1), st.sampled_from(["", "init", "growths"]))
def test_no_unknown_key_is_accepted_anywhere(key: str, where: str) -> None:
    known = {*FULL, "stages", "rewarmup", "bias_correction", "log_every", "diagnose_every", "axes", "check", "inputs"}
    known |= {"patience", "state_kinds"}
    known |= {"fan_out", "fan_in", "norm", "vocabulary", "split", "perturbation", "at_step"}
    if key in known:
        return
    blocks: dict[str, dict[str, Any]] = {
        "": {key: 1},
        "init": {"init": {key: "copy"}},
        "growths": {"growths": [stage(**{key: 1})]},
    }
    assert key in refusal(blocks[where])


@pytest.mark.parametrize("key", ["Sparkling", "SPARKLING", "sparklng", "sparkling_"])
def test_a_misspelt_block_is_not_taken_for_a_missing_one(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: unknown key.*did you mean 'sparkling'"):
        sparkling_config({key: {"growths": []}})


def test_deepspeeds_own_keys_are_not_taken_for_the_block() -> None:
    own = ["spark", "sparse_attention", "scheduler", "optimizer", "bf16", "zero_optimization", "wall_clock_breakdown"]
    assert sparkling_config({key: {} for key in own}) == SparklingConfig()


# -- wrong types and values ----------------------------------------------------------------------------------------

NOT_INTEGERS = ["1", 1.0, 1.5, True, None, [], {}]
NOT_OBJECTS = ["x", 1, True, [], None]


OBJECTS: list[tuple[str, Callable[[Any], Any]]] = [
    ("sparkling", lambda value: value),
    ("sparkling.init", lambda value: {"init": value}),
    ("sparkling.widths", lambda value: {"widths": value}),
    ("sparkling.growths[0]", lambda value: {"growths": [value]}),
    ("sparkling.growths[1].widths", lambda value: {"growths": [stage(), {"at_step": 2, "widths": value}]}),
]


@pytest.mark.parametrize(
    ("path", "wrap", "value"),
    [
        (path, wrap, value)
        for path, wrap in OBJECTS
        for value in NOT_OBJECTS
        if (path, value) != ("sparkling.widths", None)  # null means build_model's defaults
    ],
)
def test_what_must_be_an_object_is(path: str, wrap: Callable[[Any], Any], value: Any) -> None:
    text = refusal(wrap(value))
    assert text.startswith(f"{path} must be an object")
    assert repr(value) in text


@pytest.mark.parametrize("value", NOT_INTEGERS)
@pytest.mark.parametrize(
    ("path", "wrap"),
    [
        ("sparkling.seed", lambda value: {"seed": value}),
        ("sparkling.widths.hidden_size", lambda value: {"widths": {"hidden_size": value}}),
        ("sparkling.growths[0].at_step", lambda value: {"growths": [stage(value)]}),
        ("sparkling.growths[0].widths.inner", lambda value: {"growths": [stage(widths={"inner": value})]}),
    ],
)
def test_what_must_be_an_integer_is(path: str, wrap: Callable[[Any], Any], value: Any) -> None:
    """true is an int to Python, and 1.0 equals 1; neither is a number of steps."""
    text = refusal(wrap(value))
    assert text.startswith(f"{path} must be an integer")
    assert repr(value) in text


@pytest.mark.parametrize(
    ("block", "path", "more"),
    [
        ({"growths": {}}, "sparkling.growths must be a list", "{}"),
        ({"growths": None}, "sparkling.growths must be a list", "None"),
        ({"growths": [{"widths": {"hidden_size": 8}}]}, "sparkling.growths[0]", "lacks 'at_step'"),
        ({"growths": [stage(), {"at_step": 9}]}, "sparkling.growths[1]", "lacks 'widths'"),
        ({"growths": [stage(-1)]}, "sparkling.growths[0].at_step", "-1"),
        ({"growths": [stage(widths={})]}, "sparkling.growths[0].widths", "empty"),
        ({"growths": [stage(widths={"inner": 0})]}, "sparkling.growths[0].widths.inner", "positive"),
        ({"widths": {"inner": -4}}, "sparkling.widths.inner", "-4"),
        ({"checkpoint_dir": 1}, "sparkling.checkpoint_dir", "1"),
        ({"checkpoint_dir": ["a"]}, "sparkling.checkpoint_dir", "['a']"),
        ({"checkpoint_before_growth": "no"}, "sparkling.checkpoint_before_growth", "'no'"),
        ({"checkpoint_before_growth": 1}, "sparkling.checkpoint_before_growth", "1"),
        ({"checkpoint_before_growth": None}, "sparkling.checkpoint_before_growth", "None"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(block: dict[str, Any], path: str, more: str) -> None:
    text = refusal(block)
    assert text.startswith(path)
    assert more in text


@pytest.mark.parametrize(
    ("path", "wrap", "known"),
    [
        ("sparkling.init.fan_out", lambda value: {"init": {"fan_out": value}}, "cancel, copy, random, zero"),
        ("sparkling.init.fan_in", lambda value: {"init": {"fan_in": value}}, "cancel, copy, random, zero"),
        ("sparkling.init.norm", lambda value: {"init": {"norm": value}}, "cancel, copy, random, zero"),
        ("sparkling.init.vocabulary", lambda value: {"init": {"vocabulary": value}}, "mean, random"),
        ("sparkling.scaling", lambda value: {"scaling": value}, "function, none, rms"),
        ("sparkling.optimizer_state", lambda value: {"optimizer_state": value}, "asymmetric_reset, asymm"),
    ],
)
@pytest.mark.parametrize("value", ["COPYS", "", None, 1, True, [], ["copy"], {}])
def test_a_wrong_choice_lists_the_right_ones(path: str, wrap: Callable[[Any], Any], known: str, value: Any) -> None:
    text = refusal(wrap(value))
    assert text.startswith(f"{path} is {value!r}")
    assert known in text


@pytest.mark.parametrize(
    ("block", "meant"),
    [
        ({"scaling": "rsm"}, "rms"),
        ({"init": {"fan_out": "copied"}}, "copy"),
        ({"init": {"vocabulary": "means"}}, "mean"),
        ({"optimizer_state": "asymetric_reset"}, "asymmetric_reset"),
    ],
)
def test_a_nearly_right_choice_is_answered_with_the_nearest(block: dict[str, Any], meant: str) -> None:
    assert f"did you mean '{meant}'?" in refusal(block)


@pytest.mark.parametrize("steps", [(5, 5), (5, 3), (1, 2, 2), (1, 9, 4)])
def test_stages_come_one_after_the_other(steps: tuple[int, ...]) -> None:
    text = refusal({"growths": [stage(step) for step in steps]})
    last = len(steps) - 1
    assert text.startswith(f"sparkling.growths[{last}].at_step ({steps[-1]})")
    assert f"sparkling.growths[{last - 1}].at_step ({steps[-2]})" in text


# -- strategies that contradict themselves -------------------------------------------------------------------------


def test_only_the_papers_init_pairs_are_strategies() -> None:
    for fan_out, fan_in in itertools.product(Init, Init):
        block = {"init": {"fan_out": fan_out.value, "fan_in": fan_in.value}}
        if (fan_out, fan_in) in INIT_PAIRS:
            assert sparkling_config({"sparkling": block}).strategy.pair == f"{fan_out.value}-{fan_in.value}"
        else:
            text = refusal(block)
            assert f"init {fan_out.value}-{fan_in.value} " in text
            assert all(
                pair in text for pair in ("copy-copy", "random-random", "random-zero", "random-copy", "zero-copy")
            )


def test_a_zero_gain_is_refused() -> None:
    assert "init.norm" in refusal({"init": {"norm": "zero"}})
    assert "init.norm" in refusal({"init": {"norm": "cancel"}})


@pytest.mark.parametrize(
    ("init", "named"),
    [
        ({"fan_out": "random", "fan_in": "random"}, "random-random"),
        ({"fan_out": "random", "fan_in": "copy"}, "random-copy"),
        ({"norm": "random"}, "init.norm"),
    ],
)
def test_function_scaling_is_refused_where_it_can_not_hold(init: dict[str, str], named: str) -> None:
    text = refusal({"init": init, "scaling": "function"})
    assert "'function'" in text
    assert named in text
    assert sparkling_config({"sparkling": {"init": init, "scaling": "rms"}}).strategy.scaling is Scaling.RMS


@pytest.mark.parametrize("pair", [("copy", "copy"), ("zero", "copy"), ("random", "zero"), ("random", "cancel")])
def test_function_scaling_is_accepted_where_it_can_hold(pair: tuple[str, str]) -> None:
    block = {"init": {"fan_out": pair[0], "fan_in": pair[1]}, "scaling": "function"}
    assert sparkling_config({"sparkling": block}).strategy.scaling is Scaling.FUNCTION


@pytest.mark.parametrize("init", [{"split": "1:2"}, {"split": "random"}, {"perturbation": 0.1}])
@pytest.mark.parametrize("other", [{"fan_out": "zero"}, {"fan_out": "random", "fan_in": "cancel"}, {"norm": "random"}])
def test_what_is_done_to_twins_needs_copies_on_all_sides(init: dict[str, Any], other: dict[str, str]) -> None:
    assert "copied on all sides" in refusal({"init": {**init, **other}})
    assert sparkling_config({"sparkling": {"init": init}}).strategy.all_copied


@pytest.mark.parametrize("value", ["half", "1:", "1:2:3", "-1:2", "0:0", "inf:1", "nan:1", 0.5, None, [1, 2]])
def test_a_split_that_makes_no_sense_is_named(value: Any) -> None:
    text = refusal({"init": {"split": value}})
    assert text.startswith("sparkling.init.split must be")
    assert repr(value) in text


@pytest.mark.parametrize(
    ("text", "shares", "name"),
    [
        ("1:2", (1.0, 2.0), "1:2"),
        ("0.5:0.5", (0.5, 0.5), "0.5:0.5"),
        ("1:0", (1.0, 0.0), "1:0"),
        ("random", None, "random"),
    ],
)
def test_a_split_is_read(text: str, shares: tuple[float, float] | None, name: str) -> None:
    strategy = sparkling_config({"sparkling": {"init": {"split": text}}}).strategy
    assert (strategy.split.shares, str(strategy.split)) == (shares, name)
    assert Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy
    assert strategy.split.even == (text == "0.5:0.5")


@pytest.mark.parametrize(
    ("rewarmup", "named"),
    [
        ({"faster_decay": 1.0}, "faster_decay"),
        ({"faster_decay": -0.1}, "faster_decay"),
        ({"faster_decay": 0.25, "curve": "factor"}, "'factor'"),
        ({"from_step": 10}, "ratio 1, steps 0"),
        ({"from_step": -1, "ratio": 1, "steps": 0}, "from_step"),
        ({"from_step": 10, "ratio": 1, "steps": 0, "curve": "factor"}, "'factor'"),
        ({"from_step": 1.5, "ratio": 1, "steps": 0}, "integer"),
        ({"faster_decay": "much"}, "number"),
        ({"faster_decay": 0.25, "scope": "none"}, "'none' leaves every rate"),
        ({"from_step": 10, "ratio": 1, "steps": 0, "scope": "none"}, "'none' leaves every rate"),
        ({"decay_steps": 100}, "needs curve 'factor'"),
        ({"decay_steps": 100, "curve": "factor", "scope": "none"}, "scope 'new' or 'all'"),
        ({"decay_steps": 0, "curve": "factor"}, "must be positive"),
        ({"decay_steps": 0.5, "curve": "factor"}, "integer"),
        ({"curve": "weight_norm"}, "ratio 1"),
        ({"curve": "weight_norm", "ratio": 1, "steps": 0, "scope": "all"}, "scope 'new'"),
        ({"curve": "weight_norm", "ratio": 1, "steps": 0, "faster_decay": 0.5}, "neither faster_decay"),
    ],
)
def test_a_decay_that_makes_no_sense_is_refused(rewarmup: dict[str, Any], named: str) -> None:
    text = refusal({"rewarmup": rewarmup})
    assert "rewarmup" in text
    assert named in text


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("configs/strategies/*.json")), ids=lambda p: p.stem
)
def test_the_recipes_are_strategies(path: Path) -> None:
    block = json.loads(path.read_text())
    strategy = sparkling_config({"sparkling": block}).strategy
    assert strategy.units_meaning
    assert strategy.rewarmup.meaning


def test_strategies_of_checkpoints_from_before_they_had_these_keys_are_read() -> None:
    data = Strategy().to_dict()
    for key in ("split", "perturbation"):
        del data["init"][key]
    for key in ("faster_decay", "from_step"):
        del data["rewarmup"][key]
    del data["state_kinds"]
    assert Strategy.from_dict(data) == Strategy()


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_mapping_or_a_file_makes_the_same_config(tmp_path: Path) -> None:
    config = {"sparkling": FULL, "train_batch_size": 8}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert read_json(path) == read_json(str(path)) == read_json(config) == config


def test_reading_a_mapping_makes_a_dict_of_its_own() -> None:
    config: dict[str, Any] = {"train_batch_size": 8}
    read_json(config)["train_batch_size"] = 9
    assert config == {"train_batch_size": 8}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"{'a': 1}", "isn't JSON", id="not JSON"),
        pytest.param(b"", "isn't JSON", id="empty"),
        pytest.param(b'{"a": 1', "isn't JSON", id="cut off"),
        pytest.param(b"[1]", "must hold a JSON object, found list", id="a list"),
        pytest.param(b"null", "must hold a JSON object, found NoneType", id="null"),
        pytest.param(b"\xff\xfe\x00\x80", "JSON", id="binary"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_json(path)
    assert str(path) in str(refused.value)
    assert complaint in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json doesn't exist"):
        read_json(tmp_path / "absent.json")


def test_a_directory_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=tmp_path.name):
        read_json(tmp_path)
