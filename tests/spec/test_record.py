"""The growth record: what it tells about a run, and that a damaged file is an error that names it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_sparkling.errors import CheckpointError, SparklingError
from ds_sparkling.growth import make_plan
from ds_sparkling.spec.axes import FIXED, Dim, Norm, ParamAxes, Role
from ds_sparkling.spec.record import (
    FILE_NAME,
    GrowthRecord,
    RecordedGrowth,
    Spent,
    check_shapes,
    check_steps,
    find_checkpoint,
    read_record,
)
from ds_sparkling.spec.state_kinds import StateKind
from ds_sparkling.spec.strategy import (
    BiasCorrection,
    Init,
    NewIndex,
    OptimizerState,
    Rewarmup,
    RewarmupCurve,
    Scaling,
    Scope,
    Split,
    Strategy,
)

AXES = {
    "embed.weight": ParamAxes((FIXED, Dim("hidden", Role.FAN_OUT))),
    "experts.gate_up": ParamAxes(
        (FIXED, Dim("inner", Role.FAN_OUT, segments=2, alive=(0,)), Dim("hidden", Role.FAN_IN)), stacked_experts=True
    ),
    "query.weight": ParamAxes((Dim("heads", Role.FAN_OUT, block=3, groups="groups"), Dim("hidden", Role.FAN_IN))),
    "heads.weight": ParamAxes((Dim("hidden", Role.FAN_OUT, block=3), FIXED)),
    "unembed.weight": ParamAxes(
        (Dim("tokens", Role.INDEX), Dim("hidden", Role.FAN_IN, segments=2, interleaved=True, power=-1.0))
    ),
    "norm.weight": ParamAxes((Dim("hidden", Role.GAIN),), norm=Norm.RMS, head_gain=True, offset=1.0),
    "layer_norm.bias": ParamAxes((Dim("hidden", Role.GAIN),), norm=Norm.LAYER),
    "scale": ParamAxes(()),
}
OTHER = Strategy(
    fan_out=Init.RANDOM,
    fan_in=Init.ZERO,
    norm=Init.RANDOM,
    scaling=Scaling.NONE,
    optimizer_state=OptimizerState.DROP,
    seed=5,
    vocabulary=NewIndex.RANDOM,
)
RECORD = GrowthRecord(
    {"hidden": 4, "inner": 2, "heads": 3},
    AXES,
    (
        RecordedGrowth(100, 100, {"inner": 4}, Strategy()),
        RecordedGrowth(205, 200, {"hidden": 8, "inner": 6}, OTHER),
        RecordedGrowth(300, None, {"hidden": 12}, Strategy(seed=2)),
    ),
)


# -- what it tells -------------------------------------------------------------------------------------------------


def test_widths_in_force_are_those_of_the_last_stage_that_grew_the_axis() -> None:
    assert RECORD.widths == {"hidden": 12, "inner": 6, "heads": 3}
    assert GrowthRecord({"hidden": 4}, {}).widths == {"hidden": 4}


def test_the_history_has_an_entry_per_stage_for_every_axis() -> None:
    """Also for axes that a stage left alone: births are counted along it."""
    assert RECORD.width_history == {"hidden": (4, 4, 8, 12), "inner": (2, 4, 6, 6), "heads": (3, 3, 3, 3)}
    assert GrowthRecord({"hidden": 4}, {}).width_history == {"hidden": (4,)}


def test_asking_does_not_change_the_record() -> None:
    record = GrowthRecord(dict(RECORD.initial_widths), AXES, RECORD.growths)
    record.widths["hidden"] = 0
    record.width_history.clear()
    data = record.to_dict()
    data["initial_widths"]["hidden"] = 0
    data["growths"][0]["widths"]["inner"] = 0
    assert record == GrowthRecord(dict(RECORD.initial_widths), AXES, RECORD.growths)
    assert RECORD.growths[0].widths == {"inner": 4}


def test_a_growth_adds_its_stage_and_leaves_the_old_record_alone() -> None:
    record = GrowthRecord({"hidden": 4, "inner": 2}, {"embed.weight": AXES["embed.weight"]})
    plan = make_plan({"embed.weight": (11, 4)}, record.axes, record.widths, {"hidden": 6}, OTHER, number=1)
    after = record.after(plan.grown_widths, plan.strategy, step=17, planned_step=15)
    assert record.growths == ()
    assert after.growths == (RecordedGrowth(17, 15, {"hidden": 6}, OTHER),)
    assert after.widths == {"hidden": 6, "inner": 2}
    assert (after.initial_widths, after.axes) == (record.initial_widths, record.axes)
    again = make_plan({"embed.weight": (11, 6)}, after.axes, after.widths, {"hidden": 9}, Strategy(), number=2)
    twice = after.after(again.grown_widths, again.strategy, step=20, planned_step=None)
    assert twice.growths == (*after.growths, RecordedGrowth(20, None, {"hidden": 9}, Strategy()))
    assert twice.width_history["hidden"] == (4, 6, 9)


def test_a_record_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.growths = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.growths[0].step = 1  # type: ignore[misc]


# -- to a file and back --------------------------------------------------------------------------------------------

strategies = st.builds(
    Strategy,
    vocabulary=st.sampled_from(NewIndex),
    norm=st.sampled_from([Init.COPY, Init.RANDOM]),
    scaling=st.sampled_from([Scaling.RMS, Scaling.NONE]),
    optimizer_state=st.sampled_from(OptimizerState),
    seed=st.integers(-(2**70), 2**70),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
dims = st.just(FIXED) | st.builds(
    Dim,
    names,
    st.sampled_from(Role),
    block=st.integers(1, 9),
    segments=st.just(3),
    alive=st.lists(st.integers(0, 2)).map(tuple),
    interleaved=st.booleans(),
    groups=st.integers(1, 9) | names,
    power=st.sampled_from([0.0, 0.5, -1.0]),
)
param_axes = st.builds(
    ParamAxes,
    st.lists(dims, max_size=3).map(tuple),
    stacked_experts=st.booleans(),
    head_gain=st.booleans(),
    norm=st.sampled_from(Norm),
    offset=st.sampled_from([0.0, 1.0]),
) | st.builds(ParamAxes, st.lists(dims.filter(lambda dim: dim.role is not Role.GAIN), max_size=3).map(tuple))


@st.composite
def records(draw: st.DrawFn) -> GrowthRecord:
    widths = draw(st.dictionaries(names, st.integers(1, 2**20), min_size=1, max_size=3))
    steps = sorted(draw(st.lists(st.integers(0, 2**40), max_size=3)))
    planned = draw(st.permutations([None, *range(len(steps))]))
    record = GrowthRecord(widths, draw(st.dictionaries(names, param_axes, max_size=3)))
    for step, planned_step in zip(steps, planned, strict=False):
        axes = draw(st.sets(st.sampled_from(sorted(widths)), min_size=1))
        grown = {axis: record.widths[axis] + draw(st.integers(1, 2**20)) for axis in sorted(axes)}
        record = record.after(grown, draw(strategies), step=step, planned_step=planned_step)
    return record


@given(records())
def test_every_record_survives_json(record: GrowthRecord) -> None:
    assert GrowthRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    checkpoint = tmp_path / "new" / "global_step5"
    RECORD.write(checkpoint)
    assert read_record(checkpoint) == RECORD
    assert os.listdir(checkpoint) == [FILE_NAME]  # nothing temporary is left


def test_the_file_tells_the_widths_without_any_of_this_package(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    data = json.loads((tmp_path / "ds_sparkling.json").read_text())
    assert data["widths"] == {"hidden": 12, "inner": 6, "heads": 3}
    assert data["growths"][1]["step"] == 205


def test_writing_again_replaces_the_record(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    shorter = GrowthRecord({"hidden": 1}, {})
    shorter.write(tmp_path)
    assert read_record(tmp_path) == shorter


def test_a_write_that_breaks_off_leaves_the_old_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RECORD.write(tmp_path)
    write_text = Path.write_text

    def disk_full(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write_text(path, text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(SparklingError, match=r"ds_sparkling\.json can't be written: No space"):
        GrowthRecord({"hidden": 1}, AXES).write(tmp_path)
    monkeypatch.undo()
    assert read_record(tmp_path) == RECORD


def test_a_checkpoint_without_a_record_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "absent") is None


# -- damaged files -------------------------------------------------------------------------------------------------


def expect_named_error(checkpoint: Path, content: bytes) -> None:
    path = checkpoint / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_record(checkpoint)
    assert str(path) in str(refused.value)


def valid() -> dict[str, Any]:
    return json.loads(json.dumps(RECORD.to_dict()))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 64, id="zeros"),
        pytest.param(b"\xff\xfe\x00\x80 not text", id="binary"),
        pytest.param(b"{}", id="no keys"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="a list"),
        pytest.param(json.dumps(RECORD.to_dict()).encode()[:-1], id="cut off"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    expect_named_error(tmp_path, content)


@pytest.mark.parametrize("version", [0, -1, True, 2.0, "2", None])
def test_a_format_that_never_was_is_refused_with_those_that_are(tmp_path: Path, version: Any) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({**valid(), "format": version}))
    with pytest.raises(CheckpointError, match=f"format {version!r}; known are 1 to 4"):
        read_record(tmp_path)


def test_the_record_of_a_newer_release_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"format": 5, "whatever": "it holds"}))
    with pytest.raises(CheckpointError, match=r"ds_sparkling\.json .*format 5, which a newer release"):
        read_record(tmp_path)


# -- files of earlier releases -------------------------------------------------------------------------------------

FORMAT_1 = """{
 "format": 1,
 "initial_widths": {"hidden": 4, "inner": 2},
 "widths": {"hidden": 4, "inner": 4},
 "stages": [
  {"step": 100, "planned_step": 90, "widths": {"inner": 4}, "strategy": {
    "init": {"fan_out": "random", "fan_in": "zero", "norm": "copy"},
    "scaling": "rms",
    "optimizer_state": "asymmetric_reset",
    "rewarmup": {"ratio": 1.5, "steps": 20, "scope": "all", "curve": "factor"},
    "bias_correction": "inherit",
    "seed": 3}}
 ],
 "axes": {
  "up.weight": {"dims": [
    {"axis": "inner", "role": "fan_out", "block": 1, "segments": 2, "alive": [0]},
    {"axis": "hidden", "role": "fan_in", "block": 1, "segments": 1, "alive": []}],
   "stacked_experts": false, "head_gain": false},
  "norm.weight": {"dims": [{"axis": "hidden", "role": "gain", "block": 1, "segments": 1, "alive": []}],
   "stacked_experts": false, "head_gain": true},
  "bias": {"dims": [{}], "stacked_experts": false, "head_gain": false}
 }
}"""

FORMAT_2 = """{
 "format": 2,
 "initial_widths": {"hidden": 4},
 "widths": {"hidden": 8},
 "stages": [
  {"step": 7, "planned_step": null, "widths": {"hidden": 8}, "strategy": {
    "init": {"fan_out": "copy", "fan_in": "copy", "norm": "copy", "vocabulary": "random", "split": "1:2",
     "perturbation": 0.5},
    "scaling": "none",
    "optimizer_state": "copy_scaled",
    "rewarmup": {"ratio": 1.0, "steps": 0, "scope": "new", "curve": "auto", "faster_decay": 0.0, "from_step": 5,
     "decay_steps": null},
    "bias_correction": "restart",
    "seed": 0,
    "state_kinds": {"theirs": "weights"}}}
 ],
 "tried": ["hidden"],
 "spent": {"tokens": 12, "flops": 7.0},
 "axes": {
  "norm.weight": {"dims": [{"axis": "hidden", "role": "gain"}], "norm": "layer"},
  "head.weight": {"dims": [{}, {"axis": "hidden", "role": "fan_in", "power": -1.0}], "powers": {"inner": 0.5}}
 }
}"""


def test_a_record_of_format_1_is_read(tmp_path: Path) -> None:
    """Every norm that it knew divides by the RMS."""
    (tmp_path / FILE_NAME).write_text(FORMAT_1)
    strategy = Strategy(
        fan_out=Init.RANDOM,
        fan_in=Init.ZERO,
        rewarmup=Rewarmup(ratio=1.5, steps=20, scope=Scope.ALL, curve=RewarmupCurve.FACTOR),
        bias_correction=BiasCorrection.INHERIT,
        seed=3,
    )
    assert read_record(tmp_path) == GrowthRecord(
        {"hidden": 4, "inner": 2},
        {
            "up.weight": ParamAxes(
                (Dim("inner", Role.FAN_OUT, segments=2, alive=(0,)), Dim("hidden", Role.FAN_IN)),
            ),
            "norm.weight": ParamAxes((Dim("hidden", Role.GAIN),), head_gain=True, norm=Norm.RMS),
            "bias": ParamAxes((FIXED,)),
        },
        (RecordedGrowth(100, 90, {"inner": 4}, strategy),),
    )


def test_a_record_of_format_2_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(FORMAT_2)
    strategy = Strategy(
        vocabulary=NewIndex.RANDOM,
        split=Split((1.0, 2.0)),
        perturbation=0.5,
        scaling=Scaling.NONE,
        optimizer_state=OptimizerState.COPY_SCALED,
        rewarmup=Rewarmup(ratio=1.0, steps=0, from_step=5),
        state_kinds={"theirs": StateKind.WEIGHTS},
    )
    found = read_record(tmp_path)
    assert found == GrowthRecord(
        {"hidden": 4},
        {
            "norm.weight": ParamAxes((Dim("hidden", Role.GAIN),), norm=Norm.LAYER),
            "head.weight": ParamAxes((FIXED, Dim("hidden", Role.FAN_IN, power=-1.0)), powers=(("inner", 0.5),)),
        },
        (RecordedGrowth(7, None, {"hidden": 8}, strategy),),
        ("hidden",),
    )
    assert found.spent == Spent(12, 7.0)
    found.write(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    assert (data["format"], data["growths"][0]["step"], "stages" in data) == (4, 7, False)
    assert read_record(tmp_path) == found


@pytest.mark.parametrize("key", ["format", "initial_widths", "growths", "tried", "axes"])
def test_a_missing_key_is_an_error(tmp_path: Path, key: str) -> None:
    data = valid()
    del data[key]
    expect_named_error(tmp_path, json.dumps(data).encode())


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes of a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *itertools.chain.from_iterable(places(child, (*path, key)) for key, child in items)]


PLACES = places(valid())
WRONG: list[Any] = [None, "x", 5, [], ["x"], {}, {"x": 1}]


@pytest.mark.parametrize("wrong", WRONG, ids=json.dumps)
def test_a_wrong_value_anywhere_is_read_or_named_but_never_a_bare_error(tmp_path: Path, wrong: Any) -> None:
    """A reader that lets a TypeError through would stop a resume without telling which file to look at."""
    for place in PLACES:
        data: Any = valid()
        if place:
            node = data
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = wrong
        else:
            data = wrong
        (tmp_path / FILE_NAME).write_text(json.dumps(data))
        try:
            read_record(tmp_path)
            complaint = FILE_NAME
        except CheckpointError as error:
            complaint = str(error)
        except Exception as error:
            pytest.fail(f"{'/'.join(map(str, place))} = {wrong!r} lets {error!r} through")
        assert FILE_NAME in complaint


def numbers_and_texts() -> list[tuple[Any, ...]]:
    """The paths of all values that aren't made of others."""
    return [place for place in PLACES if place and not isinstance(at(valid(), place), (dict, list))]


