"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse_widths(parser: argparse.ArgumentParser, option: str, texts: Sequence[str]) -> dict[str, int]:
    """Axis -> width from ``AXIS=WIDTH ...``; ends the command if a text is anything else."""
    widths: dict[str, int] = {}
    for text in texts:
        axis, equals, width = text.partition("=")
        if not axis or not equals or not width.isdigit() or int(width) < 1:
            parser.error(f"{option} takes AXIS=WIDTH, got {text!r}")
        if axis in widths:
            parser.error(f"{option} names {axis} twice")
        widths[axis] = int(width)
    return widths
