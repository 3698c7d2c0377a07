"""Say what a width may be, and read the argument that several commands take for widths."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

#: Units along an axis; twice as many overflow the sizes of tensors.
LARGEST_WIDTH = 2**31 - 1


def parse_widths(parser: argparse.ArgumentParser, option: str, texts: Sequence[str]) -> dict[str, int]:
    """Axis -> width from ``AXIS=WIDTH ...``; ends the command if a text is anything else."""
    widths: dict[str, int] = {}
    for text in texts:
        axis, equals, width = text.partition("=")
        if not axis or not equals or not width.isdecimal() or not _possible(width):
            parser.error(f"{option} takes AXIS=WIDTH, got {text[:80]!r}; a width is from 1 to {LARGEST_WIDTH}")
        if axis in widths:
            parser.error(f"{option} names {axis} twice")
        widths[axis] = int(width)
    return widths


def _possible(width: str) -> bool:
    return len(width.lstrip("0")) <= len(str(LARGEST_WIDTH)) and 1 <= int(width) <= LARGEST_WIDTH
