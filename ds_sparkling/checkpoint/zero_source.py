"""Read what ``engine.save_checkpoint`` wrote under ZeRO stage 1, 2 or 3."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint import pickles
from ds_sparkling.checkpoint.layout import Layout, make_layout
from ds_sparkling.checkpoint.metadata import (
    PIPELINE,
    SEQUENCE,
    TENSOR,
    ExpertLayer,
    check_version,
    expert_layers,
    master_dtype,
    read_layout,
    require,
    shared_names,
    unsupported,
)
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.errors import CheckpointError, UnsupportedError
from ds_sparkling.spec.partition import cut, padded_piece
from ds_sparkling.spec.record import read_record

_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_PIPELINE_LAYER = re.compile(r"layer_\d+-.*model_states\.pt")

#: Metadata that thousands of ranks' files would fill the memory with.
_SHARED_METADATA = {"ds_autoep_layers", "universal_checkpoint_info", "param_shapes", "ds_config", "lr_scheduler"}
#: Elements of a tensor that are looked at.
_SAMPLE = 1024


def optimizer_file(rank: int, prefix: str) -> str:
    """Name of a rank's optimizer states; ``prefix`` is ``bf16_`` or empty."""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_file(stage: int, rank: int) -> str:
    """Name of the file with a rank's model states; stages 1 and 2 have one for all ranks."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def expert_file(layer: int, expert: int) -> str:
    """Name of the file with the compute weights of one expert (stages 1 and 2)."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def is_checkpoint_file(name: str) -> bool:
    """Whether DeepSpeed's checkpoints have files of that name."""
    return any(pattern.fullmatch(name) for pattern in (_OPTIMIZER, _MODEL_3, _MODEL, _EXPERT))


def flat_tensors(optimizer: Mapping[str, Any]) -> list[Tensor]:
    """A rank's flat fp32 tensors, from its ``optimizer_state_dict``."""
    return list(optimizer.get("fp32_flat_groups") or optimizer["single_partition_of_fp32_groups"])


