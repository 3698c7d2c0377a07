"""ZeRO-3: each parameter is cut evenly over its own group; a sub-group's pieces lie end to end in one flat tensor."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.base_state import with_state
from ds_sparkling.engine.shard import Shard
from ds_sparkling.errors import UnsupportedError
from ds_sparkling.spec.partition import even_pieces, padded_piece


class Zero3(OptimizerAdapter):
    """Adapter of ``DeepSpeedZeroOptimizer_Stage3``, which glues ``ds_...`` attributes onto the parameters."""

    gradients_elsewhere = True

    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        for sub_group, params in enumerate(self.optimizer.fp16_groups):
            yield self.optimizer.sub_group_to_group_id[sub_group], params

    def trained(self) -> Iterator[Shard]:
        names = self.names
        for sub_group, params in enumerate(self.optimizer.fp16_groups):
            flat = self.optimizer.fp32_partitioned_groups_flat[sub_group]
            offset = 0
            for param in params:
                group = param.ds_process_group
                pieces = even_pieces(param.ds_numel, dist.get_world_size(group))
                size = param.partition_numel()
                if size != padded_piece(param.ds_numel, len(pieces)):
                    raise UnsupportedError(
                        f"{names[id(param)]}: DeepSpeed's partition holds {size} elements, not an even cut"
                    )
                shard = Shard(
                    name=names[id(param)],
                    shape=tuple(param.ds_shape),
                    pieces=pieces,
                    rank=dist.get_rank(group),
                    group=group,
                    weight=flat.data[offset : offset + size],
                    master=flat,
                )
                yield with_state(shard, self.base, offset)
                offset += size

    def _frozen(self, name: str, param: Any) -> Shard:
        if not hasattr(param, "ds_tensor"):
            return super()._frozen(name, param)
        group = param.ds_process_group
        return Shard(
            name=name,
            shape=tuple(param.ds_shape),
            pieces=even_pieces(param.ds_numel, dist.get_world_size(group)),
            rank=dist.get_rank(group),
            group=group,
            weight=param.ds_tensor.view(-1),  # unlike .data it keeps page-locked memory from being freed
        )

    def full_shape(self, param: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(param, "ds_shape", param.shape))

    def numel(self, param: nn.Parameter) -> int:
        return int(getattr(param, "ds_numel", param.numel()))

    def partition_group(self, experts: Container[str]) -> Any:
        param = next(param for name, param in self.engine.module.named_parameters() if name not in experts)
        return getattr(param, "ds_process_group", None)

    def begin_writing(self) -> None:
        self.optimizer.checkpoint_event_prologue()

    @torch.no_grad()
    def finish_writing(self) -> None:
        for compute, master in zip(
            self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            if compute.data_ptr() != master.data_ptr():
                compute.copy_(master)
        self.optimizer.checkpoint_event_epilogue()

    def empty(self, param: Any) -> None:
        if hasattr(param, "ds_tensor"):
            param.ds_tensor.data = param.ds_tensor.new_empty(0)
        super().empty(param)
