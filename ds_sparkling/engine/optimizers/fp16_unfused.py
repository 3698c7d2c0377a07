"""fp16 without ZeRO, unfused: every rank holds every parameter whole, each with a master tensor of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ds_sparkling.engine.optimizers.base_state import whole_shard
from ds_sparkling.engine.optimizers.fp16 import FP16
from ds_sparkling.engine.shard import Shard


class UnfusedFP16(FP16):
    """Adapter of ``FP16_UnfusedOptimizer``."""

    def trained(self) -> Iterator[Shard]:
        names = self.names
        for params, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                yield whole_shard(self.base, names[id(param)], param, master, 0)
