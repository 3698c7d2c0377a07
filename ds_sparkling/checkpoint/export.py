"""A Hugging Face directory: ``safetensors`` shards with their index, and the model's config at the new widths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint.contents import Contents
from ds_sparkling.checkpoint.layout import Shape
from ds_sparkling.checkpoint.metadata import ExpertLayer, expert_layers, shared_names
from ds_sparkling.checkpoint.names import HuggingFaceModel, OwnNames, some
from ds_sparkling.checkpoint.output import ElementRange, OutputFile, Slot
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.discovery.factory import HuggingFaceFactory, own_name
from ds_sparkling.errors import CheckpointError, ConfigError
from ds_sparkling.spec.autoep import BlockNames

#: Bytes of tensors in one shard, as ``save_pretrained`` has it.
SHARD_BYTES = 5 * 10**9

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Exported:
    """A tensor of the model as built.

    Attributes:
        name: its own name.
        runs: the logical parameters' stretches that make it up, end to end; none for a buffer.
        buffer: its contents, if it is one.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    runs: tuple[ElementRange, ...] = ()
    buffer: Tensor | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HuggingFaceFiles:
    """Builds the files of a Hugging Face directory.

    Args:
        contents: the parameters; they are written in the compute weights' dtype.
        config: the model's config, at the new widths.
        stacked: whether the model as built has experts stacked in one tensor; otherwise each is a module of its own.

    Raises:
        CheckpointError: if the checkpoint doesn't hold the config's model, tensor by tensor.
    """

    def __init__(self, contents: Contents, config: Mapping[str, Any], *, stacked: bool = True) -> None:
        model = contents.source.model_states(0)
        self._contents = contents
        self._config = dict(config)
        dtypes = {param.dtype for param in contents.params.values()}
        if len(dtypes) == 1:
            self._config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtypes.pop()).partition(".")[2]
        self._stacked = stacked
        hugging_face = HuggingFaceModel.of(self._config)
        excluded = contents.source.layout.settings.stage > 1 and model.get("frozen_param_shapes") is None
        if excluded and (hugging_face is None or not all(param.trained for param in contents.params.values())):
            raise CheckpointError(
                f"{contents.source.path} was saved with exclude_frozen_parameters, so it hasn't all of the model"
            )
        self._own = OwnNames.of([*contents.params], hugging_face.shapes if hugging_face else ())
        tensors = list(self._tensors())
        found = {tensor.name: tensor.shape for tensor in tensors}
        if len(found) < len(tensors):
            twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
            raise CheckpointError(f"{contents.source.path} holds {some(twice)} more than once, under wrappers' names")
        if hugging_face is not None:
            hugging_face.check(found, contents.source.path)
        self._shards = self._cut(tensors)

    def names(self) -> list[str]:
        return [*self._shards, *(["model.safetensors.index.json"] if len(self._shards) > 1 else []), "config.json"]

    def telling(self) -> list[str]:
        """Names of files that between them take up all of the source's metadata."""
        return self.names()

    def build(self, name: str) -> OutputFile:
        if name in self._shards:
            return SafetensorsFile(self._shards[name])
        if name == "config.json":
            return JsonFile(self._config)
        index = {tensor.name: shard for shard, tensors in self._shards.items() for tensor in tensors}
        total = sum(tensor.bytes for tensors in self._shards.values() for tensor in tensors)
        return JsonFile({"metadata": {"total_size": total}, "weight_map": index})

    def _cut(self, tensors: list[Exported]) -> dict[str, list[Exported]]:
        shards: list[list[Exported]] = [[]]
        filled = 0
        for tensor in tensors:
            if shards[-1] and filled + tensor.bytes > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += tensor.bytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}

    def _tensors(self) -> Iterator[Exported]:
        model = self._contents.source.model_states(0)
        layers = expert_layers(model)
        names = BlockNames.from_config(model.get("ds_config") or {})
        record = self._contents.source.record
        if layers and record is not None:
            names = names.found_in(layers[0].path, record.axes)
        elif str(self._config.get("model_type")).startswith("qwen"):
            names = replace(names, shared="shared_expert")
        tied = shared_names(model)
        experts = {name for layer in layers for name in layer.names}
        for name, param in self._contents.params.items():
            if name not in experts:
                own = self._own(_own_name(name, layers, names))
                yield Exported(own, param.shape, param.dtype, (ElementRange(name, WEIGHT, 0, param.numel),))
        for layer in layers:
            yield from self._experts(layer, names)
        for name, tensor in model["module"].items():
            if name not in self._contents.params and name not in tied and isinstance(tensor, Tensor):
                own, buffer = self._own(_own_name(name, layers, names)), self._contents.buffer(name, tensor)
                yield Exported(own, tuple(buffer.shape), buffer.dtype, buffer=buffer)

    def _experts(self, layer: ExpertLayer, names: BlockNames) -> Iterator[Exported]:
        """AutoEP's w1, w2 and w3 as the model's own gate, down and up projections."""
        w1, w2, w3 = (self._contents.params[name] for name in layer.names)
        block = self._own(f"{layer.path}.{names.experts}")

        def runs(name: str, expert: int) -> ElementRange:
            numel = self._contents.params[name].numel // layer.experts
            return ElementRange(name, WEIGHT, expert * numel, (expert + 1) * numel)

        parts = {names.gate: [w1.name, w3.name] if names.up is None else [w1.name], names.down: [w2.name]}
        if names.up is not None:
            parts[names.up] = [w3.name]
        for leaf, sources in parts.items():
            inner = self._contents.params[sources[0]].shape[1:]
            shape = (inner[0] * len(sources), *inner[1:])
            each = [tuple(runs(source, expert) for source in sources) for expert in range(layer.experts)]
            if self._stacked:
                together = tuple(run for one in each for run in one)
                yield Exported(f"{block}.{leaf}", (layer.experts, *shape), w1.dtype, together)
            else:
                for expert, one in enumerate(each):
                    yield Exported(f"{block}.{expert}.{leaf}.weight", shape, w1.dtype, one)


