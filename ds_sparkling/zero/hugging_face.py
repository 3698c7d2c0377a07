"""Hugging Face models built under ``zero.Init``: their initial weights would get lost there.

``transformers`` initialises a model at the end of its constructor. By then ``zero.Init`` has partitioned the parameters
and left empty tensors, which are initialised in vain: weights would stay what the modules' constructors leave, and
stacked experts uninitialised memory. DeepSpeed gathers what ``Module.apply`` visits, but transformers visits by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import nn


@contextmanager
def gathered_initialization() -> Iterator[None]:
    """Within it, transformers initialises each module's parameters gathered, all ranks getting the first one's.

    Nothing happens if transformers isn't imported, or knows about ZeRO-3 and does so itself (under its Trainer).
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or transformers.integrations.is_deepspeed_zero3_enabled():
        yield
        return
    pretrained = transformers.PreTrainedModel
    initialize = pretrained._initialize_weights

    def gathered(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = list(module.parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
            return initialize(model, module, *args, **kwargs)

    pretrained._initialize_weights = gathered
    try:
        yield
    finally:
        pretrained._initialize_weights = initialize
