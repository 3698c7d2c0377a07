"""A shard's part of the base optimizer's state, and shards of parameters that every rank holds whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_sparkling.engine.shard import Shard
from ds_sparkling.optim.optimizer_trial import is_per_element
from ds_sparkling.spec.partition import whole_piece

#: How the names of what ``engine.offload_states`` leaves in an optimizer's state end.
_OFFLOAD_BUFFER = "_offload_buffer"


def with_state(shard: Shard, base: torch.optim.Optimizer, offset: int) -> Shard:
    """Add the parts of the master tensor's optimizer state that belong to the shard.

    Args:
        shard: whose master ``base`` steps; it is changed.
        base: the torch optimizer.
        offset: where the shard's weights begin in the master tensor.

    Returns:
        The shard.
    """
    master = shard.master
    assert master is not None
    for key, value in base.state.get(master, {}).items():
        if value is None or key in shard.wholes or key.endswith(_OFFLOAD_BUFFER):
            continue
        if is_per_element(base, key, value, master):
            shard.states[key] = value.view(-1)[offset : offset + shard.weight.numel()]
        else:
            shard.scalars[key] = value
    return shard


def whole_shard(base: torch.optim.Optimizer, name: str, param: nn.Parameter, master: Tensor, offset: int) -> Shard:
    """The shard of a parameter that every rank holds whole, from ``offset`` on in its master tensor."""
    numel = param.numel()
    shard = Shard(
        name=name,
        shape=tuple(param.shape),
        pieces=whole_piece(numel),
        rank=0,
        group=None,
        weight=master.data.view(-1)[offset : offset + numel],
        master=master,
    )
    return with_state(shard, base, offset)
