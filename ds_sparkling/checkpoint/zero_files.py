"""The files of a ZeRO checkpoint as ``engine.load_checkpoint`` expects them, at any sizes and on any topology."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint.contents import Contents
from ds_sparkling.checkpoint.layout import Flat, Layout, Segment
from ds_sparkling.checkpoint.metadata import ExpertLayer, expert_layers, expert_metadata, shared_names
from ds_sparkling.checkpoint.output import ElementRange, OutputFile, PickledFile
from ds_sparkling.checkpoint.pickles import FragmentAddress
from ds_sparkling.checkpoint.source import WEIGHT, Source
from ds_sparkling.checkpoint.zero_source import ZeroSource, expert_file, model_file, optimizer_file
from ds_sparkling.errors import CheckpointError
from ds_sparkling.optim.step_counters import same_numbers
from ds_sparkling.spec.partition import even_pieces, padded_piece


class ZeroFiles:
    """Builds the files of a ZeRO checkpoint, one by one.

    Args:
        contents: the parameters.
        layout: where they go.
        scheduler: the learning-rate scheduler's state.
        prefix: ``bf16_`` or empty, of the optimizer files' names.
    """

    def __init__(self, contents: Contents, layout: Layout, scheduler: Any, prefix: str) -> None:
        self._contents = contents
        self._source = contents.source
        self._layout = layout
        self._scheduler = scheduler
        self._prefix = prefix
        self._experts = expert_layers(self._source.model_states(0))
        self._shapes = contents.shapes()
        self._tied = shared_names(self._source.model_states(0))
        self._numbers = [self._agreed_numbers(flat) for flat in layout.flats]

    def names(self) -> list[str]:
        """Names of all files."""
        return list(self._builders)

    def telling(self) -> list[str]:
        """Names of files that between them take up all of the source's metadata."""
        settings, ranks = self._layout.settings, self._source.layout.settings.ranks
        first = range(min(settings.ranks, ranks))
        models = [model_file(settings.stage, rank) for rank in (first if settings.stage == 3 else range(1))]
        return [*(optimizer_file(rank, self._prefix) for rank in first), *models]

    def build(self, name: str) -> OutputFile:
        """The file of that name."""
        return self._builders[name]()

    @cached_property
    def _builders(self) -> dict[str, Callable[[], PickledFile]]:
        settings = self._layout.settings
        builders: dict[str, Callable[[], PickledFile]] = {}
        for rank in range(settings.ranks):
            builders[optimizer_file(rank, self._prefix)] = partial(self._optimizer, rank)
        for rank in range(settings.ranks if settings.stage == 3 else 1):
            builders[model_file(settings.stage, rank)] = partial(self._model, rank)
        if settings.stage < 3:
            for layer in self._experts:
                for expert in range(layer.experts):
                    builders[expert_file(layer.number, expert)] = partial(self._expert, layer, expert)
        return builders

    # -- optimizer states ---------------------------------------------------------------------------------------

    def _optimizer(self, rank: int) -> PickledFile:
        layout = self._layout
        old = self._source.optimizer_states(rank % self._source.layout.settings.ranks)
        optimizer = dict(old["optimizer_state_dict"])
        file = PickledFile({**old, "optimizer_state_dict": optimizer})
        file.content["ds_config"] = self._config(old.get("ds_config"))
        trimmed = "zero_stage" in optimizer  # DeepSpeed's BF16_Optimizer saves its padding, too
        flats: list[Tensor] = []
        state: dict[int, dict[str, Any]] = {}
        for index, flat in enumerate(layout.flats):
            segments = list(layout.segments(flat, rank))
            lean = flat.size - flat.padding(layout.part(flat, rank)[1]) if flat.window and trimmed else flat.size
            first = flat.names[0]
            runs = [_run(WEIGHT, segment) for segment in segments]
            flats.append(file.room([lean], self._contents.dtype(first, WEIGHT), runs))
            numbers = {key: copy.copy(value) for key, value in self._numbers[index].items()}
            kept = {**numbers, **self._states(file, flat, segments)}
            if kept:
                state[index] = kept
        base = {"state": state, "param_groups": self.param_groups()}
        if layout.settings.stage == 3:
            optimizer["partition_count"] = layout.settings.ranks
            if optimizer.get("ds_zero_partition_groups") is not None:
                optimizer["ds_zero_partition_groups"] = [
                    self._partition_group(index, flat, rank) for index, flat in enumerate(layout.flats)
                ]
            optimizer["optimizer_state_dict"] = base
            optimizer["fp32_flat_groups"] = flats
        else:
            optimizer["base_optimizer_state"] = base
            optimizer["single_partition_of_fp32_groups"] = flats
            optimizer["group_paddings"] = [self._padding(flat, rank, trimmed) for flat in layout.flats]
            if "param_alignment_paddings" in optimizer:
                optimizer["param_alignment_paddings"] = [list(flat.paddings) for flat in layout.flats]
            optimizer["partition_count"] = [flat.ranks for flat in layout.flats]
            optimizer["param_slice_mappings"] = [self._slices(flat, rank) for flat in layout.flats]
        return file

    def _states(self, file: PickledFile, flat: Flat, segments: Sequence[Segment]) -> dict[str, Tensor]:
        """Room for the per-element states of a rank's flat tensor."""
        made = {}
        first = flat.names[0]
        whole = self._source.whole_states(first)
        for key, dtype in self._source.states(first).items():
            if key in whole:
                runs, size = [], 0
                for segment in segments:
                    numel = self._layout.local_numel(segment.name)
                    start = segment.start // numel * numel
                    runs.append(ElementRange(segment.name, key, start, start + numel, size))
                    size += numel
                made[key] = file.room([size], dtype, runs)
            else:
                made[key] = file.room([flat.size], dtype, [_run(key, segment) for segment in segments])
        return made

    def _agreed_numbers(self, flat: Flat) -> dict[str, Any]:
        """The step counters of a flat tensor, on which its parameters must agree."""
        first, *others = flat.names
        numbers = self._contents.numbers(first)
        for name in others:
            found = self._contents.numbers(name)
            if not same_numbers(numbers, found):
                raise CheckpointError(
                    f"{first} and {name} are at different optimizer steps ({numbers} and {found}) but share one flat "
                    "tensor in the new layout"
                )
        return numbers

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {**group.settings, "params": [i for i, flat in enumerate(self._layout.flats) if flat.group == index]}
            for index, group in enumerate(self._layout.groups)
        ]

    def _partition_group(self, index: int, flat: Flat, rank: int) -> dict[str, Any]:
        return {
            "sub_group": index,
            "partition_count": flat.ranks,
            "partition_rank": self._layout.part(flat, rank)[1],
            "partition_ranks": self._layout.part_ranks(flat, rank),
            "families": ["autoep_expert" if flat.expert else "replicated"],
            "group_names": [f"ep_size_{self._layout.settings.expert_parallel}" if flat.expert else "replicated"],
        }

    def _padding(self, flat: Flat, rank: int, trimmed: bool) -> int:
        part = self._layout.part(flat, rank)[1]
        if trimmed:
            return flat.padding(part)
        return flat.size * flat.ranks - flat.numel if part == flat.ranks - 1 else 0

    def _slices(self, flat: Flat, rank: int) -> OrderedDict[str, FragmentAddress]:
        """Where the rank's tensor holds which parameter."""
        segments = self._layout.segments(flat, rank)
        return OrderedDict((s.name, FragmentAddress(s.stop - s.start, s.offset)) for s in segments)

    # -- model states -------------------------------------------------------------------------------------------

    def _model(self, rank: int) -> PickledFile:
        layout = self._layout
        settings = layout.settings
        old = self._source.model_states(rank % self._source.layout.settings.ranks)
        model = dict(old)
        file = PickledFile(model)
        model["module"] = self._module(file, old)
        model["param_shapes"] = [
            OrderedDict((name, torch.Size(layout.local_shape(name))) for name in flat.names) for flat in layout.flats
        ]
        if old.get("frozen_param_shapes") is not None:
            frozen = list(old["frozen_param_shapes"])
            model["frozen_param_shapes"] = OrderedDict((name, torch.Size(layout.local_shape(name))) for name in frozen)
            model["frozen_param_fragments"] = OrderedDict((name, self._fragment(file, name, rank)) for name in frozen)
        if old.get("shared_params") is not None:  # rank 0 alone tells
            model["shared_params"] = self._source.model_states(0)["shared_params"] if rank == 0 else {}
        model["lr_scheduler"] = self._scheduler
        model["dp_world_size"] = settings.ranks
        model["ds_config"] = self._config(old.get("ds_config"))
        if old.get("ds_autoep_layers"):
            model["ds_autoep_layers"] = [
                expert_metadata(entry, self._shapes, rank, settings.ranks, settings.expert_parallel)
                for entry in old["ds_autoep_layers"]
            ]
            info = dict(old.get("universal_checkpoint_info") or {})
            model["universal_checkpoint_info"] = {**info, "ds_autoep_layers": model["ds_autoep_layers"]}
        return file

    def _module(self, file: PickledFile, old: Mapping[str, Any]) -> Any:
        """The module's state dict: buffers, and in stages 1 and 2 whole compute weights."""
        module = copy.copy(old["module"])
        made: dict[tuple[str, int], Tensor] = {}
        for key, tensor in old["module"].items():
            name = self._tied.get(key, key)
            param = self._contents.params.get(name)
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            if param is None:
                module[key] = self._contents.buffer(name, tensor)
                continue
            place = name, tensor.data_ptr()
            if place not in made:
                made[place] = file.room(param.shape, tensor.dtype, [ElementRange(name, WEIGHT, 0, param.numel)])
            module[key] = made[place]
        return module

    def _fragment(self, file: PickledFile, name: str, rank: int) -> Tensor:
        """A frozen parameter's compute weights: this rank's piece of them in stage 3."""
        param, settings = self._contents.params[name], self._layout.settings
        if settings.stage < 3:
            shape = self._layout.local_shape(name)
            return file.room(shape, param.dtype, [ElementRange(name, WEIGHT, 0, self._layout.local_numel(name))])
        piece = even_pieces(param.numel, settings.ranks)[rank]
        size = padded_piece(param.numel, settings.ranks)
        return file.room([size], param.dtype, [ElementRange(name, WEIGHT, piece.start, piece.stop)])

    def _expert(self, layer: ExpertLayer, expert: int) -> PickledFile:
        """The compute weights of one expert."""
        file = PickledFile({})
        for name in layer.names:
            shape = self._contents.params[name].shape[1:]
            numel = self._contents.params[name].numel // layer.experts
            run = ElementRange(name, WEIGHT, expert * numel, (expert + 1) * numel)
            file.content[f"{name}.{expert}"] = file.room(shape, self._contents.params[name].dtype, [run])
        return file

    def _config(self, config: Any) -> Any:
        """The DeepSpeed config with the new expert-parallel size."""
        if not config or not config.get("expert_parallel"):
            return config
        return {
            **config,
            "expert_parallel": {**config["expert_parallel"], "autoep_size": self._layout.settings.expert_parallel},
        }


def _run(key: str, segment: Segment) -> ElementRange:
    return ElementRange(segment.name, key, segment.start, segment.stop, segment.offset)


def file_prefix(source: Source) -> str:
    """What DeepSpeed puts before the names of optimizer files: ``bf16_`` in such runs."""
    if isinstance(source, ZeroSource):
        return source.prefix
    config = source.model_states(0).get("ds_config") or {}
    block = config.get("bf16") or config.get("bfloat16") or {}
    return "bf16_" if block.get("enabled") else ""
