"""Bytes that one rank holds before, during and after a growth, and bytes that it receives on the way.

This counts what lasts, as DeepSpeed 0.19.8 lays it out: weights, fp32 master weights, optimizer state, gradients. It
doesn't count activations, communication buckets, weights that ZeRO-3 gathers in passing, the fp32 gradients of an
optimizer step, and what allocators waste. With d = data-parallel ranks, e = expert-parallel ranks, a dense parameter is
partitioned over d ranks and an expert's over d / e.

| ZeRO | weights | masters, state | gradients |
|---|---|---|---|
| 0 | whole | whole | whole |
| 1 | whole | partitioned | whole |
| 2 | whole | partitioned | partitioned |
| 3 | partitioned | partitioned | partitioned |

Without ZeRO, fp32 weights are their own masters. ZeRO-3 intends the same, but its check compares a device with a string
and never matches, so masters are always separate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.model import ParameterSize
from ds_sparkling.spec.partition import BUCKET, padded_piece

#: Bytes of an element in fp32, which masters and optimizer state are kept in.
_FP32 = 4
#: Two buckets are on their way at a time, each sent and received; what several ranks sent is put together once more.
_BUFFERS = 5


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a run is spread over its ranks.

    Attributes:
        ranks: data-parallel ranks, all of them.
        stage: of ZeRO, 0 to 3.
        expert_parallel: ranks that share one set of experts; 1 without AutoEP.
        weight_bytes: of an element of the compute weights (4 for fp32, 2 for bf16 and fp16).
        gradient_bytes: of an element of the accumulated gradients.
        states: fp32 tensors of optimizer state per parameter (2 for Adam).
        offload_optimizer: masters, state and their gradients live in host memory.
        offload_weights: ZeRO-3's partitioned weights live in host memory.
    """

    ranks: int
    stage: int
    expert_parallel: int = 1
    weight_bytes: int = 2
    gradient_bytes: int = 2
    states: int = 2
    offload_optimizer: bool = False
    offload_weights: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"there is no ZeRO stage {self.stage}; zero_optimization.stage (--zero) is 0, 1, 2 or 3")
        if self.ranks < 1 or self.expert_parallel < 1 or self.ranks % self.expert_parallel:
            raise ConfigError(
                f"{self.ranks} ranks can't be expert-parallel groups of {self.expert_parallel}; pass a --world-size "
                "that --expert-parallel (expert_parallel.autoep_size) divides"
            )
        if self.offload_optimizer and self.stage == 0:
            raise ConfigError("zero_optimization.offload_optimizer needs ZeRO stage 1, 2 or 3")
        if self.offload_weights and self.stage != 3:
            raise ConfigError("zero_optimization.offload_param needs ZeRO stage 3")

    def group(self, tensor: ParameterSize) -> int:
        """Ranks that ZeRO partitions a tensor over."""
        if self.stage == 0:
            return 1
        return self.ranks // self.expert_parallel if tensor.expert else self.ranks

    @property
    def own_masters(self) -> bool:
        """Whether masters are tensors of their own; otherwise the fp32 weights are their own masters."""
        return self.weight_bytes != _FP32 or self.stage > 0

    @property
    def gradients_stand(self) -> bool:
        """Whether a fresh engine has its gradient buffers before the first backward pass.

        That is so in ZeRO-3 and in DeepSpeed's BF16_Optimizer, which stands in for ZeRO-1 where bf16 gradients are
        accumulated in fp32.
        """
        mixed = self.weight_bytes != _FP32 and self.gradient_bytes == _FP32
        return self.stage == 3 or (self.stage == 1 and mixed and not self.offload_optimizer)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by what they are.

    Attributes:
        weights: compute weights.
        masters: fp32 master weights, where they are tensors of their own.
        state: the optimizer's.
        gradients: accumulated gradients, and with offload their fp32 copy.
        old: during a growth, what is kept of the old engine: masters and state.
        moving: during a growth, elements of the old engine on their way.
    """

    weights: int = 0
    masters: int = 0
    state: int = 0
    gradients: int = 0
    old: int = 0
    moving: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class Footprint:
    """What one rank holds on its device and in host memory; without a GPU both are the same memory."""

    device: Memory
    host: Memory

    @property
    def total(self) -> int:
        return self.device.total + self.host.total


def training(tensors: Sequence[ParameterSize], setting: Setting) -> Footprint:
    """What a rank holds while it trains."""
    weights = _weights(tensors, setting)
    piece = _piece(_trained(tensors), setting)
    masters = piece * _FP32 if setting.own_masters else 0
    state = piece * _FP32 * setting.states
    gradients = _gradients(tensors, setting)
    device = Memory(
        weights=0 if setting.offload_weights else weights, masters=masters, state=state, gradients=gradients
    )
    host = Memory(weights=weights if setting.offload_weights else 0)
    if setting.offload_optimizer:
        device = replace(device, masters=0, state=0, gradients=gradients if setting.stage == 1 else 0)
        host = replace(host, masters=masters, state=state, gradients=_offloaded_gradients(piece, setting))
    return Footprint(device, host)


def growing(before: Sequence[ParameterSize], after: Sequence[ParameterSize], setting: Setting) -> Footprint:
    """What a rank holds at the peak of a growth: the old masters and state, the new engine, tensors on their way.

    Args:
        before: the rank's tensors in the narrow model.
        after: the same tensors in the wide model.
    """
    new = training(after, setting)
    frozen = [tensor for tensor in before if not tensor.trained]
    old_state = _piece(_trained(before), setting) * _FP32 * (1 + setting.states)
    old_frozen = _weights(frozen, setting)
    device = replace(new.device, moving=_on_the_way(before, after, setting))
    host = new.host
    if not setting.gradients_stand:
        device = replace(device, gradients=0)
    if setting.offload_optimizer:
        host = replace(host, old=old_state)
    else:
        device = replace(device, old=old_state)
    if setting.offload_weights:
        host = replace(host, old=host.old + old_frozen)
    else:
        device = replace(device, old=device.old + old_frozen)
    return Footprint(device, host)


def built_whole(parameters: int, setting: Setting) -> int:
    """Bytes of host memory that each rank fills with the model as ``build_model`` makes it, all experts, in fp32.

    Under ZeRO-3 parameters are partitioned one by one as they are made.
    """
    return 0 if setting.stage == 3 else parameters * _FP32


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives from others, and writes to files.

    Attributes:
        start: the fresh engine's weights, which DeepSpeed broadcasts although they are then overwritten.
        moved: old weights and optimizer state, at most one old element for each that the rank has in the wide model.
        refreshed: compute weights gathered from the grown masters (stages 1 and 2).
        checkpoint: written to files just before the growth.
    """

    start: int
    moved: int
    refreshed: int
    checkpoint: int

    @property
    def received(self) -> int:
        return self.start + self.moved + self.refreshed


