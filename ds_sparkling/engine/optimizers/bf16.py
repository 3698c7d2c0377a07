"""bf16 without ZeRO, or with ZeRO-1 and gradients accumulated in fp32: windows, as in ZeRO-1, in the groups' order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.windows import link_compute_weights, window_shards
from ds_sparkling.engine.shard import Shard


class BF16(OptimizerAdapter):
    """Adapter of ``BF16_Optimizer``."""

    gradients_elsewhere = True

    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        yield from enumerate(self.optimizer.bf16_groups)

    def trained(self) -> Iterator[Shard]:
        optimizer, names = self.optimizer, self.names
        for i, params in enumerate(optimizer.bf16_groups):
            offsets = [0, *itertools.accumulate(param.numel() for param in params)][:-1]
            flat, group = optimizer.fp32_groups_flat_partition[i], optimizer.real_dp_process_group[i]
            yield from window_shards(optimizer, names, params, offsets, flat, group)

    @torch.no_grad()
    def finish_writing(self) -> None:
        link_compute_weights(self.optimizer)
