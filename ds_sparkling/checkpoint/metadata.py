"""Read DeepSpeed's metadata of a checkpoint: its layout, its experts, and whether all of that is known here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ds_sparkling.checkpoint.layout import Group, Layout, Param, Settings, Shape, make_layout
from ds_sparkling.errors import CheckpointError, UnsupportedError
from ds_sparkling.spec.partition import round_robin

#: DeepSpeed versions whose files were checked.
CHECKED_VERSIONS = ("0.19.8",)

#: Ways of splitting a run that aren't supported.
PIPELINE = "pipeline parallelism (PipelineModule)"
TENSOR = "tensor or model parallelism (AutoTP, tp_model_init, Megatron)"
SEQUENCE = "sequence parallelism (Ulysses)"

#: The three weights of AutoEP's experts.
EXPERT_WEIGHTS = ("w1", "w2", "w3")

#: More ranks, and more experts of a layer, than any run has. What claims more is damaged, or meant to do harm.
MOST = 2**18
#: What compute weights may be in.
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertLayer:
    """One layer that AutoEP has rewritten.

    Attributes:
        number: its ``moe_layer_id``.
        path: of its module.
        prefix: of its weights' names.
        experts: how many there are in all.
    """

    number: int
    path: str
    prefix: str
    experts: int

    @property
    def names(self) -> list[str]:
        return [f"{self.prefix}.{weight}" for weight in EXPERT_WEIGHTS]


def require(where: object, content: Any, keys: Mapping[str, type]) -> None:
    """Raise CheckpointError unless ``content`` is a mapping with these keys, of these kinds."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(content).__name__}, expected a mapping{' with ' if keys else ''}{', '.join(keys)}"
        )
    for key, kind in keys.items():
        if not isinstance(content.get(key), kind) or (kind is int and isinstance(content[key], bool)):
            raise CheckpointError(f"{where}: {key} is {content.get(key)!r:.80}, expected a {kind.__name__}")


def require_count(where: object, content: Mapping[str, Any], key: str, least: int) -> int:
    """The count under ``key``, which is the size of what is looked at next.

    Raises:
        CheckpointError: if it isn't a whole number from ``least`` to :data:`MOST`.
    """
    require(where, content, {key: int})
    count: int = content[key]
    if not least <= count <= MOST:
        raise CheckpointError(f"{where}: {key} is {count!r:.80}, expected {least} to {MOST}")
    return count


def check_version(where: object, state: Mapping[str, Any]) -> None:
    """Raise UnsupportedError on files of a DeepSpeed that wasn't checked."""
    version = str(state.get("ds_version"))
    if version.split("+")[0] not in CHECKED_VERSIONS:
        raise UnsupportedError(
            f"{where} was written by DeepSpeed {version}, whose layout wasn't checked; known: "
            f"{', '.join(CHECKED_VERSIONS)}"
        )


def expert_layers(model: Mapping[str, Any]) -> list[ExpertLayer]:
    """The AutoEP layers that a model states file tells about."""
    return [
        ExpertLayer(entry["moe_layer_id"], entry["module_path"], entry["expert_key_prefix"], entry["num_experts"])
        for entry in model.get("ds_autoep_layers") or []
    ]


