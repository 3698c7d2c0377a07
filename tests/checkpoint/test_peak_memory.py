"""Peak memory of offline growth: it doesn't depend on how many parameters a checkpoint has, if its bytes stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.synthetic_checkpoint import write_checkpoint
from ds_sparkling.models.olmoe import OlmoeConfig

#: Grows one checkpoint after the other (checkpoint, output and width each), and prints of each how many parameters and
#: bytes it has, and by how many bytes anonymous memory rose at most.
GROW = """
import gc, sys, threading
from pathlib import Path
from ds_sparkling.checkpoint.expand import Request, expand, prepare
from ds_sparkling.checkpoint.team import Team

def anonymous():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, anonymous())

checkpoints = sys.argv[1:]
for checkpoint, out, width in zip(checkpoints[::3], checkpoints[1::3], checkpoints[2::3]):
    gc.collect()
    base = peak = anonymous()
    ended = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)  # an error ends it
    watcher.start()
    request = Request(checkpoint=Path(checkpoint), out=Path(out), widths={"hidden_size": int(width)}, workers=1)
    prepared = prepare(request, Team())
    expand(prepared, Team())
    ended.set()
    watcher.join()
    print(len(prepared.contents.params), prepared.contents.bytes, max(peak, anonymous()) - base)
"""
HIDDEN = 1024
#: What a parameter's name, shape and places in files may take, about 12 KiB: the tables of one would be over 150 KiB.
PER_PARAMETER = 20 * 1024


def wide_and_flat(layers: int, inner: int) -> OlmoeConfig:
    """A model that is nearly nothing but vectors of the hidden width, so that tables are as large as they can be."""
    return OlmoeConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        num_experts=2,
        num_experts_per_tok=1,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_peak_memory_is_flat_from_100_to_1500_parameters(tmp_path: Path) -> None:
    arguments = []
    for name, config in {"few": wide_and_flat(9, 42), "many": wide_and_flat(137, 1)}.items():
        write_checkpoint(tmp_path / name, config, ranks=2, expert_parallel=2)
        arguments += [str(tmp_path / name), str(tmp_path / f"{name}-grown"), str(2 * HIDDEN)]
    answer = subprocess.run([sys.executable, "-c", GROW, *arguments], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    (few, few_bytes, few_peak), (many, many_bytes, many_peak) = (
        map(int, line.split()) for line in answer.stdout.splitlines()
    )
    assert few <= 120
    assert many >= 1500
    assert few_bytes == pytest.approx(many_bytes, rel=0.1)
    assert many_peak - few_peak < (many - few) * PER_PARAMETER, (few_peak, many_peak)
