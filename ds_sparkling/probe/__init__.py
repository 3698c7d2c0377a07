"""Finding out which dimension of which parameter belongs to which width axis, on the meta device."""

from ds_sparkling.probe.alone import frames_of, groups_made, missing_group, without_peers
from ds_sparkling.probe.build import (
    BuildModel,
    base_widths,
    build_alone,
    build_on_meta,
    check_wide,
    require_factory,
    saved_buffers,
)
from ds_sparkling.probe.moves import Move, Moves, find_moves
from ds_sparkling.probe.reading import Reading, UnreadableError, key_value_heads, probe, read

__all__ = [
    "BuildModel",
    "Move",
    "Moves",
    "Reading",
    "UnreadableError",
    "base_widths",
    "build_alone",
    "build_on_meta",
    "check_wide",
    "find_moves",
    "frames_of",
    "groups_made",
    "key_value_heads",
    "missing_group",
    "probe",
    "read",
    "require_factory",
    "saved_buffers",
    "without_peers",
]
