"""Every model family grown along every axis, in every room, and the table of what that does to its function."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benchmarks.common import free_port
from benchmarks.family_list import DENSE, Family
from ds_sparkling.discovery.comparison import difference_after, first_runnable
from ds_sparkling.discovery.factory import HuggingFaceFactory, import_transformers
from ds_sparkling.discovery.find_axes import find_axes
from ds_sparkling.discovery.small_instance import Instance
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.progress import progress_bar

#: What the table stands between in a file.
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
#: The largest difference that counts as the same function.
KEPT = 1e-5
RANKS = 2

#: Widths that hang together, smallest set first: where heads hang on the hidden width, they have to grow along.
_HIDDEN = (
    ("hidden_size",),
    ("hidden_size", "num_attention_heads"),
    ("hidden_size", "num_attention_heads", "num_key_value_heads"),
)
COLUMNS = ("hidden", "experts", "dense MLP", "shared experts", "heads", "vocabulary")


def axis_sets(family: Family, column: str) -> Sequence[tuple[str, ...]]:
    """Sets of axes that may be a column's for a family, to be tried in this order."""
    return {
        "hidden": _HIDDEN,
        "experts": ((family.experts,),) if family.experts is not None else (),
        "dense MLP": ((DENSE,),) if family.experts != DENSE else (),
        "shared experts": (("shared_expert_intermediate_size",), ("n_shared_experts",)),
        "heads": (("num_attention_heads", "num_key_value_heads"), ("num_attention_heads",)),
        "vocabulary": (("vocab_size",),),
    }[column]


@dataclass(frozen=True)
class Cell:
    """What was found of a family and a column.

    Attributes:
        axes: that were grown.
        after: their widths afterwards.
        differences: of the logits, by room; empty if the growth is refused.
        refusal: why.
    """

    axes: tuple[str, ...]
    after: Mapping[str, int]
    differences: Mapping[str, float]
    refusal: str = ""


def grow_module(family: Family, column: str) -> Cell | None:
    """Grow a family's plain module; None if it has no such width."""
    factory = HuggingFaceFactory(family.config)
    settings = import_transformers().AutoConfig.for_model(**family.config)
    refused = None
    for axes in axis_sets(family, column):
        known = {axis: getattr(settings, axis, None) for axis in axes}
        widths = {axis: width for axis, width in known.items() if isinstance(width, int)}
        if widths.keys() != known.keys():
            continue
        after = {axis: 2 * width for axis, width in widths.items()}
        try:
            found = find_axes(factory, widths, [axes]).axes
        except PlanError as error:
            if not str(error).startswith("no parameter changes"):
                refused = refused or Cell(axes, after, {}, str(error))
            continue
        runnable = first_runnable([Instance(factory, widths, after)], None, torch.float32, seed=0)
        return Cell(axes, after, {"module": difference_after(runnable, found)})
    return refused


def measure(families: Sequence[Family]) -> dict[tuple[str, str], Cell]:
    """All cells of some families."""
    found = {(family.name, column): grow_module(family, column) for family in families for column in COLUMNS}
    cells = {key: cell for key, cell in found.items() if cell is not None}
    jobs = [
        (key, family.config, family.preset, cells[key].after)
        for family in families
        for key in cells
        if key[0] == family.name and not cells[key].refusal
    ]
    with tempfile.TemporaryDirectory(prefix="families-") as directory:
        torch.multiprocessing.spawn(_rank, (jobs, free_port(), Path(directory)), nprocs=RANKS)
        results = json.loads((Path(directory) / "results.json").read_text())
    for (key, *_), differences in zip(jobs, results, strict=True):
        cells[key] = replace(cells[key], differences={**cells[key].differences, **differences})
    return cells


def _rank(rank: int, jobs: Sequence[tuple[Any, ...]], port: int, scratch: Path) -> None:
    """What every spawned process does; rank 0 leaves the results in ``scratch``."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # must be set before DeepSpeed is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints must not get into the table
    from benchmarks.family_ranks import grow_both_ways, join

    join(rank, RANKS, port)
    quiet()
    results = []
    with progress_bar(jobs, desc="engines", unit="growth", shown=rank == 0) as bar:
        for index, (_, config, preset, after) in enumerate(bar):
            results.append(grow_both_ways(config, preset, after, scratch / str(index)))
    if rank == 0:
        (scratch / "results.json").write_text(json.dumps(results))
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own way out aborts now and then in a thread of the backend


def quiet() -> None:
    """No advice about tokens and RoPE of tiny models."""
    import_transformers().logging.set_verbosity_error()


def markdown(families: Sequence[Family], cells: Mapping[tuple[str, str], Cell]) -> str:
    """The table, with the reasons of refusals below it."""
    reasons: list[str] = []
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in families:
        row = [family.name + (" (AutoEP)" if family.preset else "")]
        for column in COLUMNS:
            cell = cells.get((family.name, column))
            if cell is None:
                row.append("-")
            elif cell.refusal:
                reasons.append(f"{family.name}, {column} ({', '.join(cell.axes)}): {cell.refusal}")
                row.append(f"refused [{len(reasons)}]")
            else:
                worst = "{module:.0e} / {engine:.0e} / {offline:.0e}".format(**cell.differences)
                along = "" if len(cell.axes) == 1 or column == "heads" else " (with heads)"
                row.append(worst.replace("0e+00", "0").replace("e-0", "e-") + along)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1))]) + "\n"


def write_into(path: Path, table: str) -> None:
    """Replace what stands between the marks in ``path``.

    Raises:
        ConfigError: if it has no marks.
    """
    text = path.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ConfigError(f"{path} has no lines {BEGIN!r} and {END!r} to put the table between")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")
