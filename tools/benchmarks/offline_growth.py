"""Widening and reshaping checkpoints offline, timed against a plain copy and DeepSpeed's universal converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import EXPERT_PARALLEL
from benchmarks.synthetic_checkpoint import config_of, write_checkpoint

_BYTES_PER_PARAMETER = 12  # fp32 weight, two moments
_MIB = 2**20

COLUMNS = (
    ("state [GB]", "{:.2f}"),
    ("ranks", "{:d}"),
    ("what", "{}"),
    ("output [GB]", "{:.2f}"),
    ("time [s]", "{:.2f}"),
    ("cp -r [s]", "{:.2f}"),
    ("cp + sync [s]", "{:.2f}"),
    ("/ cp", "{:.2f}"),
    ("/ (cp + sync)", "{:.2f}"),
    ("peak [MiB]", "{:.0f}"),
)


@dataclass(frozen=True)
class OfflineRow:
    """One line of the table, and one object of the JSON file."""

    state_gb: float
    ranks: int
    what: str
    output_gb: float
    seconds: float
    copy_s: float
    copy_sync_s: float
    over_copy: float
    over_copy_sync: float
    peak_mib: float


def measure(gigabytes: float, ranks: int, scratch: Path, *, repeat: int, universal: bool) -> list[OfflineRow]:
    """All lines of one checkpoint."""
    checkpoint = scratch / "checkpoint"
    config = config_of(int(gigabytes * 1e9 / _BYTES_PER_PARAMETER))
    state = write_checkpoint(checkpoint, config, ranks=ranks, expert_parallel=EXPERT_PARALLEL)
    expand = [sys.executable, "-m", "ds_sparkling.cli", "expand-zero-ckpt", str(checkpoint)]
    commands = {
        "reshape": [*expand, "OUT", "--world-size", str(2 * ranks), "--expert-parallel", str(2 * EXPERT_PARALLEL)],
        "grow": [*expand, "OUT", "--widths", f"moe_intermediate_size={2 * config.moe_intermediate_size}"],
    }
    if universal:
        (tag,) = checkpoint.glob("global_step*")
        workers = str(os.cpu_count() or 1)
        commands["ds_to_universal"] = [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag)),
            *("--output_folder", "OUT", "--num_extract_workers", workers, "--num_merge_workers", workers),
        ]
    rows = []
    for what, command in commands.items():
        out = scratch / "out"
        runs: list[tuple[float, float, float, int, int]] = []
        for _ in range(repeat):
            seconds, peak = _run([str(out) if part == "OUT" else part for part in command])
            copy, copy_sync = (_copy(out, scratch / "copy", sync=sync) for sync in (False, True))
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            runs.append((seconds, copy, copy_sync, peak, size))
            shutil.rmtree(out)
        seconds, copy, copy_sync = (min(times) for times in list(zip(*runs, strict=True))[:3])
        peak, size = max(run[3] for run in runs), runs[0][4]
        rows.append(
            OfflineRow(
                *(state / 1e9, ranks, what, size / 1e9, seconds, copy, copy_sync),
                *(seconds / copy, seconds / copy_sync, peak / _MIB),
            )
        )
    shutil.rmtree(checkpoint)
    return rows


def _run(command: Sequence[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the most anonymous memory that it and its children have at any time."""
    os.sync()
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()}")
    return seconds, peak


def _anonymous(process: int) -> int:
    """Anonymous resident bytes of a process and all its descendants."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has just ended
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own + sum(_anonymous(int(child)) for each in children for child in each)


def _copy(source: Path, target: Path, *, sync: bool) -> float:
    os.sync()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if sync:
        os.sync()
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds
