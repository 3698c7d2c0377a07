"""Tell the transformers library what it has to know, and hide what it must not know, while its models are built."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import nn

from ds_sparkling.engine.hooks import INITIALIZE_WEIGHTS


@contextmanager
def built_plainly() -> Iterator[None]:
    """Keep transformers from partitioning what it builds, because it is built on the meta device for its shapes alone.

    It would while a DeepSpeed config of its own is alive, a Trainer's for instance.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        yield
        return
    with modeling.set_zero3_state():
        yield


@contextmanager
def weights_initialized() -> Iterator[None]:
    """Have transformers initialize the weights of a model that ``deepspeed.zero.Init`` partitions while it is built.

    It does so at the end of a model's constructor, when the parameters have been partitioned and what is left of them
    is empty: weights would stay what the modules' constructors leave, and stacked experts uninitialised memory. Within
    this context each module's parameters are gathered for it, and all ranks get the first one's. While a DeepSpeed
    config of transformers' own is alive it gathers by itself.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or transformers.integrations.is_deepspeed_zero3_enabled():
        yield
        return
    pretrained = transformers.PreTrainedModel
    initialize = getattr(pretrained, INITIALIZE_WEIGHTS.attribute)

    def gathered(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)), modifier_rank=0):
            return initialize(model, module, *args, **kwargs)

    with INITIALIZE_WEIGHTS.during(pretrained, gathered):
        yield