@dataclass
class SafetensorsFile(OutputFile):
    """Tensors end to end behind a JSON header (the safetensors format)."""

    tensors: list[Exported]

    def lay_out(self, path: Path) -> Iterator[Slot | tuple[int, Tensor]]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            if tensor.dtype not in _DTYPES:
                raise CheckpointError(f"{tensor.name}: safetensors has no {tensor.dtype}")
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.bytes],
            }
            end += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + end)
        for tensor in self.tensors:
            position = start + header[tensor.name]["data_offsets"][0]
            if tensor.buffer is not None:
                yield position, tensor.buffer
            for run in tensor.runs if tensor.bytes else ():
                yield Slot(run, position, tensor.dtype)
                position += (run.stop - run.start) * tensor.dtype.itemsize


@dataclass
class JsonFile(OutputFile):
    """A JSON file."""

    content: Any

    def lay_out(self, path: Path) -> Iterator[Slot | tuple[int, Tensor]]:
        path.write_text(json.dumps(self.content, indent=2) + "\n")
        return iter(())


def widened_config(
    config: Mapping[str, Any], widths: Mapping[str, int], started: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A model's config at the widths of its weights, in its text model's part if it has one.

    Args:
        config: of the model at any time of its training.
        widths: the widths in force, of the axes that have grown.
        started: what these were at first, if that is known; ``config`` has it otherwise.

    Raises:
        CheckpointError: if it has none of that name.
    """
    at_first, _ = _with_widths(config, started or {})
    made, missing = _with_widths(at_first, widths)
    if widths and "model_type" in config and "text_config" not in config:
        try:
            # Names that the architecture has for others, and a size of heads that would follow from the new widths.
            made = HuggingFaceFactory(at_first).widened(widths)
            missing = [axis for axis in missing if own_name(config, axis) == axis]
        except (ConfigError, ValueError) as error:
            if "hidden_size" in widths and "num_attention_heads" in config and config.get("head_dim") is None:
                raise CheckpointError(
                    f"whether the size of heads follows from the hidden size can't be told ({error}); say it in the "
                    'model\'s config.json: "head_dim"'
                ) from error
    if missing:
        raise CheckpointError(f"the model's config has no {', '.join(missing)} to set to the new width")
    return made


def _with_widths(config: Mapping[str, Any], widths: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """``config`` with other widths, and those of them that it has no key for."""
    found: set[str] = set()

    def put(part: Mapping[str, Any]) -> dict[str, Any]:
        changed = {key: put(value) if key == "text_config" else value for key, value in part.items()}
        for axis in widths.keys() & changed.keys():
            found.add(axis)
            changed[axis] = widths[axis]
        return changed

    return put(config), sorted(widths.keys() - found)


def _own_name(name: str, layers: list[ExpertLayer], names: BlockNames) -> str:
    """A parameter's name in the model as built, from that of AutoEP."""
    for layer in layers:
        if name.startswith(f"{layer.path}."):
            return names.built(name, layer.path)
    return name


def experts_are_stacked(source: Source) -> bool:
    """Whether the model as built has its experts in one tensor, by its growth record or the names of their weights.

    Raises:
        CheckpointError: if it can't be told.
    """
    axes = source.record.axes if source.record is not None else {}
    model = source.model_states(0)
    names = BlockNames.from_config(model.get("ds_config") or {})
    layers = expert_layers(model)
    if layers and not axes and names.up is not None:
        raise CheckpointError(
            f"{source.path} has no growth record that tells whether the model's experts are stacked or modules, which "
            "format hf needs to know"
        )
    single = tuple(f"{layer.path}.{names.experts}.0." for layer in layers)
    return not any(name.startswith(single) for name in axes)
