"""What the transformers library has to know, and not to know, while its models are built."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ds_sparkling.zero.support import zero_stage


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
def weights_initialized(config: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers initialize the weights of a model that ``deepspeed.zero.Init`` partitions while it is built.

    It does so only while an ``HfDeepSpeedConfig`` is alive (which takes accelerate); the weights would be left as the
    memory was.
    """
    integration = sys.modules.get("transformers.integrations.deepspeed")
    unknown = integration is not None and integration.deepspeed_config() is None
    if not unknown or zero_stage(config) != 3 or importlib.util.find_spec("accelerate") is None:
        yield
        return
    assert integration is not None
    alive = integration.HfDeepSpeedConfig(copy.deepcopy(dict(config)))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del alive
