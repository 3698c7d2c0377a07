"""What each rank holds of every parameter and its optimizer state, in any of DeepSpeed's optimizers.

This file alone touches the attributes that DeepSpeed glues onto parameters and the private parts of its optimizers,
which were checked against the versions in :data:`CHECKED_VERSIONS`. Only probing, which doesn't know DeepSpeed, looks
whether there is such an attribute, to refuse parameters that are partitioned already.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ds_sparkling.engine.stale_references import leave_word
from ds_sparkling.errors import GrowthError, UnsupportedError
from ds_sparkling.monitoring.sampling import Grid
from ds_sparkling.optim.optimizer_trial import is_per_element
from ds_sparkling.optim.step_counters import same_numbers
from ds_sparkling.spec.partition import Piece, even_pieces, padded_piece, window_pieces

#: DeepSpeed versions whose internals this file was checked against.
CHECKED_VERSIONS = ("0.19.8",)

#: How the names of what ``engine.offload_states`` leaves in an optimizer's state end.
_OFFLOAD_BUFFER = "_offload_buffer"


def check_version() -> None:
    """Raise UnsupportedError on a DeepSpeed whose internals weren't checked."""
    if deepspeed.__version__.split("+")[0] not in CHECKED_VERSIONS:
        raise UnsupportedError(
            f"DeepSpeed {deepspeed.__version__} wasn't checked; growing reaches into its internals, which are known "
            f"for {', '.join(CHECKED_VERSIONS)}: pip install deepspeed=={CHECKED_VERSIONS[-1]}"
        )


#: What DeepSpeed writes into a checkpoint's model states, from where ``load_checkpoint`` returns nearly all of it as
#: the client's state, too.
_MODEL_STATES = {
    "buffer_names",
    "checkpoint_parallel_dimensions",
    "data_sampler",
    "dp_world_size",
    "ds_autoep_layers",
    "ds_config",
    "ds_version",
    "frozen_param_fragments",
    "frozen_param_shapes",
    "global_samples",
    "global_steps",
    "lr_scheduler",
    "module",
    "mp_world_size",
    "num_experts",
    "optimizer",
    "param_shapes",
    "random_ltd",
    "shared_params",
    "skipped_steps",
    "universal_checkpoint_info",
}


def clients_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a client state, as ``load_checkpoint`` returned it, isn't DeepSpeed's."""
    return {key: value for key, value in state.items() if key not in _MODEL_STATES}


@dataclass
class Shard:
    """What this rank holds of one parameter.

    Attributes:
        name: the parameter's name in the engine's module.
        shape: its shape on this rank's expert-parallel slice, before partitioning.
        pieces: which elements each rank of ``group`` owns.
        rank: this rank's index in ``group``.
        group: the process group the parameter is partitioned over; None if every rank holds all of it.
        weight: 1-D, the master weights of this rank's piece.
        padded: ``weight`` is padded at the end, so that every rank of the group holds equally many elements.
        master: the tensor the base optimizer steps, which ``weight`` is a part of; None for a frozen parameter.
        states: per-element optimizer state, 1-D like ``weight``, by the optimizer's own key.
        wholes: per-element state of the whole parameter, 1-D, on every rank that holds a part of it; empty on others.
        scalars: the rest of the optimizer state (step counters).
    """

    name: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    rank: int
    group: Any
    weight: Tensor
    padded: bool = False
    master: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    wholes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def piece(self) -> Piece:
        return self.pieces[self.rank]

    @property
    def offset(self) -> int:
        """Where ``weight`` begins in the master tensor."""
        assert self.master is not None
        return int(self.weight.storage_offset()) - int(self.master.storage_offset())

    def gather(self, part: Tensor, device: torch.device) -> Tensor:
        """The whole parameter (flattened) from every rank's ``part``, which is ``weight`` or one of ``states``.

        Collective over ``group``. The result may share storage with ``part`` where nothing has to be gathered.
        """
        numel = math.prod(self.shape)
        if self.group is None or len(self.pieces) == 1:
            return part[:numel].to(device)
        part = part.to(device)
        if self.padded:
            whole = torch.empty(part.numel() * len(self.pieces), dtype=part.dtype, device=device)
            dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)
            return whole[:numel]
        whole = torch.empty(numel, dtype=part.dtype, device=device)
        for rank, piece in enumerate(self.pieces):
            if piece.numel:
                target = whole[piece.start : piece.stop]
                if rank == self.rank:
                    target.copy_(part[: piece.numel])
                dist.broadcast(target, dist.get_global_rank(self.group, rank), group=self.group)
        return whole

    def held(self, part: Tensor, grid: Grid) -> Tensor:
        """The elements of ``grid`` that are in this rank's ``part``, 1-D; a view of it if the grid has all."""
        if grid.whole:
            return part[: self.piece.numel]
        indices = grid.flat()
        return part[(indices[self._among(indices)] - self.piece.start).to(part.device)]

    def sampled(self, held: Tensor, grid: Grid, device: torch.device) -> Tensor:
        """The elements of ``grid``, in its shape, from what every rank has :meth:`held` of them.

        Collective over ``group``; takes no more memory than the grid has elements.
        """
        sample = torch.zeros(grid.numel, dtype=held.dtype, device=device)
        own = slice(self.piece.start, self.piece.stop) if grid.whole else self._among(grid.flat())
        sample[own] = held.to(device)
        if self.group is not None and len(self.pieces) > 1:
            dist.all_reduce(sample, group=self.group)
        return sample.view(grid.counts)

    def _among(self, indices: Tensor) -> slice:
        """Where ascending indices into the flattened parameter lie in this rank's piece."""
        first, stop = torch.searchsorted(indices, torch.tensor([self.piece.start, self.piece.stop])).tolist()
        return slice(first, stop)

    def whole(self, key: str, device: torch.device) -> Tensor:
        """The whole of ``wholes[key]``, from the first rank that holds it. Collective over ``group``."""
        held = self.wholes[key]
        source = next(rank for rank, piece in enumerate(self.pieces) if piece.numel)
        if self.rank == source:
            whole = held.to(device)
        else:
            whole = torch.empty(math.prod(self.shape), dtype=held.dtype, device=device)
        if len(self.pieces) > 1:
            dist.broadcast(whole, dist.get_global_rank(self.group, source), group=self.group)
        return whole


