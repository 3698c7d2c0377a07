"""What the ranks do for ``benchmarks/families.py``: train, grow in place, and load what was grown as files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor

import ds_sparkling
from ds_sparkling.checkpoint.expand import expand, prepare
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.discovery.factory import HuggingFaceFactory

_STEPS = 3
#: So large that biases and gains, which start at zero and one, come to matter within three steps.
_RATE = 0.05


def join(rank: int, ranks: int, port: int) -> None:
    """Make this process one of the world's ranks."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def grow_both_ways(
    config: Mapping[str, Any], preset: str | None, after: Mapping[str, int], scratch: Path
) -> dict[str, float]:
    """Train a model, grow it in place and as files; how far the logits are off, by room. Collective.

    Args:
        config: the narrow model's ``config.json``.
        preset: DeepSpeed's preset for its experts, if any.
        after: the axes that grow.
        scratch: a directory of this job's own, the same on all ranks.
    """
    settings = _settings(preset)
    tokens = torch.randint(3, config["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    engine = ds_sparkling.initialize(runnable(HuggingFaceFactory(config)), settings)
    for _ in range(_STEPS):
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
    narrow = _logits(engine, tokens)
    engine.save_checkpoint(str(scratch / "narrow"))
    engine = ds_sparkling.grow(engine, after)
    live = _logits(engine, tokens)
    engine.destroy()
    if dist.get_rank() == 0:
        (scratch / "config.json").write_text(json.dumps(dict(config)))
        request = Request(
            checkpoint=scratch / "narrow", out=scratch / "wide", widths=dict(after), config=str(scratch / "config.json")
        )
        with Team() as team:
            expand(prepare(request, team), team)
    dist.barrier()
    model = runnable(HuggingFaceFactory(config))(**after)
    loaded, *_ = deepspeed.initialize(model=model, config=settings)
    loaded.load_checkpoint(str(scratch / "wide"))
    offline = _logits(loaded, tokens)
    loaded.destroy()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(scratch)
    # DeepSpeed would take the largest expert-parallel group that any earlier engine made.
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()
        getattr(groups, f"{name}_RANKS").clear()
    return {"engine": _difference(narrow, live), "offline": _difference(narrow, offline)}


def _settings(preset: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": _RATE, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "sparkling": {"checkpoint_before_growth": False},
        "steps_per_print": 10**9,
    }
    if preset is not None:
        settings["expert_parallel"] = {
            "enabled": True,
            "autoep_size": dist.get_world_size(),
            "preset_model": preset,
            "use_grouped_mm": False,  # needs sizes that are multiples of 16 bytes
        }
    return settings


def runnable(factory: HuggingFaceFactory) -> Callable[..., Any]:
    """The factory, with experts that run in every dtype and size where AutoEP leaves them as they are."""

    def build_model(**widths: int) -> Any:
        model = factory(**widths)
        model.set_experts_implementation("eager")
        return model

    return build_model


def _logits(engine: Any, tokens: Tensor) -> Tensor:
    engine.eval()
    with torch.no_grad():
        logits: Tensor = engine(input_ids=tokens, use_cache=False).logits.float()
    engine.train()
    return logits


def _difference(narrow: Tensor, wide: Tensor) -> float:
    """Largest difference over the largest logit, of the old vocabulary."""
    return float((wide[..., : narrow.shape[-1]] - narrow).abs().max() / narrow.abs().max())
