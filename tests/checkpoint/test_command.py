"""The command line: plans, JSON, hints files, several processes, and messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint_files
from benchmarks.common import free_port
from distributed import Workers
from ds_sparkling.checkpoint.command import main
from ds_sparkling.checkpoint.opening import open_checkpoint
from launching import outcome
from tiny import Case

WIDE = {"hidden_size": 12, "moe_intermediate_size": 10}
WIDTHS = ["--widths", *(f"{axis}={width}" for axis, width in WIDE.items())]
FACTORY = ["--config", "olmoe_factory:build_tied"]


@pytest.fixture(scope="module")
def saved(workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    workers(2).run(checkpoint_files.train_and_save, Case(2, 3, 2), str(directory))
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(saved)
    main([str(saved), str(tmp_path / "out"), *WIDTHS, *FACTORY, "--world-size", "4", "--dry-run"])
    text = capsys.readouterr().out
    for expected in (
        "hidden_size 6 -> 12, moe_intermediate_size 5 -> 10",
        "hidden_size (fan_in)",
        "ranks             2 -> 4",
        "to read",
        "to write",
        "free",
        "memory",
    ):
        assert expected in text
    main([str(saved), str(tmp_path / "out"), *WIDTHS, *FACTORY, "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["widths"] == WIDE
    assert plan["bytes_to_write"] > 0
    assert not list(tmp_path.iterdir())
    assert files_of(saved) == before


def test_the_planned_bytes_are_the_written_ones(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(saved), str(tmp_path / "dry"), *WIDTHS, *FACTORY, "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    main([str(saved), str(tmp_path / "out"), *WIDTHS, *FACTORY, "--json", "--verify"])
    summary = json.loads(capsys.readouterr().out)
    # Beside the tensors there are step counters.
    assert plan["bytes_to_write"] <= summary["bytes_written"] <= plan["bytes_to_write"] + 100
    assert summary["bytes_verified"] == summary["bytes_written"]
    assert summary["not_finite"] == []


def test_unknown_axes_give_a_hints_file_that_works_when_filled_in(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main([str(saved), str(out), *WIDTHS])
    assert "no growth record that knows hidden_size" in capsys.readouterr().err
    path = tmp_path / "out.hints.json"
    hints = json.loads(path.read_text())
    assert hints["axes"][r"layers\.\d+\.mlp\.experts\.w1"]["dims"] == [{}, "?", "?"]
    with pytest.raises(SystemExit):
        main([str(saved), str(out), *WIDTHS, "--config", str(path)])
    assert "hidden_size is '?'" in capsys.readouterr().err
    fill_in(hints)
    path.write_text(json.dumps(hints))
    main([str(saved), str(out), *WIDTHS, "--config", str(path)])
    main([str(saved), str(tmp_path / "probed"), *WIDTHS, *FACTORY])
    checkpoint_files.same_tensors(out / "global_step2", tmp_path / "probed/global_step2")
    # The record then knows the widths, but not the axes in the model's own names: the engine finds them out anew.
    record = open_checkpoint(out / "global_step2").record
    assert record is not None
    assert record.widths == WIDE
    assert record.axes == {}


def test_a_model_that_probing_doesnt_understand_gives_a_hints_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(saved), str(tmp_path / "out"), *WIDTHS, "--config", "olmoe_factory:build_unknown"])
    assert "strange.odd (Strange, shape (6, 1, 1, 1)): dimension 0 is 1 times hidden_size" in capsys.readouterr().err
    hints = json.loads((tmp_path / "out.hints.json").read_text())
    assert hints["widths"] == {"hidden_size": 6, "moe_intermediate_size": 5}


@pytest.mark.parametrize("name", ["o" * 250, "o" * 255])
def test_a_hints_file_may_belong_to_the_longest_name(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(saved), str(tmp_path / name), *WIDTHS])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(".hints.json")
    assert f"wrote a hints file: fill in {path} and" in capsys.readouterr().err


def test_an_error_begins_on_a_line_of_its_own(saved: Path, tmp_path: Path) -> None:
    """While files are looked at, planned with, written and read back: after every bar."""
    shutil.copytree(saved, tmp_path / "damaged")
    model = tmp_path / "damaged/global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:100])
    script = "import sys, resource; from ds_sparkling.checkpoint.command import main; {}main(sys.argv[1:])"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    spoil = (
        "import itertools, types; from ds_sparkling.checkpoint import output; numbers = itertools.count(); "
        "output.zlib = types.SimpleNamespace(crc32=lambda data: next(numbers)); "
    )
    for checkpoint, first, more in (
        (tmp_path / "damaged", "", []),
        (saved, "", ["--widths", "no_axis=5"]),
        (saved, limit, []),
        (saved, spoil, []),
    ):
        command = [sys.executable, "-c", script.format(first), str(checkpoint), str(tmp_path / "out"), "--verify"]
        done = subprocess.run([*command, *more], capture_output=True)
        assert done.returncode == 1
        text = done.stderr.decode()  # with its carriage returns
        lines = text.split("\n")
        assert "looking at files" in lines[0]
        assert [line for line in lines if "error: " in line] == [line for line in lines if line.startswith("error: ")]
        assert "\nerror: " in text


def fill_in(hints: dict[str, Any]) -> None:
    """What a user knows about the tiny model."""
    hints["widths"] = {"hidden_size": 6, "moe_intermediate_size": 5}
    hidden, inner = {"axis": "hidden_size"}, {"axis": "moe_intermediate_size"}
    into, out = {"role": "fan_in"}, {"role": "fan_out"}
    known = {
        "embed_tokens": [{}, hidden | out],
        "layernorm": [hidden | {"role": "gain"}],
        "q_norm": [{}],
        "k_norm": [{}],
        "q_proj": [{}, hidden | into],
        "k_proj": [{}, hidden | into],
        "v_proj": [{}, hidden | into],
        "o_proj": [hidden | out, {}],
        "router": [{}, hidden | into],
        r"experts\.w1": [{}, inner | out | {"alive": [0]}, hidden | into],
        r"experts\.w2": [{}, hidden | out, inner | into],
        r"experts\.w3": [{}, inner | out, hidden | into],
        r"norm\.weight": [hidden | {"role": "gain"}],
    }
    for pattern, entry in hints["axes"].items():
        entry["dims"] = next(dims for part, dims in known.items() if part in pattern)
        if entry["dims"][0].get("role") == "gain":
            entry["norm"] = "rms"
        if pattern == r"norm\.weight":
            entry["head_gain"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda axes: axes.pop(r"norm\.weight"), "matches no axes to norm.weight"),
        (lambda axes: axes.update({r"nothing\..*": {"dims": [{}]}}), r"axes.nothing\\..* matches no parameter"),
        (lambda axes: axes.update({".*": {"dims": [{}]}}), "which differ"),
        (lambda axes: axes.update({r"norm\.weight": {"dims": [{}, {}]}}), "has 2 dims"),
        (lambda axes: axes.update({r"norm\.weight": {"dims": [{"axis": "hidden_size"}]}}), "a role"),
        (lambda axes: axes.update({"(": {"dims": [{}]}}), "unterminated"),
    ],
)
def test_mistakes_in_a_hints_file_are_named(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main([str(saved), str(tmp_path / "out"), *WIDTHS])
    path = tmp_path / "out.hints.json"
    hints = json.loads(path.read_text())
    fill_in(hints)
    change(hints["axes"])
    path.write_text(json.dumps(hints))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(saved), str(tmp_path / "out"), *WIDTHS, "--config", str(path)])
    assert message.replace("\\\\", "\\") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.ranks
def test_torchrun_writes_the_same_files(saved: Path, tmp_path: Path) -> None:
    """``test_team.py`` has what becomes of processes that fail."""
    arguments = ["--world-size", "4", "--expert-parallel", "4"]
    main([str(saved), str(tmp_path / "one"), *arguments])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    tool = str(Path(__file__).parents[2] / "tools/expand_zero_ckpt.py")
    command = [*launcher, "--master_port", str(free_port()), tool, str(saved), str(tmp_path / "two"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        [*command, "--verify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    _, errors = outcome(process)
    assert process.returncode == 0, errors
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "hidden_size"], "--widths takes AXIS=WIDTH"),
        (["--widths", "hidden_size=x"], "--widths takes AXIS=WIDTH"),
        (["--widths", "hidden_size=8", "hidden_size=9"], "names hidden_size twice"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--config", "no_such_module:build", *WIDTHS], "No module named 'no_such_module'"),
        (["--config", "no_such_file.json", *WIDTHS], "no_such_file.json doesn't exist"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(saved), str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