def base_state(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The base optimizer's ``state_dict`` in a rank's ``optimizer_state_dict``."""
    return (
        optimizer["optimizer_state_dict"] if "optimizer_state_dict" in optimizer else optimizer["base_optimizer_state"]
    )


def zero_stage(where: object, optimizer: Mapping[str, Any]) -> int:
    """The ZeRO stage by a rank's ``optimizer_state_dict``.

    Raises:
        CheckpointError: if there is no such stage.
    """
    stage = optimizer.get("zero_stage", 1)  # only DeepSpeed's BF16_Optimizer, a stage 1, doesn't say
    if not isinstance(stage, int) or stage not in (1, 2, 3):
        raise CheckpointError(f"{where}: zero_stage is {stage!r:.80}, expected 1, 2 or 3")
    return int(stage)


def frozen_pieces(
    model_states: Callable[[int], Mapping[str, Any]], numel: int, ranks: int, name: str, start: int, stop: int
) -> Iterator[Tensor]:
    """The elements ``start .. stop`` of a frozen parameter under stage 3, from the pieces in every rank's file."""
    for rank, offset, count in cut(start, stop, padded_piece(numel, ranks)):
        yield model_states(rank)["frozen_param_fragments"][name].view(-1)[offset : offset + count]


def check_frozen(where: object, model: Mapping[str, Any], layout: Layout, frozen: Collection[str]) -> None:
    """Raise CheckpointError unless a rank's file has its pieces, of stage 3, of the parameters ``frozen`` alone."""
    fragments = model.get("frozen_param_fragments") or {}
    require(f"{where}: frozen_param_fragments", fragments, {})
    for name in fragments.keys() ^ frozen:
        what = "has no piece of it" if name in frozen else "has a piece of it that no shape tells of"
        raise CheckpointError(f"{where}: {name:.200} is frozen, and frozen_param_fragments {what}")
    for name in frozen:
        param = layout.params[name]
        size = padded_piece(param.numel, layout.settings.ranks)
        check_tensor(where, f"the piece of the frozen {name:.200}", fragments[name], param.dtype, (size,))


def check_tensor(
    where: object, what: str, tensor: Any, dtype: torch.dtype | None = None, numels: Collection[int] | None = None
) -> None:
    """Look at a tensor that will be read.

    Args:
        where, what: for the error.
        dtype: what it must be in; None if in any floating-point numbers.
        numels: how many elements it may have.

    Raises:
        CheckpointError: if it isn't one, of other numbers, or doesn't hold its elements one by one.
    """
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{where}: {what} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        expected = "floating-point numbers" if dtype is None else str(dtype)
        raise CheckpointError(f"{where}: {what} is in {tensor.dtype}, expected {expected}; was the file damaged?")
    if numels is not None and tensor.numel() not in numels:
        sizes = " or ".join(map(str, sorted(set(numels))))
        raise CheckpointError(f"{where}: {what} has {tensor.numel()} elements; by the metadata it is {sizes}")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise CheckpointError(f"{where}: {what} doesn't hold its {tensor.numel()} elements one after the other")


class ZeroSource(Source):
    """A ZeRO checkpoint.

    Files are opened when they are needed, once each, and mapped into memory.
    """

    def __init__(self, path: Path, *, trust: bool = False, verify: bool = False) -> None:
        super().__init__(path, trust=trust, verify=verify)
        self._names = frozenset(entry.name for entry in path.iterdir() if entry.name.endswith(".pt"))
        self.prefix = self._prefix()
        optimizer_path = path / optimizer_file(0, self.prefix)
        content = self.open(optimizer_path.name)
        require(optimizer_path, content, {"optimizer_state_dict": Mapping})
        optimizer = content["optimizer_state_dict"]
        base = base_state(optimizer)
        if isinstance(base, list):
            raise UnsupportedError(f"{path}: checkpoints with zero_optimization.elastic_checkpoint aren't supported")
        require(optimizer_path, base, {"state": Mapping, "param_groups": list})
        stage = zero_stage(optimizer_path, optimizer)
        for index, tensor in enumerate(flat_tensors(optimizer)):
            check_tensor(optimizer_path, f"flat tensor {index}", tensor)
        model = self.open(model_file(stage, 0))
        self.layout = read_layout(path / model_file(stage, 0), model, base["param_groups"], stage)
        self.experts = expert_layers(model)
        self._master = master_dtype(model.get("ds_config") or {})
        self._state_dtypes: dict[str, torch.dtype] = {}
        self.record = read_record(path)
        self._check_names()
        self._refuse_sequences([tensor.numel() for tensor in flat_tensors(optimizer)])

    def _refuse_sequences(self, found: list[int]) -> None:
        """Raise UnsupportedError if rank 0's flat tensors have the sizes of a run with more ranks than are saved.

        Under stage 3 the ranks that share a sequence partition the parameters, too, and write over each other's files.
        """
        sizes = [flat.size for flat in self.layout.flats]
        if self.stage < 3 or found == sizes or not sum(found):
            return
        ratio = sum(sizes) / sum(found)
        for count in {math.floor(ratio), math.ceil(ratio)} - {0, 1}:
            settings = replace(self.layout.settings, ranks=self.ranks * count)
            flats = make_layout(settings, self.layout.params, self.layout.groups).flats
            if found == [flat.size for flat in flats]:
                raise UnsupportedError(
                    f"{unsupported(self.path, SEQUENCE)}; this one has the files of {self.ranks} of {settings.ranks} "
                    "ranks, whose others' have the same names"
                )

    # -- files --------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        return self.layout.settings.stage

    @property
    def ranks(self) -> int:
        return self.layout.settings.ranks

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in sorted(self._expected())]

    def model_states(self, rank: int) -> dict[str, Any]:
        return self._with_shared(self.open(model_file(self.stage, rank)))

    def _with_shared(self, model: dict[str, Any]) -> dict[str, Any]:
        """The same with the large metadata of rank 0, which differs from it in nothing that is used."""
        first = self.open(model_file(self.stage, 0))
        for key in _SHARED_METADATA & model.keys():
            model[key] = first[key]
        return model

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        return self.open(optimizer_file(rank, self.prefix))

    def check(self, part: int = 0, parts: int = 1) -> Iterator[Path]:
        reference = self._identity(self.model_states(0)), self._optimizer_identity(self.optimizer_states(0))
        samples: dict[bytes, str] = {}

        def look(name: str) -> None:
            content = self.open(name)
            self._check_kinds(name, content)
            if _OPTIMIZER.fullmatch(name):
                rank = int(_OPTIMIZER.fullmatch(name)[2])  # type: ignore[index]
                self._same(name, reference[1], self._optimizer_identity(content))
                self._check_flats(name, rank, content["optimizer_state_dict"])
                self._check_rank(name, rank, content["optimizer_state_dict"])
                if self.model_states(0)["global_steps"]:
                    self._check_unlike(name, flat_tensors(content["optimizer_state_dict"]), samples)
            elif _EXPERT.fullmatch(name):
                self._check_expert(name, content)
            else:
                self._same(name, reference[0], self._identity(content))
                self._check_module(name, content)
                if self.stage < 3:
                    self._check_rounded(name, content)
                self._with_shared(content)

        return self.looked_at(sorted(self._expected())[part::parts], look)

    def _check_kinds(self, name: str, content: Any) -> None:
        """A file must hold what those of its name do, and no tensors that can't be written again."""
        where = self.path / name
        if _OPTIMIZER.fullmatch(name):
            require(where, content, {"optimizer_state_dict": Mapping})
            base = base_state(content["optimizer_state_dict"])
            require(where, base, {"state": Mapping, "param_groups": list})
            for index, state in base["state"].items():
                require(f"{where}: state {index!r:.80} of the optimizer", state, {})
        else:
            require(where, content, {} if _EXPERT.fullmatch(name) else {"module": Mapping})
        try:
            for _ in pickles.tensors(content):
                pass
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error

    def _expected(self) -> set[str]:
        names = {optimizer_file(rank, self.prefix) for rank in range(self.ranks)}
        names |= {model_file(self.stage, rank) for rank in range(self.ranks)}
        if self.stage < 3:
            names |= {expert_file(layer.number, e) for layer in self.experts for e in range(layer.experts)}
        return names

    def _check_names(self) -> None:
        for layer in self.experts if self.stage < 3 else ():
            if layer.experts > len(self._names):
                raise CheckpointError(
                    f"{self.path / model_file(self.stage, 0)}: num_experts of {layer.path} is {layer.experts}, and "
                    f"each has a file, but there are {len(self._names)} files"
                )
        expected = self._expected()
        missing = sorted(expected - self._names)
        if missing:
            raise CheckpointError(
                f"{self.path}: {_some(missing)} missing; the checkpoint is of {self.ranks} ranks "
                f"(dp_world_size in {model_file(self.stage, 0)})"
            )
        extra = sorted(filter(is_checkpoint_file, self._names - expected))
        if extra:
            raise CheckpointError(
                f"{self.path}: {_some(extra)} too many for a checkpoint of {self.ranks} ranks; was another one saved "
                "into the same directory?"
            )

    def _prefix(self) -> str:
        found = {match[1] or "" for match in map(_OPTIMIZER.fullmatch, self._names) if match}
        models = {match[0]: match[1] for match in map(_MODEL.fullmatch, self._names) if match}
        models |= {match[0]: match[2] for match in map(_MODEL_3.fullmatch, self._names) if match}
        layers = sorted(filter(_PIPELINE_LAYER.fullmatch, self._names))
        cut_up = sorted(name for name, rank in models.items() if int(rank))
        for split, what in ((layers, PIPELINE), (cut_up, TENSOR)):
            if split:
                raise unsupported(f"{self.path} has {_some(split).rpartition(' ')[0]}", what)
        if not found:
            if self._names:
                raise UnsupportedError(
                    f"{self.path} has no ZeRO optimizer states ([bf16_]zero_pp_rank_*_optim_states.pt); checkpoints "
                    "without ZeRO (stage 0) aren't supported"
                )
            raise CheckpointError(f"{self.path} has no checkpoint files; give the directory with 'latest', and --tag")
        if len(found) > 1:
            raise CheckpointError(f"{self.path} has optimizer states of bf16 and of other runs (bf16_zero_pp_rank_*)")
        return found.pop()

    # -- contents -----------------------------------------------------------------------------------------------

    def states(self, name: str) -> Mapping[str, torch.dtype]:
        return {key: value.dtype for key, value in self._state(name).items() if _per_element(key, value)}

    def numbers(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self._state(name).items() if not _per_element(key, value)}

    def weight_dtype(self, name: str) -> torch.dtype:
        if not self.layout.params[name].trained:
            return self.layout.params[name].dtype
        index = self.layout.flat_of(name)
        return flat_tensors(self._optimizer(self._holder(name)))[index].dtype

    def read(self, name: str, key: str, start: int, stop: int) -> Iterator[Tensor]:
        if not self.layout.params[name].trained:
            yield from self._read_frozen(name, start, stop)
        elif key in self.whole_states(name):
            yield from self._read_whole(name, key, start, stop)
        else:
            for place in self.layout.places(name, start, stop):
                optimizer = self._optimizer(place.rank)
                if key == WEIGHT:
                    tensor = flat_tensors(optimizer)[place.flat]
                else:
                    tensor = base_state(optimizer)["state"][place.flat][key]
                yield tensor.view(-1)[place.offset : place.offset + place.numel]

    def _read_whole(self, name: str, key: str, start: int, stop: int) -> Iterator[Tensor]:
        index = self.layout.flat_of(name)
        flat, local = self.layout.flats[index], self.layout.local_numel(name)
        for expert_rank, offset, count in cut(start, stop, local):
            rank = next(self.layout.places(name, expert_rank * local, stop)).rank
            before = self.layout.touching(flat, rank)
            offset += sum(self.layout.local_numel(other) for other in before[: before.index(name)])
            yield base_state(self._optimizer(rank))["state"][index][key].view(-1)[offset : offset + count]

    def _read_frozen(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        param = self.layout.params[name]
        if self.stage == 3:
            yield from frozen_pieces(self.model_states, param.numel, self.ranks, name, start, stop)
        elif param.expert:
            layer, number = next((layer, name) for layer in self.experts if name in layer.names)
            for expert, offset, count in cut(start, stop, param.numel // layer.experts):
                content = self.open(expert_file(layer.number, expert))
                yield content[f"{number}.{expert}"].reshape(-1)[offset : offset + count]
        else:
            yield self.model_states(0)["module"][name].reshape(-1)[start:stop]

    def _optimizer(self, rank: int) -> dict[str, Any]:
        return self.optimizer_states(rank)["optimizer_state_dict"]

    def _holder(self, name: str) -> int:
        """A rank whose optimizer file holds a part of the parameter."""
        return next(self.layout.places(name, 0, 1)).rank

    def _state(self, name: str) -> dict[str, Any]:
        state = base_state(self._optimizer(self._holder(name)))["state"].get(self.layout.flat_of(name), {})
        return {key: value for key, value in state.items() if value is not None}

    # -- checks -------------------------------------------------------------------------------------------------

    def _identity(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What every model states file of one checkpoint must agree on."""
        keys = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "param_shapes", "lr_scheduler")
        return {
            **{key: model.get(key) for key in keys},
            "frozen_param_shapes": model.get("frozen_param_shapes"),
            "ds_config": model.get("ds_config"),
            "names in module": sorted(model["module"]),
        }

    def _optimizer_identity(self, content: Mapping[str, Any]) -> dict[str, Any]:
        optimizer = content["optimizer_state_dict"]
        base = base_state(optimizer)
        numbers = [
            {key: (_kind(value), float(value)) for key, value in state.items() if _number(value)}
            for state in base["state"].values()
        ]
        return {
            "ds_config": content.get("ds_config"),
            "ds_version": content.get("ds_version"),
            "param_groups": base["param_groups"],
            "loss scaler": vars(optimizer["loss_scaler"]) if "loss_scaler" in optimizer else None,
            "step counts": numbers,
        }

    def _same(self, name: str, reference: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        for key, value in reference.items():
            if found[key] != value:
                raise CheckpointError(
                    f"{self.path / name} is of another run or step than rank 0's: {key} is {_short(found[key])}, "
                    f"there {_short(value)}"
                )

    def _check_flats(self, name: str, rank: int, optimizer: Mapping[str, Any]) -> None:
        """The flat tensors of a rank must have the sizes that the metadata gives them."""
        flats = flat_tensors(optimizer)
        state = base_state(optimizer)["state"]
        if len(flats) != len(self.layout.flats):
            raise CheckpointError(f"{self.path / name} has {len(flats)} flat tensors, not {len(self.layout.flats)}")
        for index, (tensor, flat) in enumerate(zip(flats, self.layout.flats, strict=True)):
            part = self.layout.part(flat, rank)[1]
            lean = flat.size - (flat.padding(part) if flat.window else 0)
            where, sizes = self.path / name, (flat.size, lean)
            check_tensor(where, f"flat tensor {index} ({flat.names[0]:.200} ...)", tensor, self._master, sizes)
            kept = base_state(self._optimizer(0))["state"].get(index, {})
            found = sorted(state.get(index, {}))
            if found != sorted(kept):
                raise CheckpointError(
                    f"{self.path / name} has the states {found} of flat tensor {index}, rank 0 has {sorted(kept)}"
                )
            whole = [self.layout.local_numel(other) for other in self.layout.touching(flat, rank)]
            for key, value in state.get(index, {}).items():
                if _per_element(key, value) != _per_element(key, kept[key]):
                    raise CheckpointError(f"{where}: {key} of flat tensor {index} is of another kind than rank 0's")
                if _per_element(key, value):
                    dtype = self._state_dtypes.setdefault(key, kept[key].dtype)
                    what = f"{key} of flat tensor {index}"
                    check_tensor(where, what, value, dtype if dtype.is_floating_point else None, (*sizes, sum(whole)))

    def _check_rank(self, name: str, rank: int, optimizer: Mapping[str, Any]) -> None:
        """What a rank's optimizer states say about where they belong must be so."""
        groups = optimizer.get("ds_zero_partition_groups")
        if groups is not None:
            found: Any = [(entry["partition_rank"], entry["partition_ranks"]) for entry in groups]
            expected: Any = [
                (self.layout.part(flat, rank)[1], self.layout.part_ranks(flat, rank)) for flat in self.layout.flats
            ]
        elif "param_slice_mappings" in optimizer and not self.layout.settings.round_robin:
            # DeepSpeed's mappings don't know about round_robin_gradients.
            found = [
                {key: (piece.start, piece.numel) for key, piece in mapping.items()}
                for mapping in optimizer["param_slice_mappings"]
            ]
            expected = [
                {s.name: (s.offset, s.stop - s.start) for s in self.layout.segments(flat, rank)}
                for flat in self.layout.flats
            ]
        else:
            return
        if found != expected:
            raise CheckpointError(f"{self.path / name} is of another rank or topology than its name says")

    def _check_unlike(self, name: str, tensors: Sequence[Tensor], samples: dict[bytes, str]) -> None:
        """No two ranks' tensors may be the same, as they are when a file was copied over another's."""
        parts = [tensor.detach().reshape(-1)[:: max(tensor.numel() // _SAMPLE, 1)].float() for tensor in tensors]
        sample = torch.cat(parts) if parts else torch.empty(0)
        if sample.numel() == 0 or bool((sample == sample[0]).all()):
            return  # padding alone, or weights as they were initialised
        other = samples.setdefault(sample.numpy().tobytes(), name)
        if other != name:
            raise CheckpointError(
                f"{self.path / name} is of another rank than its name says: it holds what {other} holds"
            )

    def _check_rounded(self, name: str, model: Mapping[str, Any]) -> None:
        """Stages 1 and 2: the module's weights must be the rounded masters, as they are after every step."""
        for key, tensor in model["module"].items():
            param = self.layout.params.get(key)
            if param is None or not param.trained or not tensor.numel():
                continue
            self._refuse_unrounded(name, key, tensor, key, 0)

    def _refuse_unrounded(self, file: str, key: str, tensor: Tensor, name: str, start: int) -> None:
        """Raise CheckpointError unless ``tensor`` is the rounded master of the parameter ``name`` from ``start`` on.

        Args:
            file: what holds the tensor, as ``key``.
        """
        count = min(tensor.numel(), _SAMPLE)
        master = self.elements(name, WEIGHT, start, start + count).detach().to(tensor.dtype)
        found = tensor.detach().reshape(-1)[:count]
        if not bool((found == master).logical_or(master.isfinite().logical_not()).all()):
            raise CheckpointError(
                f"{self.path / file}: {key} isn't the rounded master weight of the optimizer states; was it saved at "
                "another step?"
            )

    def _check_module(self, name: str, model: Mapping[str, Any]) -> None:
        check_version(self.path / name, model)
        match = _MODEL_3.fullmatch(name)
        for entry in (model.get("ds_autoep_layers") or []) if match else []:
            place = entry["ep_rank"], entry["expert_data_parallel_rank"]
            if place != (int(match[1]) % entry["ep_size"], int(match[1]) // entry["ep_size"]):  # type: ignore[index]
                raise CheckpointError(f"{self.path / name} is of another rank or topology than its name says")
        if self.stage == 3:
            frozen = [key for key, param in self.layout.params.items() if not param.trained]
            check_frozen(self.path / name, model, self.layout, frozen)
        first = self.open(model_file(self.stage, 0))["module"]
        tied = shared_names(self.open(model_file(self.stage, 0)))
        for key, tensor in model["module"].items():
            param, known = self.layout.params.get(tied.get(key, key)), first[key]
            if param is not None and isinstance(tensor, Tensor) and tensor.numel():
                if tuple(tensor.shape) != param.shape:
                    raise CheckpointError(
                        f"{self.path / name}: {key:.200} is {tuple(tensor.shape)}; by the metadata it is {param.shape}"
                    )
                check_tensor(self.path / name, key[:200], tensor, param.dtype)
            if _kind(tensor) != _kind(known) or (isinstance(tensor, Tensor) and tensor.shape != known.shape):
                raise CheckpointError(
                    f"{self.path / name}: {key:.200} is {_kind(tensor)}{_shape_of(tensor)}, rank 0 has "
                    f"{_kind(known)}{_shape_of(known)}"
                )

    def _check_expert(self, name: str, content: Mapping[str, Any]) -> None:
        number, expert, _ = map(int, _EXPERT.fullmatch(name).groups())  # type: ignore[union-attr]
        layer: ExpertLayer = next(layer for layer in self.experts if layer.number == number)
        for weight in layer.names:
            tensor, shape = content.get(f"{weight}.{expert}"), self.layout.params[weight].shape[1:]
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else tuple(tensor.shape)
                raise CheckpointError(f"{self.path / name}: {weight}.{expert} is {found}; by the metadata {shape}")
            check_tensor(self.path / name, f"{weight}.{expert}", tensor, self.layout.params[weight].dtype)
            if self.layout.params[weight].trained:
                self._refuse_unrounded(name, f"{weight}.{expert}", tensor, weight, expert * tensor.numel())


def _per_element(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and key != "step"


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _shape_of(value: Any) -> str:
    return f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more + (" are" if len(names) > 1 else " is")


def _short(value: Any, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