def at(node: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        node = node[key]
    return node


ODD = [-1, 0, 3, 2**31, 10**400, -(10**400), 1.5, 1e9, 1e308, float("nan"), float("inf"), "", "4", "copy", True, None]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(numbers_and_texts()), st.sampled_from(ODD)), min_size=1, max_size=2))
def test_a_mutated_record_is_valid_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    data = valid()
    for place, value in changes:
        at(data, place[:-1])[place[-1]] = value
    directory = tmp_path_factory.getbasetemp()
    (directory / FILE_NAME).write_text(json.dumps(data))
    found, complaint = None, ""
    try:
        found = read_record(directory)
    except CheckpointError as error:
        complaint = str(error)
    if found is None:
        assert str(directory / FILE_NAME) in complaint
        assert "copy it again" in complaint
        assert len(complaint) < 1500
        return
    history = found.width_history
    assert all(list(widths) == sorted(widths) and widths[0] >= 1 for widths in history.values())
    assert GrowthRecord.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("initial_widths", "heads"), -3, "initial_widths.heads must be positive, got -3"),
        (("initial_widths", "heads"), "3", "initial_widths.heads must be an integer"),
        (("initial_widths", "heads"), 4, "widths is .* lead to"),
        (("growths", 1, "widths", "hidden"), 10**40, r"growths\[1\].widths.hidden is 1000.*128 bits"),
        (("growths", 1, "widths", "hidden"), 2**31, r"growths\[1\].widths.hidden must be at most 2147483647"),
        (("growths", 1, "widths", "hidden"), 3, r"growths\[1\].widths.hidden is 3, and it was 4 before"),
        (("growths", 2, "widths"), {}, r"growths\[2\].widths is empty"),
        (("growths", 2, "widths"), {"depth": 2}, r"growths\[2\].widths names 'depth'"),
        (("growths", 2, "step"), 204, r"growths\[2\].step is 204, and the growth before came at step 205"),
        (("growths", 0, "step"), float("nan"), r"growths\[0\].step must be an integer"),
        (("growths", 0, "planned_step"), 200, r"growths\[1\].planned_step is 200, as an earlier growth's"),
        (("growths", 0, "strategy", "rewarmup", "curve"), "up", "curve is 'up'"),
        (("axes", "unembed.weight", "dims", 1, "power"), 1e9, "power must be at most 8"),
        (("axes", "unembed.weight", "dims", 1, "power"), float("nan"), "power must be a finite number"),
        (("axes", "norm.weight", "offset"), 1e300, "offset must be at most 1000"),
        (("axes", "heads.weight", "dims", 0, "block"), 10**40, "block is 1000"),
        (("axes", "experts.gate_up", "dims", 1, "alive"), [2], "alive names segment 2"),
        (("tried",), ["depth"], "tried names 'depth'"),
        (("spent",), {"tokens": -1, "flops": 0.0}, "spent.tokens must not be negative"),
    ],
)
def test_what_cant_be_is_refused_by_its_key(tmp_path: Path, place: tuple[Any, ...], value: Any, words: str) -> None:
    data = valid()
    at(data, place[:-1])[place[-1]] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"ds_sparkling\.json can't be read: .*{words}"):
        read_record(tmp_path)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    expect_named_error(tmp_path, b"[" * 100_000)


