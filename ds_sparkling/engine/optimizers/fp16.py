"""fp16 without ZeRO, fused: every rank holds a group's parameters whole, end to end in one flat master tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.base_state import whole_shard
from ds_sparkling.engine.shard import Shard


class FP16(OptimizerAdapter):
    """Adapter of ``FP16_Optimizer``."""

    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        yield from enumerate(self.optimizer.fp16_groups)

    def trained(self) -> Iterator[Shard]:
        names = self.names
        for params, flat in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for param in params:
                yield whole_shard(self.base, names[id(param)], param, flat, offset)
                offset += param.numel()

    @torch.no_grad()
    def finish_writing(self) -> None:
        params = dict(self.engine.module.named_parameters())
        for shard in self.trained():
            param = params[shard.name]
            param.data.copy_(shard.weight.view(param.shape))
