"""Universal checkpoints: one file per parameter and kind of state, whatever the topology."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint.contents import Contents
from ds_sparkling.checkpoint.layout import Layout
from ds_sparkling.checkpoint.metadata import expert_layers, master_dtype, read_layout, require
from ds_sparkling.checkpoint.output import ElementRange, OutputFile, PickledFile
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.checkpoint.zero_files import ZeroFiles
from ds_sparkling.checkpoint.zero_source import (
    base_state,
    check_frozen,
    check_tensor,
    frozen_pieces,
    model_file,
    zero_stage,
)
from ds_sparkling.errors import CheckpointError, UnsupportedError
from ds_sparkling.spec.record import read_record

logger = logging.getLogger(__name__)

_FOLDER = "zero"
_GLOBAL = f"{_FOLDER}/optimizer_state.pt"
_WEIGHT_FILE = "fp32"
_STEP = "step"
#: What a rank's optimizer file holds of its own flat tensors, which a universal checkpoint has no use for.
_FLAT_KEYS = (
    "fp32_flat_groups",
    "single_partition_of_fp32_groups",
    "base_optimizer_state",
    "param_slice_mappings",
)


def is_universal(path: Path) -> bool:
    """Whether DIR/TAG holds a universal checkpoint."""
    return (path / _FOLDER).is_dir()


def state_file(name: str, key: str) -> str:
    """Path of a parameter's weights or states within the checkpoint.

    Raises:
        CheckpointError: if the name would lead out of the checkpoint.
    """
    file = _WEIGHT_FILE if key == WEIGHT else key
    for kind, part in (("parameter name", name), ("optimizer state", key)):
        if not part or part != Path(part).name or part in (".", "..") or "\0" in part:
            raise CheckpointError(f"{kind} {part!r} can't be the name of a directory or a file")
    if key == _WEIGHT_FILE:
        raise CheckpointError(f"an optimizer state can't be called {key!r} in a universal checkpoint")
    return f"{_FOLDER}/{name}/{file}.pt"


def refuse_round_robin(layout: Layout) -> None:
    """Raise UnsupportedError for ``round_robin_gradients``, of whose order universal checkpoints know nothing.

    DeepSpeed writes and reads them as if parameters weren't dealt out, so the elements get mixed up.
    """
    if layout.settings.round_robin and layout.settings.ranks > 1:
        raise UnsupportedError(
            "DeepSpeed's universal checkpoints mix up the parameters of runs with round_robin_gradients; use the ZeRO "
            "checkpoint itself"
        )


class UniversalSource(Source):
    """A universal checkpoint, by DeepSpeed's converter or by this package."""

    def __init__(self, path: Path, *, trust: bool = False, verify: bool = False) -> None:
        super().__init__(path, trust=trust, verify=verify)
        self._global = self.open(_GLOBAL)
        require(path / _GLOBAL, self._global, {"param_groups": list})
        stage = zero_stage(path / _GLOBAL, self._global)
        # DeepSpeed's converter keeps the groups by themselves and, for stage 3, in the base optimizer's state.
        groups = self._global["param_groups"]
        model = self.open(model_file(stage, 0))
        self.layout = read_layout(path / model_file(stage, 0), model, groups, stage)
        refuse_round_robin(self.layout)
        self.record = read_record(path)
        self._keys: dict[str, frozenset[str]] = {}
        for name, param in self.layout.params.items():
            folder = (path / state_file(name, WEIGHT)).parent
            self._keys[name] = frozenset(entry.stem for entry in folder.glob("*.pt"))
            if param.trained and _WEIGHT_FILE not in self._keys[name]:
                raise CheckpointError(f"{folder / _WEIGHT_FILE}.pt is missing")
        self._check_states()
        self._check_pieces()

    def _check_states(self) -> None:
        """Parameters that share a flat tensor have the same states."""
        for flat in self.layout.flats:
            kept = frozenset().union(*(self._keys[name] for name in flat.names))
            for name in flat.names:
                for key in sorted(kept - self._keys[name]):
                    raise CheckpointError(
                        f"{self.path / _FOLDER / name / key}.pt is missing, which other parameters have"
                    )

    def _check_pieces(self) -> None:
        """Frozen parameters that have no file of their own must be in the model states of all ranks."""
        pieces = [name for name, param in self.layout.params.items() if not param.trained and not self._keys[name]]
        for rank in range(self.layout.settings.ranks) if pieces else ():
            name = model_file(self._stage, rank)
            model = self.open(name)
            require(self.path / name, model, {})
            check_frozen(self.path / name, model, self.layout, pieces)

    @property
    def files(self) -> list[Path]:
        names = [_GLOBAL, model_file(self._stage, 0)]
        for name, keys in self._keys.items():
            names += [state_file(name, WEIGHT if key == _WEIGHT_FILE else key) for key in sorted(keys)]
        return [self.path / name for name in names]

    @property
    def _stage(self) -> int:
        return self.layout.settings.stage

    def check(self, part: int = 0, parts: int = 1) -> Iterator[Path]:
        master = master_dtype(self.model_states(0).get("ds_config") or {})

        def look(file: str) -> None:
            path, content = self.path / file, self.open(file)
            name = path.parent.name
            if name in self.layout.params and path.stem != _STEP:
                param = self.layout.params[name]
                dtype = None
                if path.stem != _WEIGHT_FILE:
                    dtype = self._state_dtype(path.stem)
                elif param.trained:
                    dtype = master
                check_tensor(path, f"{path.stem} of {name:.200}", _tensor(content), dtype, (param.numel,))

        return self.looked_at([str(path.relative_to(self.path)) for path in self.files[part::parts]], look)

    def _state_dtype(self, key: str) -> torch.dtype | None:
        """Of the first parameter that has this state, which the others must agree with; None if it holds no numbers."""
        first = next(name for name, keys in self._keys.items() if key in keys)
        tensor = _tensor(self.open(state_file(first, key)))
        return tensor.dtype if isinstance(tensor, Tensor) and tensor.is_floating_point() else None

    def states(self, name: str) -> Mapping[str, torch.dtype]:
        keys = sorted(self._keys[name] - {_WEIGHT_FILE, _STEP})
        return {key: _tensor(self.open(state_file(name, key))).dtype for key in keys}

    def numbers(self, name: str) -> dict[str, Any]:
        if _STEP in self._keys[name]:
            return {_STEP: self.open(state_file(name, _STEP))}
        if self._stage < 3 or not self.states(name):
            return {}
        # One for all: the loader of stage 3 has no other place for it.
        state = base_state(self._global)["state"]
        return {key: value for key, value in next(iter(state.values()), {}).items() if key == _STEP}

    def weight_dtype(self, name: str) -> torch.dtype:
        if self.layout.params[name].trained:
            return _tensor(self.open(state_file(name, WEIGHT))).dtype
        return self.layout.params[name].dtype

    def read(self, name: str, key: str, start: int, stop: int) -> Iterator[Tensor]:
        param = self.layout.params[name]
        if param.trained or _WEIGHT_FILE in self._keys[name]:
            yield _tensor(self.open(state_file(name, key))).reshape(-1)[start:stop].to(self._dtype(name, key))
        else:
            yield from frozen_pieces(self.model_states, param.numel, self.layout.settings.ranks, name, start, stop)

    def model_states(self, rank: int) -> dict[str, Any]:
        # Ours has that of rank 0 only, which is all that DeepSpeed looks at.
        name = model_file(self._stage, rank)
        return self.open(name if (self.path / name).exists() else model_file(self._stage, 0))

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        model = self.model_states(0)
        kept = {"ds_config": model.get("ds_config"), "ds_version": model.get("ds_version")}
        groups = {key: value for key, value in self._global.items() if key != "param_groups"}
        return {"optimizer_state_dict": groups, **kept}

    def _dtype(self, name: str, key: str) -> torch.dtype:
        return self.weight_dtype(name) if key == WEIGHT else self.states(name)[key]