def test_a_growth_after_the_checkpoints_own_step_is_refused(tmp_path: Path) -> None:
    check_steps(tmp_path, RECORD, 300)
    with pytest.raises(CheckpointError, match=r"ds_sparkling\.json .*saved at step 299: growths\[2\].step is 300"):
        check_steps(tmp_path, RECORD, 299)


@pytest.mark.parametrize("shape", [(11, 8), (11,), (11, 12, 1)])
def test_a_record_of_other_shapes_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    check_shapes(tmp_path, RECORD, AXES, {"embed.weight": (11, 12), "unknown": (3,)}, "the model")
    with pytest.raises(CheckpointError, match=r"ds_sparkling\.json doesn't belong to the model: .*embed.weight"):
        check_shapes(tmp_path, RECORD, AXES, {"embed.weight": shape}, "the model")


# -- which checkpoint ----------------------------------------------------------------------------------------------


def test_without_a_latest_file_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "absent") is None
    (tmp_path / "global_step5").mkdir()
    assert find_checkpoint(str(tmp_path)) is None  # load_checkpoint wouldn't find it without a tag either
    assert find_checkpoint(tmp_path, "global_step5") == tmp_path / "global_step5"


def test_latest_names_the_checkpoint_unless_a_tag_does(tmp_path: Path) -> None:
    for tag in ("global_step5", "global_step9"):
        (tmp_path / tag).mkdir()
    (tmp_path / "latest").write_text("global_step9\n")
    assert find_checkpoint(tmp_path) == tmp_path / "global_step9"
    assert find_checkpoint(str(tmp_path)) == tmp_path / "global_step9"
    assert find_checkpoint(tmp_path, "global_step5") == tmp_path / "global_step5"


def test_a_checkpoint_that_was_asked_for_and_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best.*given"):
        find_checkpoint(tmp_path, "best")
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match=r"global_step9.*latest"):
        find_checkpoint(tmp_path)
    (tmp_path / "global_step9").write_text("a file")
    with pytest.raises(CheckpointError, match="global_step9"):
        find_checkpoint(tmp_path)


def test_an_empty_latest_file_does_not_name_the_directory_itself(tmp_path: Path) -> None:
    """Written when a disk is full; the directory of all checkpoints has no record, so a resume would start narrow."""
    (tmp_path / "latest").write_text("\n")
    with pytest.raises(CheckpointError, match="latest"):
        find_checkpoint(tmp_path)