def traffic(
    before: Sequence[ParameterSize], after: Sequence[ParameterSize], built: int, setting: Setting, *, checkpoint: bool
) -> Traffic:
    """What a growth sends to the rank that receives most.

    Args:
        before: the rank's tensors in the narrow model.
        after: those in the wide one.
        built: elements of the wide model with all its experts, which ZeRO-3 broadcasts as it is made.
        checkpoint: whether a checkpoint is saved before the growth.
    """
    moved = _moved(_trained(before), _trained(after), setting) * _FP32 * (1 + setting.states)
    if setting.stage == 3:
        frozen, wide = ([tensor for tensor in tensors if not tensor.trained] for tensors in (before, after))
        moved += _moved(frozen, wide, setting) * setting.weight_bytes
    refreshed = _received(_trained(after), setting) * setting.weight_bytes if setting.stage in (1, 2) else 0
    # Without ZeRO too, experts are alike on ranks / expert_parallel ranks only.
    shared = [tensor for tensor in after if not tensor.expert or setting.ranks > setting.expert_parallel]
    broadcast = built if setting.stage == 3 else sum(tensor.numel for tensor in shared)
    start = broadcast * setting.weight_bytes if setting.ranks > 1 else 0
    held = training(before, setting)
    saved = held.total - held.device.gradients - held.host.gradients if checkpoint else 0
    return Traffic(start, moved, refreshed, saved)