def shards(engine: DeepSpeedEngine) -> dict[str, Shard]:
    """This rank's shard of every parameter of ``engine``, in the module's order.

    Raises:
        UnsupportedError: if the base optimizer keeps state that is neither per element nor a number.
    """
    names = {id(param): name for name, param in engine.module.named_parameters()}
    found = {shard.name: shard for shard in itertools.chain(_trained(engine, names), _frozen(engine, names))}
    return {name: found[name] for name in names.values()}


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape on this rank's expert-parallel slice, also while it is partitioned."""
    return tuple(getattr(param, "ds_shape", param.shape))


def ordinary_group(engine: DeepSpeedEngine, experts: Container[str]) -> Any:
    """The process group that stage 3 partitions parameters over, unless they are ``experts``; None on other stages."""
    param = next(param for name, param in engine.module.named_parameters() if name not in experts)
    return getattr(param, "ds_process_group", None)


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper (which may be the wrapper itself)."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def group_names(engine: DeepSpeedEngine) -> list[frozenset[str]]:
    """Which parameters each parameter group of the base optimizer trains, by name."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    members: list[set[str]] = [set() for _ in base_optimizer(engine).param_groups]
    for group, params in _param_groups(engine):
        members[group].update(names[id(param)] for param in params)
    return [frozenset(group) for group in members]


def master_groups(engine: DeepSpeedEngine) -> dict[Tensor, int]:
    """Every tensor that the base optimizer steps, in the order of DeepSpeed's, and the index of its parameter group."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    groups = {names[id(param)]: group for group, params in _param_groups(engine) for param in params}
    return {shard.master: groups[shard.name] for shard in _trained(engine, names) if shard.master is not None}


def make_states(engine: DeepSpeedEngine, templates: Mapping[str, Shard], *, drop: bool) -> None:
    """Give the fresh ``engine``'s base optimizer state tensors like those of ``templates``, zeroed.

    Numbers (step counters) are copied, or zeroed if ``drop``.

    Args:
        templates: shards of the old engine by parameter name.

    Raises:
        GrowthError: if parameters that now share one flat tensor were at different steps.
    """
    base = base_optimizer(engine)
    by_master: dict[int, tuple[Tensor, list[str]]] = {}
    numels: dict[str, int] = {}
    for shard in _trained(engine, {id(param): name for name, param in engine.module.named_parameters()}):
        assert shard.master is not None
        by_master.setdefault(id(shard.master), (shard.master, []))[1].append(shard.name)
        numels[shard.name] = math.prod(shard.shape) if shard.piece.numel else 0
    for master, members in by_master.values():
        template = templates[members[0]]
        for name in members[1:]:
            if not same_numbers(template.scalars, templates[name].scalars):
                raise GrowthError(
                    f"{template.name} and {name} are at different optimizer steps ({template.scalars} and "
                    f"{templates[name].scalars}) but share one flat tensor after the growth"
                )
        if not template.states and not template.scalars and not template.wholes:
            continue
        state = base.state[master]
        for key, old in template.states.items():
            made = state.get(key)
            if not isinstance(made, Tensor) or made.shape != master.shape or made.dtype != old.dtype:
                state[key] = torch.zeros_like(master, dtype=old.dtype, requires_grad=False)
            else:
                made.zero_()
        for key, held in template.wholes.items():
            size = sum(numels[name] for name in members)
            state[key] = torch.zeros(size, dtype=held.dtype, device=held.device)
        for key, value in template.scalars.items():
            copied = value.to(_step_device(value, master), copy=True) if isinstance(value, Tensor) else value
            state[key] = copied * 0 if drop else copied


