"""Finding out which dimension of which parameter belongs to which width axis, on the meta device."""

from ds_sparkling.probe.build import BuildModel, base_widths, build_on_meta, check_wide
from ds_sparkling.probe.reading import Reading, UnreadableError, key_value_heads, probe, read

__all__ = [
    "BuildModel",
    "Reading",
    "UnreadableError",
    "base_widths",
    "build_on_meta",
    "check_wide",
    "key_value_heads",
    "probe",
    "read",
]