class UniversalFiles:
    """Builds the files of a universal checkpoint.

    Args:
        contents: the parameters.
        layout: of the topology that its model states shall tell; any other can load it.
        scheduler: the learning-rate scheduler's state.
    """

    def __init__(self, contents: Contents, layout: Layout, scheduler: Any) -> None:
        refuse_round_robin(contents.source.layout)
        self._contents = contents
        self._layout = layout
        self._warn()
        self._zero = ZeroFiles(contents, layout, scheduler, "")
        self._experts = {
            name: layer.experts for layer in expert_layers(contents.source.model_states(0)) for name in layer.names
        }

    def _warn(self) -> None:
        """Say what DeepSpeed's own loader can't do with the result; this package reads all of it."""
        source = self._contents.source
        kept = [frozenset(source.states(name)) for name, param in self._contents.params.items() if param.trained]
        adam = frozenset({"exp_avg", "exp_avg_sq"})
        if any(not adam <= keys for keys in kept) or (
            self._layout.settings.stage == 3 and any(keys - adam for keys in kept)
        ):
            logger.warning(
                "DeepSpeed loads universal checkpoints of Adam's two moments only; this optimizer keeps %s",
                sorted(frozenset().union(*kept)) or "nothing yet",
            )

    def names(self) -> list[str]:
        names = [_GLOBAL, model_file(self._layout.settings.stage, 0)]
        for name, param in self._contents.params.items():
            names.append(state_file(name, WEIGHT))
            if param.trained:
                names += [state_file(name, key) for key in self._contents.source.states(name)]
                if self._layout.settings.stage < 3:
                    names += [state_file(name, _STEP)] if _STEP in self._contents.numbers(name) else []
        return names

    def telling(self) -> list[str]:
        """Names of files that between them take up all of the source's metadata."""
        return [_GLOBAL, model_file(self._layout.settings.stage, 0)]

    def build(self, name: str) -> OutputFile:
        if name == _GLOBAL:
            return PickledFile(self._global())
        if "/" not in name:
            return self._zero.build(name)
        _, param, file = name.split("/")
        key = file.removesuffix(".pt")
        if key == _STEP:
            return PickledFile(self._contents.numbers(param)[key])
        return self._state(param, WEIGHT if key == _WEIGHT_FILE else key)

    def _state(self, name: str, key: str) -> PickledFile:
        param = self._contents.params[name]
        dtype = self._contents.dtype(name, key) if param.trained else torch.float32
        file = PickledFile({})
        room = file.room(param.shape, dtype, [ElementRange(name, key, 0, param.numel)])
        file.content = {"cat_dim": 0, "param": room}
        if param.expert:
            file.content |= {"is_expert_param": True, "ep_num_experts": self._experts[name]}
        return file

    def _global(self) -> dict[str, Any]:
        optimizer = dict(self._contents.source.optimizer_states(0)["optimizer_state_dict"])
        groups = self._zero.param_groups()
        numbers = {index: self._contents.numbers(flat.names[0]) for index, flat in enumerate(self._layout.flats)}
        for key in _FLAT_KEYS:
            optimizer.pop(key, None)
        optimizer["param_groups"] = groups
        if self._layout.settings.stage == 3:
            optimizer["optimizer_state_dict"] = {"state": numbers, "param_groups": groups}
        return optimizer


def _tensor(content: Any) -> Tensor:
    return content["param"] if isinstance(content, Mapping) else content
