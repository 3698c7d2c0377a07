"""No wrapper, as in fp32 without ZeRO: the torch optimizer steps the module's own parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.base_state import whole_shard
from ds_sparkling.engine.shard import Shard


class Unwrapped(OptimizerAdapter):
    """Adapter of any ``torch.optim.Optimizer``."""

    @property
    def base(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self.optimizer
        return base

    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        for index, group in enumerate(self.optimizer.param_groups):
            yield index, [param for param in group["params"] if param.requires_grad]

    def trained(self) -> Iterator[Shard]:
        names = self.names
        for _, params in self.param_groups():
            for param in params:
                yield whole_shard(self.base, names[id(param)], param, param, 0)

    def finish_writing(self) -> None:
        """Nothing: the master weights are the module's own."""
