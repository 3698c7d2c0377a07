"""One adapter for each of DeepSpeed's optimizers, and the table of them.

Another optimizer takes a file with an :class:`~ds_sparkling.engine.optimizers.adapter.OptimizerAdapter`, and a line in
:data:`ADAPTERS`. They touch the optimizers' private parts and the attributes that DeepSpeed glues onto parameters.
"""

from __future__ import annotations

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_sparkling.engine.optimizers.adapter import OptimizerAdapter
from ds_sparkling.engine.optimizers.bf16 import BF16
from ds_sparkling.engine.optimizers.fp16 import FP16
from ds_sparkling.engine.optimizers.fp16_unfused import UnfusedFP16
from ds_sparkling.engine.optimizers.unwrapped import Unwrapped
from ds_sparkling.engine.optimizers.zero1_and_2 import Zero1And2
from ds_sparkling.engine.optimizers.zero3 import Zero3
from ds_sparkling.errors import UnsupportedError

#: The class of ``engine.optimizer``, or the nearest of its base classes -> its adapter.
ADAPTERS: dict[type, type[OptimizerAdapter]] = {
    DeepSpeedZeroOptimizer_Stage3: Zero3,
    DeepSpeedZeroOptimizer: Zero1And2,
    BF16_Optimizer: BF16,
    FP16_Optimizer: FP16,
    FP16_UnfusedOptimizer: UnfusedFP16,
    torch.optim.Optimizer: Unwrapped,
}


def adapter_of(engine: DeepSpeedEngine) -> OptimizerAdapter:
    """The adapter of the engine's optimizer.

    Raises:
        UnsupportedError: if there is none for its class, or if the engine has no optimizer.
    """
    if engine.optimizer is None:
        raise UnsupportedError("the engine has no optimizer, so there is no training to grow in the middle of")
    kind = type(engine.optimizer)
    for base in kind.__mro__:
        if base in ADAPTERS:
            return ADAPTERS[base](engine)
    known = ", ".join(adapted.__name__ for adapted in ADAPTERS)
    raise UnsupportedError(
        f"engine.optimizer is a {kind.__module__}.{kind.__qualname__}, and growing doesn't know where one keeps its "
        f"weights; known are {known}, and what is derived from them"
    )
