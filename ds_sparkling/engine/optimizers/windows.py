"""Shards where a rank's flat tensor is a window over a group's parameters, laid end to end: ZeRO-1, ZeRO-2 and bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ds_sparkling.engine.optimizers.base_state import with_state
from ds_sparkling.engine.shard import Shard
from ds_sparkling.spec.partition import Pieces


def window_shards(
    optimizer: Any,
    names: Mapping[int, str],
    params: Sequence[nn.Parameter],
    offsets: Sequence[int],
    flat: Tensor,
    group: Any,
) -> Iterator[Shard]:
    """This rank's shards of one group's parameters.

    Args:
        optimizer: DeepSpeed's, with the torch optimizer inside.
        names: of the module's parameters, by ``id(param)``.
        params: the group's parameters, in the order they are laid out in.
        offsets: where each begins in the whole group's flat tensor.
        flat: this rank's window.
        group: the process group that the flat tensor is spread over.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    whole_offset = 0
    for param, offset in zip(params, offsets, strict=True):
        pieces = Pieces(param.numel(), flat.numel(), ranks, offset)
        start = max(offset - rank * flat.numel(), 0) if pieces[rank].numel else 0
        shard = Shard(
            name=names[id(param)],
            shape=tuple(param.shape),
            pieces=pieces,
            rank=rank,
            group=group,
            weight=flat.data[start : start + pieces[rank].numel],
            master=flat,
        )
        whole_numel = param.numel() if pieces[rank].numel else 0
        # Muon orthogonalises whole matrices, so it keeps the momentum of all that touch the window, end to end; only
        # when it is offloaded it keeps that of the window.
        momentum = optimizer.optimizer.state.get(flat, {}).get("momentum_buffer")
        if momentum is not None and _is_muon(optimizer.optimizer) and not getattr(optimizer, "cpu_offload", False):
            shard.wholes["momentum_buffer"] = momentum[whole_offset : whole_offset + whole_numel]
        whole_offset += whole_numel
        yield with_state(shard, optimizer.optimizer, start)


def link_compute_weights(optimizer: Any) -> None:
    """Refresh the compute weights from the master weights, and link them to the optimizer's state."""
    optimizer.update_lp_params()
    if optimizer.optimizer.state:
        # DeepSpeed's own getters look the state up through this link, which it makes at the first step.
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_muon(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "MuonWithAuxAdam"
