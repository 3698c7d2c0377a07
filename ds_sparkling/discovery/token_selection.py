"""Find out which of its tokens a model selects, and make a small instance long enough to select as well.

A sliding window, the best tokens of an indexer, chunks of attention and the capacity of an expert do nothing as long as
there are fewer tokens than they let through. So the small instances of a config let fewer through, and a model that
can't be built otherwise is run on more tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ds_sparkling.discovery.forward import LENGTH, SEQUENCES

#: What sizes of selections are called.
_SELECTION = re.compile(
    r"(.*_)?(window|window_size|window_len|window_length|local|local_size|local_attention|span|look_?back"
    r"|attention_chunk_size|attn_chunk_size|top_?k|top_?k_tokens|k|capacity|keep|kept|selected|budget)"
)
#: Those of a config that count tokens, and not experts or groups of them, and rates that tokens are put together by.
_OF_TOKENS = re.compile(
    r"(.*_)?(window|window_size|local_attention|attention_chunk_size|capacity)|index_top_?k.*|compress_rates?.*"
)
#: What rates are called by which tokens are put together, before some are selected.
_RATE = re.compile(r"(.*_)?compress(ion)?_(rate|ratio|factor)s?")
#: What is let through in a small instance.
_FEW = 4
#: Multiplications and additions, with the weights that aren't looked up, that a forward pass is lengthened to at most.
_WORK = 400_000_000
#: Tokens per sequence at most.
_MOST = 2048


def selecting(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a resolved config so that some tokens suffice for every selection."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if not _OF_TOKENS.fullmatch(key):
            continue
        if _counts(value) and value > _FEW:
            changed[key] = _FEW
        elif isinstance(value, Mapping) and all(map(_counts, value.values())) and max(value.values(), default=0) > _FEW:
            changed[key] = {name: min(rate, _FEW) for name, rate in value.items()}
    return changed


def enough_tokens(model: nn.Module) -> int:
    """Tokens per sequence with which most selections of a model act, as far as that doesn't take long."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    work = SEQUENCES * sum(param.numel() for param in model.parameters() if id(param) not in looked_up)
    most = min(_MOST, _WORK // max(work, 1))
    together = max(_sizes(model, _RATE), default=1)
    return max((2 * size * together for size in _sizes(model) if 2 * size * together <= most), default=LENGTH)


def selects(model: nn.Module) -> bool:
    """Whether a model has selections at all."""
    return next(_sizes(model), None) is not None


def _sizes(model: nn.Module, called: re.Pattern[str] = _SELECTION) -> Iterator[int]:
    for owner in (*model.modules(), getattr(model, "config", None)):
        for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
            if called.fullmatch(name) and _counts(value):
                yield value


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
