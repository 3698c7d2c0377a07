"""The interface to one of DeepSpeed's optimizers; each has a file of its own beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from typing import Any, ClassVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_sparkling.engine.shard import Shard
from ds_sparkling.spec.partition import whole_piece

#: The loss scale and what goes with it, wherever an optimizer has it.
_STEP_STATE = (
    "loss_scaler",
    "dynamic_loss_scale",
    "loss_scale_config",
    "custom_loss_scaler",
    "external_loss_scale",
    "overflow",
    "torch_autocast_gradscaler",
    "_global_grad_norm",
)


class OptimizerAdapter(ABC):
    """Where one of DeepSpeed's optimizers keeps master weights and state, and what it has to be told.

    It holds nothing itself: make one whenever it is needed, by :func:`~ds_sparkling.engine.optimizers.adapter_of`.

    Args:
        engine: the engine whose optimizer it is.

    Attributes:
        gradients_elsewhere: whether gradients that await a step lie in buffers of the optimizer, and not in
            ``param.grad`` alone.
    """

    gradients_elsewhere: ClassVar[bool] = False

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.optimizer: Any = engine.optimizer

    @property
    def base(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper, which may be the wrapper itself."""
        base: torch.optim.Optimizer = self.optimizer.optimizer
        return base

    @property
    def names(self) -> dict[int, str]:
        """The name of every parameter of the engine's module, by ``id(param)``."""
        return {id(param): name for name, param in self.engine.module.named_parameters()}

    @abstractmethod
    def param_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """(index of the base optimizer's group, module parameters in it); a group may come several times."""

    @abstractmethod
    def trained(self) -> Iterator[Shard]:
        """This rank's shards of the trained parameters, in the order of the optimizer's tensors."""

    def frozen(self) -> Iterator[Shard]:
        """This rank's shards of the parameters that no optimizer holds; their only weights are the compute weights."""
        names = self.names
        for param in self.engine.module.parameters():
            if not (param.requires_grad and self.numel(param)):
                yield self._frozen(names[id(param)], param)

    def _frozen(self, name: str, param: nn.Parameter) -> Shard:
        return Shard(
            name=name,
            shape=tuple(param.shape),
            pieces=whole_piece(param.numel()),
            rank=0,
            group=None,
            weight=param.data.view(-1),
        )

    def full_shape(self, param: nn.Parameter) -> tuple[int, ...]:
        """The parameter's shape on this rank's expert-parallel slice, also while it is partitioned."""
        return tuple(param.shape)

    def numel(self, param: nn.Parameter) -> int:
        """The number of elements of :meth:`full_shape`."""
        return param.numel()

    def partition_group(self, experts: Container[str]) -> Any:
        """The process group that parameters are partitioned over, unless they are ``experts``; None if they aren't."""
        return None

    def begin_writing(self) -> None:  # noqa: B027 (most have nothing to do)
        """Call before writing to the shards of a fresh engine."""

    @abstractmethod
    def finish_writing(self) -> None:
        """Refresh the compute weights from the master weights; without it they stay stale."""

    def keep_masters(self) -> None:  # noqa: B027
        """Let master weights live on when the engine is destroyed, as long as shards refer to them."""

    def empty(self, param: nn.Parameter) -> None:
        """Free the parameter's compute weights and gradient."""
        param.grad = None
        param.data = param.data.new_empty(0)

    def step_state(self) -> dict[str, Any]:
        """The loss scale, and what else goes on from step to step beside the base optimizer's state."""
        return {name: getattr(self.optimizer, name) for name in _STEP_STATE if hasattr(self.optimizer, name)}

    def set_step_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`step_state` gave."""
        for name, value in state.items():
            setattr(self.optimizer, name, value)
