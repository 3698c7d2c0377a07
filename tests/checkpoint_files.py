"""Comparing checkpoints file by file, and making them wider, for the tests of the file room."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny
from ds_sparkling.checkpoint.expand import expand, prepare
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.request import Request
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.checkpoint.zero_source import ZeroSource, base_state, flat_tensors
from ds_sparkling.spec.strategy import Strategy
from tiny import Case


def train_and_save(case: Case, directory: str) -> None:
    """A job: two steps of the tiny model, and a checkpoint."""
    engine = tiny.initialize(case)
    tiny.train(engine, 2)
    engine.save_checkpoint(directory)


def run(checkpoint: Path, out: Path, widths: Mapping[str, int] | None = None, **options: Any) -> dict[str, Any]:
    """Expand in this process; the summary."""
    request = Request(checkpoint=checkpoint, out=out, widths=widths or {}, **{"workers": 2, **options})
    with Team() as team:
        return expand(prepare(request, team), team)


def block_of(strategy: Strategy, path: Path) -> Path:
    """A DeepSpeed config at ``path`` with the ``"sparkling"`` block of ``strategy``."""
    path.write_text(json.dumps({"sparkling": strategy.to_dict()}))
    return path


def load_tensors(directory: Path) -> dict[str, Tensor]:
    """What is in the ``safetensors`` files of a Hugging Face directory."""
    from safetensors.torch import load_file

    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def logical(source: Source) -> dict[tuple[str, str], Tensor]:
    """Every weight and state of a checkpoint, whole."""
    found = {}
    for name, param in source.layout.params.items():
        for key in (WEIGHT, *(source.states(name) if param.trained else ())):
            found[name, key] = source.elements(name, key, 0, param.numel).view(param.shape)
    return found


def same_tensors(first: Path, second: Path) -> None:
    """Assert that two checkpoints (DIR/TAG) hold equal logical tensors."""
    a, b = logical(open_checkpoint(first)), logical(open_checkpoint(second))
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor, b[key]), key


def same_files(first: Path, second: Path) -> None:
    """Assert that two ZeRO checkpoints have equal files, but for the padding of flat tensors."""
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in sorted(first.iterdir()):
        other = second / path.name
        if path.suffix == ".pt":
            contents = [torch.load(file, weights_only=False) for file in (path, other)]
            if path.name.endswith("optim_states.pt"):
                rank = int(path.name.split("rank_")[1].split("_")[0])
                for content, directory in zip(contents, (first, second), strict=True):
                    _without_padding(content["optimizer_state_dict"], directory, rank)
            elif "zero_pp_rank" in path.name:
                for content in contents:
                    _frozen_without_padding(content, int(path.name.split("rank_")[1].split("_")[0]))
            found = list(differences(*contents))
            assert not found, f"{path.name}: {found[:5]}"
        else:
            assert json.loads(path.read_text()) == json.loads(other.read_text()), path.name


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """What differs, whatever order mappings have."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.shape != second.shape or not torch.equal(first, second):
            yield f"{where}: {first.shape} {first.dtype} {second.shape} {second.dtype}"
    elif isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            yield f"{where}: {first.keys() ^ second.keys()}"
        for key in first.keys() & second.keys():
            yield from differences(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            yield f"{where}: {len(first)} and {len(second)}"
        for index, pair in enumerate(zip(first, second, strict=False)):
            yield from differences(*pair, f"{where}[{index}]")
    elif type(first) is not type(second):
        yield f"{where}: {type(first)} {type(second)}"
    elif hasattr(first, "__dict__") and vars(first) and not isinstance(first, Enum):
        yield from differences(vars(first), vars(second), where)
    elif first != second:
        yield f"{where}: {first!r} {second!r}"


def _without_padding(optimizer: dict[str, Any], checkpoint: Path, rank: int) -> None:
    """Zero the elements of flat tensors that belong to no parameter; DeepSpeed leaves anything there."""
    layout = ZeroSource(checkpoint).layout
    for index, (flat, tensor) in enumerate(zip(layout.flats, flat_tensors(optimizer), strict=True)):
        used = torch.zeros(flat.size, dtype=torch.bool)
        for segment in layout.segments(flat, rank):
            used[segment.offset : segment.offset + segment.stop - segment.start] = True
        for each in (tensor, *base_state(optimizer)["state"].get(index, {}).values()):
            if isinstance(each, Tensor) and each.dim() and each.numel() <= flat.size:
                each.detach()[~used[: each.numel()]] = 0


def _frozen_without_padding(model: dict[str, Any], rank: int) -> None:
    """The same for the pieces of frozen parameters under stage 3."""
    for name, piece in model["frozen_param_fragments"].items():
        numel = math.prod(model["frozen_param_shapes"][name])
        piece[max(numel - rank * piece.numel(), 0) :] = 0
