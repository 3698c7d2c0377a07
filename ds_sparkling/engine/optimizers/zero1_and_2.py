"""ZeRO-1 and ZeRO-2: a group's parameters lie end to end, in round-robin order, and each rank has a window of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.windows import link_compute_weights, window_shards
from ds_sparkling.engine.shard import Shard


class Zero1And2(OptimizerAdapter):
    """Adapter of ``DeepSpeedZeroOptimizer``."""

    gradients_elsewhere = True

    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        yield from enumerate(self.optimizer.bit16_groups)

    def trained(self) -> Iterator[Shard]:
        optimizer, names = self.optimizer, self.names
        for i, params in enumerate(optimizer.round_robin_bit16_groups):
            offsets = optimizer.round_robin_bit16_offsets[i]
            flat, group = optimizer.single_partition_of_fp32_groups[i], optimizer.real_dp_process_group[i]
            yield from window_shards(optimizer, names, params, offsets, flat, group)

    @torch.no_grad()
    def finish_writing(self) -> None:
        link_compute_weights(self.optimizer)

    def keep_masters(self) -> None:
        """Page-locked ones ``engine.destroy`` frees at once if DS_PIN_MEMORY_BACKEND is native, whoever has views."""
        for master in self.optimizer.single_partition_of_fp32_groups:
            master.grad = None
        self.optimizer.single_partition_of_fp32_groups = []
