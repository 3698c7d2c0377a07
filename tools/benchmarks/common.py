"""What the benchmarks share: their table, a port for their processes to meet at, and how experts are spread."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.text_tables import text_table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.json"
#: Ranks that share one set of experts, where there is more than one rank.
EXPERT_PARALLEL = 2

#: (header, format) of every field of a row.
Columns = Sequence[tuple[str, str]]


def table(columns: Columns, rows: Sequence[DataclassInstance]) -> str:
    """One line per row below the headers, aligned to the right."""
    lines = [[header for header, _ in columns]]
    for row in rows:
        lines.append([form.format(value) for (_, form), value in zip(columns, vars(row).values(), strict=True)])
    return "\n".join(text_table(lines))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
