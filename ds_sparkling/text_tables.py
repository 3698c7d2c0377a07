"""Tables as lines of plain text. By hand: twelve lines that keep what is printed the same everywhere, piped or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (), indent: str = "") -> list[str]:
    """One line per row, with columns two spaces apart and none after the last.

    Args:
        rows: their cells; all rows have as many.
        left: the columns that are aligned to the left; the others are to the right.
        indent: what every line begins with.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        aligned = [cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in cells]
        lines.append((indent + "  ".join(aligned)).rstrip())
    return lines


def printable(text: str) -> str:
    """``text`` with what no terminal and no page can show, as bytes of a file's name that are no text, written out."""
    return text.encode(errors="backslashreplace").decode()
