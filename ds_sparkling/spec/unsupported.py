"""Settings that growth can't be combined with, refused by name before anything is built or touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ds_sparkling.errors import UnsupportedError
from ds_sparkling.spec.config import value_at

Config = Mapping[str, Any]


_TRUE: Callable[[Any], bool] = bool
_ABOVE_ONE: Callable[[Any], bool] = lambda value: isinstance(value, int) and value > 1  # noqa: E731

#: (path of the setting, when it is in the way, what it is)
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("zero_optimization.offload_optimizer.device", lambda v: v == "nvme", "NVMe offload of the optimizer"),
    ("zero_optimization.offload_param.device", lambda v: v == "nvme", "NVMe offload of parameters"),
    ("zero_optimization.offload_optimizer.ratio", lambda v: v != 1.0, "partial optimizer offload (Twin-Flow)"),
    ("zero_optimization.offload_optimizer.super_offload", _TRUE, "SuperOffload"),
    ("zero_optimization.zenflow", _TRUE, "ZenFlow"),
    ("zero_optimization.mics_shard_size", lambda v: isinstance(v, int) and v > 0, "MiCS"),
    ("zero_optimization.zero_hpz_partition_size", _ABOVE_ONE, "hpZeRO"),
    ("zero_optimization.zero_quantized_weights", _TRUE, "quantized weights (ZeRO++)"),
    ("zero_optimization.zero_quantized_nontrainable_weights", _TRUE, "quantized weights (ZeRO++)"),
    ("zero_optimization.zero_quantized_gradients", _TRUE, "quantized gradients (ZeRO++)"),
    ("zero_optimization.elastic_checkpoint", _TRUE, "elastic checkpoints"),
    ("tensor_parallel.autotp_size", _ABOVE_ONE, "tensor parallelism (AutoTP)"),
    ("sequence_parallel_size", _ABOVE_ONE, "sequence parallelism"),
    ("hybrid_engine.enabled", _TRUE, "the hybrid engine"),
    ("compile.deepcompile", _TRUE, "DeepCompile"),
    ("compression_training", _TRUE, "compression training"),
    ("data_efficiency.enabled", _TRUE, "data efficiency (curriculum, random-LTD)"),
    ("curriculum_learning.enabled", _TRUE, "curriculum learning"),
    ("progressive_layer_drop.enabled", _TRUE, "progressive layer drop"),
    ("eigenvalue.enabled", _TRUE, "eigenvalue-driven quantization"),
    ("elasticity.enabled", _TRUE, "elastic training"),
)
_REFUSED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam", "lamb")


def refuse_unsupported(config: Config) -> None:
    """Raise UnsupportedError for the first setting in the DeepSpeed config that growth can't be combined with."""
    for path, in_the_way, what in _REFUSED:
        value = value_at(config, path)
        if value is not None and in_the_way(value):
            raise UnsupportedError(f"{path} = {value!r}: {what} can't be combined with growth; switch it off")
    optimizer = str(value_at(config, "optimizer.type", ""))
    if optimizer.lower() in _REFUSED_OPTIMIZERS:
        raise UnsupportedError(
            f"optimizer.type = {optimizer!r} keeps state that isn't per element, so it can't be grown; use AdamW, "
            "Adam, SGD, Lion or Muon"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedError if ``torch.compile`` wraps the model or a part of it.

    While ``deepspeed.zero.Init`` partitions what is built, as it does under stage 3, such a wrapper never ends looking
    for its own attributes.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise UnsupportedError(
                f"build_model calls torch.compile ({name or 'the model itself'}), which can't be combined with ZeRO-3 "
                "while the model is built: leave it out, and call engine.compile() after initialize and after each "
                "growth; or call module.compile() in build_model, which compiles in place"
            )


def zero_stage(config: Config) -> int:
    """The ZeRO stage that a DeepSpeed config asks for."""
    return int(value_at(config, "zero_optimization.stage", 0))