def expert_parallel(where: object, model: Mapping[str, Any]) -> int:
    """The size of the expert-parallel groups.

    Raises:
        UnsupportedError: if experts aren't placed in order, equally many on each rank.
    """
    sizes = set()
    for entry in model.get("ds_autoep_layers") or []:
        size, experts = entry["ep_size"], entry["num_experts"]
        placement = entry.get("expert_placement")
        expected = [rank["experts"] for rank in _placement(experts, size)]
        if experts % size or (placement and [rank["experts"] for rank in placement["ranks"]] != expected):
            raise UnsupportedError(
                f"{where}: the experts of {entry['module_path']} aren't placed in order and evenly over {size} ranks"
            )
        sizes.add(size)
    if len(sizes) > 1:
        raise UnsupportedError(f"{where}: layers with different expert-parallel sizes {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def unsupported(where: object, what: str) -> UnsupportedError:
    """The error for checkpoints of runs that were split or set up in a way that isn't known here."""
    return UnsupportedError(f"{where}: checkpoints with {what} aren't supported")


def refuse_unknown(where: object, model: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for checkpoints with a layout that isn't known here."""
    config = model.get("ds_config") or {}
    require(f"{where}: ds_config", config, {})
    zero = config.get("zero_optimization") or {}
    require(f"{where}: zero_optimization in ds_config", zero, {})
    tensor_parallel = config.get("tensor_parallel") or {}
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    tensors_cut = model.get("mp_world_size", 1) != 1
    in_layers = "module" in model and model["module"] is None and zero.get("stage", 0) < 2  # all that pipelines take
    reasons = {
        PIPELINE: degrees.get("pp_degree", 1) > 1 or in_layers,
        TENSOR: tensors_cut
        or max(tensor_parallel.get("autotp_size") or 0, (tensor_parallel.get("tp") or {}).get("tp_size") or 0) > 1,
        # DeepSpeed takes the ranks of a sequence for tensor-parallel ones here, but doesn't cut anything.
        SEQUENCE: (config.get("sequence_parallel_size") or 1) > 1 or degrees.get("tp_degree", 1) > 1,
        "native DeepSpeed MoE layers": bool(model.get("num_experts")) and not model.get("ds_autoep_layers"),
        "AutoEP folded with tensor parallelism": "folding_metadata" in model,
        "use_data_before_expert_parallelism": bool(config.get("use_data_before_expert_parallelism")),
        "zero_optimization.elastic_checkpoint": bool(zero.get("elastic_checkpoint")),
        "zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) not in (None, 1),
        "mics_shard_size": zero.get("mics_shard_size", -1) not in (None, -1),
        "zero_quantized_nontrainable_weights": bool(zero.get("zero_quantized_nontrainable_weights")),
        "zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "NVMe offload": "nvme" in (_device(zero, "offload_optimizer"), _device(zero, "offload_param")),
    }
    for reason, found in reasons.items():
        if found:
            raise unsupported(where, reason)


def read_layout(where: object, model: Mapping[str, Any], groups: list[dict[str, Any]], stage: int) -> Layout:
    """The layout that rank 0's metadata tells.

    Args:
        model: the model states of rank 0.
        groups: the base optimizer's ``param_groups``.
        stage: the ZeRO stage.

    Raises:
        CheckpointError: if the metadata contradicts itself.
        UnsupportedError: if the layout isn't known here.
    """
    require(where, model, {})
    refuse_unknown(where, model)
    require(where, model, {"module": Mapping, "global_steps": int, "param_shapes": list})
    if model["global_steps"] < 0:
        raise CheckpointError(f"{where}: global_steps is {model['global_steps']!r:.80}")
    check_version(where, model)
    _check_shapes(where, model)
    config = model.get("ds_config") or {}
    zero = config.get("zero_optimization") or {}
    ranks = require_count(where, model, "dp_world_size", 1)
    _check_expert_layers(where, model)
    shared = expert_parallel(where, model)
    if ranks % shared:
        raise CheckpointError(f"{where}: {ranks} ranks can't be expert-parallel groups of {shared}")
    settings = Settings(
        stage=stage,
        ranks=ranks,
        expert_parallel=shared,
        sub_group_size=_sub_group_size(where, zero),
        round_robin=bool(zero.get("round_robin_gradients", False)) and stage < 3,
        parameter_alignment=bool(zero.get("parameter_alignment", False)) and stage < 3,
        offloaded=_device(zero, "offload_optimizer") != "none" or bool(zero.get("cpu_offload")),
    )
    shapes = list(model["param_shapes"] or [])
    params = _params(model, shared)
    _check_params(where, model, params)
    for index, group in enumerate(groups):
        require(f"{where}: param_groups[{index}] of the optimizer", group, {"params": list})
    if sum(len(group["params"]) for group in groups) != len(shapes):
        raise CheckpointError(
            f"{where}: {len(shapes)} lists of param_shapes for "
            f"{sum(len(group['params']) for group in groups)} flat tensors of the optimizer"
        )
    made = []
    lists = iter(shapes)
    for group in groups:
        names = [name for _ in group["params"] for name in next(lists)]
        if settings.round_robin and names:
            names = _dealt_back(names, settings.parts(expert=params[names[0]].expert))
        made.append(Group({key: value for key, value in group.items() if key != "params"}, tuple(names)))
    found = [list(entry) for entry in shapes]
    routers = tuple(f"{layer.path}.router." for layer in expert_layers(model))
    for apart in (frozenset(), frozenset(name for name in params if name.startswith(routers))):
        layout = make_layout(replace(settings, apart=apart), params, made)
        if found == [list(flat.names) for flat in layout.flats]:
            return layout
    raise CheckpointError(
        f"{where}: param_shapes doesn't have the order of ZeRO-{stage} with the ds_config in it (sub_group_size "
        f"{settings.sub_group_size}); was the config changed after the engine was made?"
    )


def master_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Of the master weights, by a DeepSpeed config."""
    bf16, fp16 = config.get("bf16") or config.get("bfloat16") or {}, config.get("fp16") or {}
    if bf16.get("bf16_master_weights_and_grads"):
        return torch.bfloat16
    return torch.float16 if fp16.get("fp16_master_weights_and_grads") else torch.float32


def _sub_group_size(where: object, zero: Mapping[str, Any]) -> int:
    given = zero.get("sub_group_size", 10**9)
    try:
        size = float(given)
    except (TypeError, ValueError, OverflowError):
        size = math.nan
    if not 0 <= size < math.inf:
        raise CheckpointError(
            f"{where}: zero_optimization.sub_group_size in ds_config is {given!r:.80}, expected a number of elements"
        )
    return int(size)


def _check_expert_layers(where: object, model: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every AutoEP layer tells what is read of it, within bounds."""
    require(where, {"layers": model.get("ds_autoep_layers") or []}, {"layers": list})
    for index, entry in enumerate(model.get("ds_autoep_layers") or []):
        here = f"{where}: ds_autoep_layers[{index}]"
        kinds = {"moe_layer_id": int, "module_path": str, "expert_key_prefix": str, "affine_maps": Mapping}
        require(here, entry, {**kinds, "expert_placement": Mapping})
        experts, size = require_count(here, entry, "num_experts", 1), require_count(here, entry, "ep_size", 1)
        for name, shape in itertools.chain.from_iterable(shapes.items() for shapes in model["param_shapes"]):
            if name.startswith(f"{entry['expert_key_prefix']}.w") and shape[:1] and shape[0] * size != experts:
                raise CheckpointError(
                    f"{here}: num_experts is {experts} and ep_size {size}, but each rank has {shape[0]} of {name:.200}"
                )
        require(f"{here}: affine_maps", entry["affine_maps"], {"params": Mapping})
        for name, known in entry["affine_maps"]["params"].items():
            require(f"{here}: affine_maps of {name!r:.80}", known, {})
            _check_shape(here, name, known.get("logical_shape"))


def _check_shapes(where: object, model: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``param_shapes`` and ``frozen_param_shapes`` are shapes of different parameters."""
    frozen = model.get("frozen_param_shapes") or {}
    require(f"{where}: frozen_param_shapes", frozen, {})
    seen = set()
    for shapes in (*model["param_shapes"], frozen):
        require(f"{where}: param_shapes", shapes, {})
        for name, shape in shapes.items():
            _check_shape(where, name, shape)
            if name in seen:
                raise CheckpointError(f"{where}: {name:.200} is in param_shapes and frozen_param_shapes twice")
            seen.add(name)


def _check_shape(where: object, name: Any, shape: Any) -> None:
    """Raise CheckpointError unless a parameter has a name and a shape that there can be."""
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: the parameter name {name!r:.80} isn't a string")
    sizes = isinstance(shape, (list, tuple)) and all(type(size) is int and 0 <= size < 2**63 for size in shape)
    if not sizes or math.prod(shape) >= 2**63:
        raise CheckpointError(f"{where}: the shape of {name:.200} is {shape!r:.80}, expected whole sizes")


def _check_params(where: object, model: Mapping[str, Any], params: Mapping[str, Param]) -> None:
    """Raise CheckpointError unless the module has every parameter, in a dtype to compute in, and every expert."""
    experts = {name: layer for layer in expert_layers(model) for name in layer.names}
    for name in itertools.chain(*model["param_shapes"], model.get("frozen_param_shapes") or {}):
        if name not in model["module"] and name not in experts:
            raise CheckpointError(f"{where}: module has no {name:.200}, of which there is a shape")
        if params[name].trained and params[name].dtype not in _COMPUTE_DTYPES:
            raise CheckpointError(f"{where}: {name:.200} is trained, but in {params[name].dtype}")
    for name, layer in experts.items():
        shape = params[name].shape if name in params else ()
        if shape[:1] != (layer.experts,) or not math.prod(shape):
            raise CheckpointError(
                f"{where}: num_experts of {layer.path:.200} is {layer.experts}, but the shape of {name:.200} is "
                f"{shape}, all experts counted"
            )


def shared_names(model: Mapping[str, Any]) -> dict[str, str]:
    """Further names in the module for what is stored under another: tied parameters, and AutoEP's routers.

    ``shared_params`` has most of them, but says nothing of a module that its parent holds under two names, nor of a
    router that AutoEP registers under its old name, too. Where stage 3 stores nothing in the module, what such a name
    stands for can't be told, and nobody needs it: then it is "".
    """
    shared = dict(model.get("shared_params") or {})
    module = model["module"]
    listed = {name for names in model["param_shapes"] or [] for name in names}
    listed |= {*(model.get("frozen_param_shapes") or {}), *(model.get("buffer_names") or [])}
    places = {_place(module[name]): name for name in reversed([*module]) if name in listed}
    for name, tensor in module.items():
        if isinstance(tensor, torch.Tensor) and name not in listed and _place(tensor) in places:
            shared.setdefault(name, places[_place(tensor)] if tensor.numel() else "")
    for layer in expert_layers(model):
        for name in module:
            part, _, rest = name.removeprefix(f"{layer.path}.").partition(".")
            router = f"{layer.path}.router.{rest}"
            if name.startswith(f"{layer.path}.") and part not in ("router", "experts") and router in module:
                shared[name] = router
    return shared


def _place(tensor: Any) -> tuple[Any, ...]:
    """Where a tensor lies in its file, and as what; all those without elements are in one place."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (0,)


def buffer_shapes(model: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of every buffer in the module's state dict."""
    names = [name for name in model.get("buffer_names") or [] if name in model["module"]]
    return {name: tuple(model["module"][name].shape) for name in names}


def logical(shape: Any, expert: bool, shared: int) -> Shape:
    """The shape of all experts from that of one expert-parallel rank's."""
    shape = tuple(int(size) for size in shape)
    return (shape[0] * shared, *shape[1:]) if expert else shape


def _params(model: Mapping[str, Any], shared: int) -> dict[str, Param]:
    """Every parameter, in the module's order; the experts, which aren't in its state dict, at the end."""
    experts = {name: None for layer in expert_layers(model) for name in layer.names}
    module = model["module"]
    tied = shared_names(model)
    routers = {name: f"{layer.path}.router.gate.weight" for layer in expert_layers(model) for name in layer.names}

    def param(name: str, shape: Any, trained: bool) -> Param:
        # The experts aren't in the module's state dict, but their router is, in the same dtype.
        kept = module.get(name, module.get(routers.get(name)))
        dtype = torch.float32 if kept is None else kept.dtype
        return Param(name, logical(shape, name in experts, shared), dtype, name in experts, trained)

    params = {
        name: param(name, shape, trained=True)
        for shapes in model["param_shapes"] or []
        for name, shape in shapes.items()
    }
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        params[name] = param(name, shape, trained=False)
    buffers = set(model.get("buffer_names") or [])
    for name, tensor in module.items():
        if name not in params and name not in buffers and name not in tied and isinstance(tensor, torch.Tensor):
            params[name] = param(name, tensor.shape, trained=False)
    for entry in model.get("ds_autoep_layers") or []:  # frozen experts, of which param_shapes may know nothing
        for name, known in entry["affine_maps"]["params"].items():
            if name not in params:
                shape = (known["logical_shape"][0] // shared, *known["logical_shape"][1:])
                params[name] = param(name, shape, trained=False)
    ordered = [name for name in (*module, *experts) if name in params]
    return {name: params[name] for name in dict.fromkeys([*ordered, *params])}


def _dealt_back(names: list[str], ranks: int) -> list[str]:
    """The order of a group's parameters before they were dealt out round robin."""
    original = [""] * len(names)
    for name, position in zip(names, round_robin(len(names), ranks), strict=True):
        original[position] = name
    return original


def _placement(experts: int, ranks: int) -> list[dict[str, Any]]:
    """Experts in order, equally many on each rank, as DeepSpeed describes it."""
    share = experts // ranks
    return [{"rank": rank, "experts": list(range(rank * share, (rank + 1) * share))} for rank in range(ranks)]


def _device(zero: Mapping[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


@cache
def affine_map(shape: Shape, ranks: int) -> dict[str, Any]:
    """DeepSpeed's description of how a logical experts' weight lies on ``ranks`` expert-parallel ranks.

    Every file has one per weight, and the same ones; don't change it.
    """
    strides = [math.prod(shape[position + 1 :]) for position in range(len(shape))]
    local = [shape[0] // ranks, *shape[1:]]
    size = math.prod(local)
    pieces = {
        rank: {
            "shard_shape": list(local),
            "pieces": [
                {
                    "shape": list(local),
                    "source": [rank * size, list(strides)],
                    "dest": [0, list(strides)],
                    "locations": [rank],
                }
            ],
        }
        for rank in range(ranks)
    }
    return {"logical_shape": list(shape), "ranks": pieces}


def expert_metadata(
    entry: Mapping[str, Any], shapes: Mapping[str, Shape], rank: int, ranks: int, shared: int
) -> dict[str, Any]:
    """The ``ds_autoep_layers`` entry ``entry`` for other shapes and another topology, as rank ``rank`` writes it.

    Args:
        shapes: logical shape of every parameter.
        rank, ranks: of the data-parallel group.
        shared: size of the expert-parallel groups.
    """
    share = entry["num_experts"] // shared
    expert_rank = rank % shared
    placement = {**entry["expert_placement"], "ep_size": shared, "ranks": _placement(entry["num_experts"], shared)}
    maps = {name: affine_map(shapes[name], shared) for name in entry["affine_maps"]["params"]}
    return {
        **entry,
        "num_local_experts": share,
        "ep_size": shared,
        "expert_placement": placement,
        "affine_maps": {**entry["affine_maps"], "params": maps},
        "ep_group_name": f"ep_size_{shared}",
        "ep_rank": expert_rank,
        "expert_data_parallel_rank": rank // shared,
        "expert_data_parallel_world_size": ranks // shared,
        "global_expert_start": expert_rank * share,
        "global_expert_end": (expert_rank + 1) * share,
    }
