"""Three runs of one config: as planned, with the final widths from the start, and never grown."""

from __future__ import annotations

from enum import Enum


class Variant(Enum):
    """Which run of a config; the values are the main job's ``--variant``."""

    GROWN = "grown"
    FROM_SCRATCH = "from-scratch"
    NEVER_GROWN = "never-grown"
