"""Settings that growth can't be combined with, refused by name before anything is built or touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_sparkling.errors import UnsupportedError
from ds_sparkling.spec.config import value_at

Config = Mapping[str, Any]


@dataclass(frozen=True)
class When:
    """Which values of a setting are in the way.

    Attributes:
        holds: whether a value is.
        words: the same for the docs.
    """

    holds: Callable[[Any], bool]
    words: str


@dataclass(frozen=True)
class Refusal:
    """A setting of DeepSpeed's that growth can't be combined with.

    Attributes:
        path: its dotted place in the JSON.
        when: which values are in the way.
        what: what it is.
    """

    path: str
    when: When
    what: str


_ON = When(bool, "it is on")
_NVME = When(lambda value: value == "nvme", "it is `nvme`")
_NOT_ONE = When(lambda value: value != 1.0, "it isn't 1")
_ABOVE_ZERO = When(lambda value: isinstance(value, int) and value > 0, "it is above 0")
_ABOVE_ONE = When(lambda value: isinstance(value, int) and value > 1, "it is above 1")

#: The docs' table of support is made from these.
REFUSED: tuple[Refusal, ...] = (
    Refusal("zero_optimization.offload_optimizer.device", _NVME, "NVMe offload of the optimizer"),
    Refusal("zero_optimization.offload_param.device", _NVME, "NVMe offload of parameters"),
    Refusal("zero_optimization.offload_optimizer.ratio", _NOT_ONE, "partial optimizer offload (Twin-Flow)"),
    Refusal("zero_optimization.offload_optimizer.super_offload", _ON, "SuperOffload"),
    Refusal("zero_optimization.zenflow", _ON, "ZenFlow"),
    Refusal("zero_optimization.mics_shard_size", _ABOVE_ZERO, "MiCS"),
    Refusal("zero_optimization.zero_hpz_partition_size", _ABOVE_ONE, "hpZeRO"),
    Refusal("zero_optimization.zero_quantized_weights", _ON, "quantized weights (ZeRO++)"),
    Refusal("zero_optimization.zero_quantized_nontrainable_weights", _ON, "quantized weights (ZeRO++)"),
    Refusal("zero_optimization.zero_quantized_gradients", _ON, "quantized gradients (ZeRO++)"),
    Refusal("zero_optimization.elastic_checkpoint", _ON, "elastic checkpoints"),
    Refusal("tensor_parallel.autotp_size", _ABOVE_ONE, "tensor parallelism (AutoTP)"),
    Refusal("sequence_parallel_size", _ABOVE_ONE, "sequence parallelism"),
    Refusal("hybrid_engine.enabled", _ON, "the hybrid engine"),
    Refusal("compile.deepcompile", _ON, "DeepCompile"),
    Refusal("compression_training", _ON, "compression training"),
    Refusal("data_efficiency.enabled", _ON, "data efficiency (curriculum, random-LTD)"),
    Refusal("curriculum_learning.enabled", _ON, "curriculum learning"),
    Refusal("progressive_layer_drop.enabled", _ON, "progressive layer drop"),
    Refusal("eigenvalue.enabled", _ON, "eigenvalue-driven quantization"),
    Refusal("elasticity.enabled", _ON, "elastic training"),
)
REFUSED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam", "lamb")


def refuse_unsupported(config: Config) -> None:
    """Raise UnsupportedError for the first setting in the DeepSpeed config that growth can't be combined with."""
    for refusal in REFUSED:
        value = value_at(config, refusal.path)
        if value is not None and refusal.when.holds(value):
            raise UnsupportedError(
                f"{refusal.path} = {value!r}: {refusal.what} can't be combined with growth; switch it off"
            )
    optimizer = str(value_at(config, "optimizer.type", ""))
    if optimizer.lower() in REFUSED_OPTIMIZERS:
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
