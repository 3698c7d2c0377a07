"""The configs of a config's variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_sparkling.errors import ConfigError
from ds_sparkling.job.variants import Variant
from ds_sparkling.spec.config import BLOCK, sparkling_config


def as_variant(config: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """The config of another run with the same data, steps and schedule.

    Args:
        config: a DeepSpeed config with a ``"sparkling"`` block.
        variant: as it is, the final widths from the start, or the first widths to the end.

    Raises:
        ConfigError: if the block is wrong, or plans no growth that there could be another variant of.
    """
    block = sparkling_config(config)
    if variant is Variant.GROWN:
        return dict(config)
    if not block.growths:
        raise ConfigError(f"{BLOCK}.stages is empty: the config plans no growth, so nothing can be {variant.value}")
    changed = {**config[BLOCK], "stages": []}
    if variant is Variant.FROM_SCRATCH:
        final = dict(block.widths or {})
        for growth in block.growths:
            final |= growth.widths
        changed["widths"] = final
    return {**config, BLOCK: changed}