def begin_writing(engine: DeepSpeedEngine) -> None:
    """Call before writing to the shards of a fresh engine."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def finish_writing(engine: DeepSpeedEngine) -> None:
    """Refresh the compute weights of ``engine`` from its master weights; without it they stay stale."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for compute, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            if compute.data_ptr() != master.data_ptr():
                compute.copy_(master)
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer.update_lp_params()
        if base_optimizer(engine).state:
            # DeepSpeed's own getters look the state up through this link, which it makes at the first step.
            optimizer._lazy_init_hp_params_optimizer_state()
    elif isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        by_id = {id(param): param for param in engine.module.parameters()}
        for shard in _trained(engine, {key: str(key) for key in by_id}):
            param = by_id[int(shard.name)]
            param.data.copy_(shard.weight.view(param.shape))


def strip(engine: DeepSpeedEngine) -> None:
    """Destroy ``engine`` and free its compute weights, gradients and buffers; shards taken before stay valid.

    The engine itself, its module, its optimizer and all parameters are left empty, and say so when they are used.
    """
    module, optimizer, base = engine.module, engine.optimizer, base_optimizer(engine)
    _keep_masters(engine)
    engine.destroy()
    for name, param in list(module.named_parameters()):
        param.grad = None
        if hasattr(param, "ds_tensor"):
            param.ds_tensor.data = param.ds_tensor.new_empty(0)
        param.data = param.data.new_empty(0)
        if nn.Parameter in type(param).__mro__:  # not other classes of tensors that torch counts as parameters
            leave_word(param, f"parameter ({name})", "the grown engine's module's")
    for wrapper in {id(held): held for held in (optimizer, base)}.values():
        leave_word(wrapper, "optimizer", "engine.optimizer of the grown engine")
    leave_word(module, "model", "engine.module of the grown engine")
    leave_word(engine, "engine", "the one that grow() returned")
    release_memory()


def _keep_masters(engine: DeepSpeedEngine) -> None:
    """Let page-locked master weights live as long as the shards do.

    Under stages 1 and 2 ``engine.destroy`` frees them at once if DS_PIN_MEMORY_BACKEND is native, whoever has views.
    """
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        for master in engine.optimizer.single_partition_of_fp32_groups:
            master.grad = None
        engine.optimizer.single_partition_of_fp32_groups = []


def release_memory() -> None:
    """Give back what DeepSpeed's reference cycles, the accelerator's caches and the C heap hold on to."""
    gc.collect()
    get_accelerator().empty_cache()
    if torch.accelerator.is_available():
        torch.accelerator.empty_host_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed host memory otherwise
    if trim is not None:
        trim(0)


# -- one function per kind of optimizer -------------------------------------------------------------------------