def _trained(tensors: Iterable[ParameterSize]) -> list[ParameterSize]:
    return [tensor for tensor in tensors if tensor.trained]


def _weights(tensors: Sequence[ParameterSize], setting: Setting) -> int:
    """Bytes of compute weights."""
    numel = _piece(tensors, setting) if setting.stage == 3 else sum(tensor.numel for tensor in tensors)
    return numel * setting.weight_bytes


def _gradients(tensors: Sequence[ParameterSize], setting: Setting) -> int:
    trained = _trained(tensors)
    numel = sum(tensor.numel for tensor in trained) if setting.stage < 2 else _piece(trained, setting)
    return numel * setting.gradient_bytes


def _offloaded_gradients(piece: int, setting: Setting) -> int:
    """fp32 gradients beside the masters, and a buffer in the accumulation's (stage 3) or the weights' dtype."""
    return piece * (_FP32 + (setting.gradient_bytes if setting.stage == 3 else setting.weight_bytes))


def _flat_numels(tensors: Sequence[ParameterSize], setting: Setting) -> list[tuple[int, int]]:
    """(elements, ranks) of everything that is partitioned as one.

    ZeRO-3 partitions every parameter for itself; stages 1 and 2 lay all dense ones end to end, and all of the experts.
    """
    if setting.stage in (0, 3):
        return [(tensor.numel, setting.group(tensor)) for tensor in tensors]
    flats: dict[int, int] = {}
    for tensor in tensors:
        flats[setting.group(tensor)] = flats.get(setting.group(tensor), 0) + tensor.numel
    return [(numel, ranks) for ranks, numel in flats.items()]


def _piece(tensors: Sequence[ParameterSize], setting: Setting) -> int:
    """Elements that a rank owns of partitioned tensors, padding included."""
    return sum(padded_piece(numel, ranks) for numel, ranks in _flat_numels(tensors, setting))


def _received(tensors: Sequence[ParameterSize], setting: Setting) -> int:
    """Elements that the others own, which a rank gets when every tensor is gathered once."""
    return sum((ranks - 1) * padded_piece(numel, ranks) for numel, ranks in _flat_numels(tensors, setting))


def _moved(before: Sequence[ParameterSize], after: Sequence[ParameterSize], setting: Setting) -> int:
    """Elements that a rank gets from others at most: one for each of its own to be, and what others have of it."""
    numels = zip(_flat_numels(before, setting), _flat_numels(after, setting), strict=True)
    return sum(
        min(padded_piece(wide, ranks), (ranks - 1) * padded_piece(old, ranks)) for (old, ranks), (wide, _) in numels
    )


def _on_the_way(before: Sequence[ParameterSize], after: Sequence[ParameterSize], setting: Setting) -> int:
    """Bytes of old elements on their way, and with offload of those that pass through the device."""
    shared = [tensor for tensor in after if setting.group(tensor) > 1 and (tensor.trained or setting.stage == 3)]
    bucket = min(BUCKET, _piece(shared, setting))
    buffers = _BUFFERS + (1 if setting.offload_optimizer else 0)
    whole = (
        old.numel + wide.numel
        for old, wide in zip(before, after, strict=True)
        if setting.offload_optimizer and old.trained and setting.group(old) == 1
    )
    return max(buffers * bucket, *whole, 0) * _FP32
