"""The runs of one config: as planned, and three controls."""

from __future__ import annotations

from enum import Enum


class Variant(Enum):
    """Which run of a config; the values are the main job's ``--variant``.

    GROWN is the config as it is. FROM_SCRATCH has the final widths from the start, and NEVER_GROWN the first widths to
    the end, both over the same steps. NARROW_LONGER has the first widths, too, over as many steps as take the compute
    that GROWN takes in all, on a learning-rate schedule that is stretched to its own end.
    """

    GROWN = "grown"
    FROM_SCRATCH = "from-scratch"
    NEVER_GROWN = "never-grown"
    NARROW_LONGER = "narrow-longer"