def _trained(engine: DeepSpeedEngine, names: Mapping[int, str]) -> Iterator[Shard]:
    """Shards of the trained parameters; ``names`` by ``id(param)``."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3(optimizer, names)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats = optimizer.single_partition_of_fp32_groups
        for i, params in enumerate(optimizer.round_robin_bit16_groups):
            offsets = optimizer.round_robin_bit16_offsets[i]
            yield from _windows(optimizer, names, params, offsets, flats[i], optimizer.real_dp_process_group[i])
    elif isinstance(optimizer, BF16_Optimizer):
        flats = optimizer.fp32_groups_flat_partition
        for i, params in enumerate(optimizer.bf16_groups):
            offsets = [0, *itertools.accumulate(param.numel() for param in params)][:-1]
            yield from _windows(optimizer, names, params, offsets, flats[i], optimizer.real_dp_process_group[i])
    elif isinstance(optimizer, FP16_Optimizer):
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for param in params:
                yield _whole(base_optimizer(engine), names[id(param)], param, flat, offset)
                offset += param.numel()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                yield _whole(base_optimizer(engine), names[id(param)], param, master, 0)
    else:
        for _, params in _param_groups(engine):
            for param in params:
                yield _whole(base_optimizer(engine), names[id(param)], param, param, 0)


def _param_groups(engine: DeepSpeedEngine) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """(index of the base optimizer's group, module parameters in it), several times per group under stage 3."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for sub_group, params in enumerate(optimizer.fp16_groups):
            yield optimizer.sub_group_to_group_id[sub_group], params
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from enumerate(optimizer.bit16_groups)
    elif isinstance(optimizer, BF16_Optimizer):
        yield from enumerate(optimizer.bf16_groups)
    elif isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        yield from enumerate(optimizer.fp16_groups)
    else:
        for index, group in enumerate(optimizer.param_groups):
            yield index, [param for param in group["params"] if param.requires_grad]


def _stage3(optimizer: DeepSpeedZeroOptimizer_Stage3, names: Mapping[int, str]) -> Iterator[Shard]:
    """Each parameter is cut evenly over its own group; a sub-group's pieces lie end to end in one flat tensor."""
    for sub_group, params in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        offset = 0
        for param in params:
            group = param.ds_process_group
            pieces = even_pieces(param.ds_numel, dist.get_world_size(group))
            size = param.partition_numel()
            if size != padded_piece(param.ds_numel, len(pieces)):
                raise UnsupportedError(
                    f"{names[id(param)]}: DeepSpeed's partition holds {size} elements, not an even cut"
                )
            weight = flat.data[offset : offset + size]
            rank = dist.get_rank(group)
            shard = Shard(names[id(param)], tuple(param.ds_shape), pieces, rank, group, weight, True, flat)
            yield _with_state(shard, optimizer.optimizer, offset)
            offset += size


def _windows(
    optimizer: DeepSpeedZeroOptimizer | BF16_Optimizer,
    names: Mapping[int, str],
    params: list[nn.Parameter],
    offsets: list[int],
    flat: Tensor,
    group: Any,
) -> Iterator[Shard]:
    """Stages 1 and 2: a rank's flat tensor is a window over the whole group's parameters, laid end to end."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    whole_offset = 0
    for param, offset in zip(params, offsets, strict=True):
        pieces = window_pieces(offset, param.numel(), flat.numel(), ranks)
        start = max(offset - rank * flat.numel(), 0) if pieces[rank].numel else 0
        weight = flat.data[start : start + pieces[rank].numel]
        shard = Shard(names[id(param)], tuple(param.shape), pieces, rank, group, weight, master=flat)
        whole_numel = param.numel() if pieces[rank].numel else 0
        # Muon orthogonalises whole matrices, so it keeps the momentum of all that touch the window, end to end; only
        # when it is offloaded it keeps that of the window.
        momentum = optimizer.optimizer.state.get(flat, {}).get("momentum_buffer")
        if momentum is not None and _is_muon(optimizer.optimizer) and not getattr(optimizer, "cpu_offload", False):
            shard.wholes["momentum_buffer"] = momentum[whole_offset : whole_offset + whole_numel]
        whole_offset += whole_numel
        yield _with_state(shard, optimizer.optimizer, start)


def _whole(base: torch.optim.Optimizer, name: str, param: nn.Parameter, master: Tensor, offset: int) -> Shard:
    """Without ZeRO: every rank holds all of the parameter."""
    numel = param.numel()
    weight = master.data.view(-1)[offset : offset + numel]
    return _with_state(Shard(name, tuple(param.shape), [Piece(0, numel)], 0, None, weight, master=master), base, offset)


def _frozen(engine: DeepSpeedEngine, names: Mapping[int, str]) -> Iterator[Shard]:
    """Shards of the parameters that no optimizer holds; their only weights are the compute weights."""
    for param in engine.module.parameters():
        if param.requires_grad and _numel(param):
            continue
        name = names[id(param)]
        if hasattr(param, "ds_tensor"):
            group = param.ds_process_group
            pieces = even_pieces(param.ds_numel, dist.get_world_size(group))
            weight = param.ds_tensor.view(-1)  # unlike .data it keeps page-locked memory from being freed
            yield Shard(name, tuple(param.ds_shape), pieces, dist.get_rank(group), group, weight, True)
        else:
            yield Shard(name, tuple(param.shape), [Piece(0, param.numel())], 0, None, param.data.view(-1))


def _is_muon(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "MuonWithAuxAdam"


def _numel(param: nn.Parameter) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _with_state(shard: Shard, base: torch.optim.Optimizer, offset: int) -> Shard:
    """Add the parts of the master tensor's optimizer state that belong to the shard."""
    master = shard.master
    assert master is not None
    for key, value in base.state.get(master, {}).items():
        if value is None or key in shard.wholes or key.endswith(_OFFLOAD_BUFFER):
            continue
        if is_per_element(base, key, value, master):
            shard.states[key] = value.view(-1)[offset : offset + shard.weight.numel()]
        else:
            shard.scalars[key] = value
    return shard


def _step_device(value: Tensor, master: Tensor) -> torch.device:
    """Where a number kept as a tensor belongs: with the master if it was, on the CPU if it was there."""
    return value.device if value.device.type == "cpu" else master.device
