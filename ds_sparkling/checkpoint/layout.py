"""Tell which rank's flat tensors hold which elements of which parameter, at any ZeRO stage. Nothing is read here.

Positions are in *logical* parameters: all experts of a layer in one tensor ``[experts, ...]``, flattened. A rank of an
expert-parallel group holds a contiguous share of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ds_sparkling.spec.partition import Pieces, even_pieces, expert_groups, padded_piece, round_robin, sub_groups

Shape = tuple[int, ...]

#: Elements of the experts' parameters on one rank that DeepSpeed puts into one optimizer group at most.
EXPERT_GROUP_LIMIT = 178956971
#: Stages 1 and 2 make every rank's window a multiple of so many elements.
_WINDOW_ALIGNMENT = 2
#: Bytes that ``zero_optimization.parameter_alignment`` aligns parameters to.
_PARAMETER_ALIGNMENT = 16


@dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
        name: in the engine's module.
        shape: its logical shape, all experts counted.
        dtype: of the compute weights.
        expert: split over the expert-parallel ranks.
        trained: in the optimizer; otherwise frozen, and its compute weights are all there is.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    expert: bool = False
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local_shape(self, expert_parallel: int) -> Shape:
        """Its shape on one of ``expert_parallel`` ranks that share the experts."""
        return (self.shape[0] // expert_parallel, *self.shape[1:]) if self.expert else self.shape


@dataclass(frozen=True)
class Group:
    """One parameter group of the base optimizer: its hyperparameters, and its trained parameters in order."""

    settings: Mapping[str, Any]
    names: tuple[str, ...]

    @property
    def expert(self) -> bool:
        return bool(self.settings.get("moe", False))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of the DeepSpeed config decides about the layout.

    Attributes:
        stage: ZeRO stage, 1 to 3.
        ranks: data-parallel world size.
        expert_parallel: size of the expert-parallel groups; 1 without.
        sub_group_size: stage 3 only.
        round_robin: ``round_robin_gradients``, stages 1 and 2.
        parameter_alignment: stages 1 and 2.
        offloaded: the optimizer is offloaded to the CPU.
        apart: parameters that stage 3 doesn't put into sub-groups with others: AutoEP's routers, if the rest of the
            model was made under ``zero.Init`` and so in another process group.
    """

    stage: int
    ranks: int
    expert_parallel: int = 1
    sub_group_size: int = 10**9
    round_robin: bool = False
    parameter_alignment: bool = False
    offloaded: bool = False
    apart: frozenset[str] = frozenset()

    def parts(self, *, expert: bool) -> int:
        """In how many parts a flat tensor is: over all ranks, or over those with the same experts."""
        return self.ranks // self.expert_parallel if expert else self.ranks


@dataclass(frozen=True, kw_only=True)
class Flat:
    """One flat tensor that each rank of a partition group holds a part of: a sub-group of stage 3, or a group.

    Attributes:
        group: index of the optimizer's group.
        expert: partitioned over the ranks that share experts, not over all.
        names: its parameters in order.
        numels: their elements on one expert-parallel rank.
        offsets: where they begin: under stage 3 in each rank's tensor, otherwise in the whole group's.
        paddings: elements between a parameter and the next.
        size: elements of each rank's tensor.
        ranks: in how many parts it is.
        window: cut into windows wherever parameters begin and end (stages 1 and 2).
    """

    group: int
    expert: bool
    names: tuple[str, ...]
    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    paddings: tuple[int, ...]
    size: int
    ranks: int
    window: bool

    @property
    def numel(self) -> int:
        """Elements of the parameters and what lies between them, in all ranks' tensors."""
        return self.offsets[-1] + self.numels[-1] if self.window else self.size * self.ranks

    def padding(self, part: int) -> int:
        """Elements at the end of part ``part`` that belong to no parameter (stages 1 and 2)."""
        return min(max((part + 1) * self.size - self.numel, 0), self.size)


@dataclass(frozen=True)
class Segment:
    """A stretch of a logical parameter in a rank's flat tensor.

    Attributes:
        name: the parameter.
        start, stop: which of its elements.
        offset: where ``start`` lies in the flat tensor.
    """

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Extent:
    """``numel`` elements from ``offset`` on in flat tensor ``flat`` of rank ``rank``."""

    rank: int
    flat: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """All flat tensors of a checkpoint.

    Attributes:
        params: every parameter, frozen ones too, by name, in the module's order.
        groups: the optimizer's groups.
        flats: in the order of the files.
    """

    settings: Settings
    params: Mapping[str, Param]
    groups: tuple[Group, ...]
    flats: tuple[Flat, ...]

    def part(self, flat: Flat, rank: int) -> tuple[int, int]:
        """The expert-parallel rank, and which part of ``flat``, data-parallel rank ``rank`` holds."""
        if flat.expert:
            return rank % self.settings.expert_parallel, rank // self.settings.expert_parallel
        return 0, rank

    def part_ranks(self, flat: Flat, rank: int) -> list[int]:
        """The ranks that share ``flat`` with ``rank``."""
        if flat.expert:
            return list(range(self.part(flat, rank)[0], self.settings.ranks, self.settings.expert_parallel))
        return list(range(self.settings.ranks))

    def local_numel(self, name: str) -> int:
        """Elements of a parameter on one expert-parallel rank."""
        return math.prod(self.local_shape(name))

    def local_shape(self, name: str) -> Shape:
        """Shape of a parameter on one expert-parallel rank."""
        return self.params[name].local_shape(self.settings.expert_parallel)

    def segments(self, flat: Flat, rank: int) -> Iterator[Segment]:
        """What ``rank``'s tensor of ``flat`` holds, empty pieces left out."""
        expert_rank, part = self.part(flat, rank)
        for name, numel, offset in zip(flat.names, flat.numels, flat.offsets, strict=True):
            base = expert_rank * numel
            if flat.window:
                piece = Pieces(numel, flat.size, flat.ranks, offset)[part]
                offset = max(offset - part * flat.size, 0)
            else:
                piece = even_pieces(numel, flat.ranks)[part]
            if piece.numel:
                yield Segment(name, base + piece.start, base + piece.stop, offset)

    def touching(self, flat: Flat, rank: int) -> list[str]:
        """The parameters of which ``rank`` holds a part."""
        return [segment.name for segment in self.segments(flat, rank)]

    def places(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """Where the elements ``start .. stop`` of a trained logical parameter lie, in order."""
        index, member = self._members[name]
        flat = self.flats[index]
        numel, offset = flat.numels[member], flat.offsets[member]
        while start < stop:
            expert_rank, position = divmod(start, numel)
            if flat.window:
                part, at = divmod(offset + position, flat.size)
                left = min(flat.size - at, numel - position)
            else:
                size = padded_piece(numel, flat.ranks)
                part, at = divmod(position, size)
                left = min(size - at, numel - position)
                at += offset
            count = min(left, stop - start)
            rank = part * self.settings.expert_parallel + expert_rank if flat.expert else part
            yield Extent(rank, index, at, count)
            start += count

    def position(self, name: str) -> int:
        """A parameter's place in the module's order."""
        return self._positions[name]

    def flat_of(self, name: str) -> int:
        """Index of the flat tensor that holds a trained parameter."""
        return self._members[name][0]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.params)}

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        return {
            name: (index, member) for index, flat in enumerate(self.flats) for member, name in enumerate(flat.names)
        }


def make_layout(settings: Settings, params: Mapping[str, Param], groups: Sequence[Group]) -> Layout:
    """The layout that DeepSpeed would give these parameters.

    Args:
        groups: the optimizer's groups as they shall be (see :func:`regrouped`).
    """
    flats: list[Flat] = []
    for index, group in enumerate(groups):
        if not group.names:
            continue
        expert = params[group.names[0]].expert
        ranks = settings.parts(expert=expert)
        numels = {name: math.prod(params[name].local_shape(settings.expert_parallel)) for name in group.names}
        if settings.stage == 3:
            for names in _by_process_group(group.names, settings.apart):
                flats += _sub_groups(settings, index, expert, names, numels, ranks)
        else:
            flats.append(_window(settings, index, expert, group.names, numels, ranks, params))
    return Layout(settings, params, tuple(groups), tuple(flats))


def regrouped(layout: Layout, params: Mapping[str, Param], expert_parallel: int) -> tuple[tuple[Group, ...], list[int]]:
    """The optimizer's groups for other sizes: DeepSpeed splits the experts' groups by their number of elements.

    Args:
        layout: of the checkpoint as it is.
        params: its parameters at the new sizes.

    Returns:
        The new groups, and which old one each has its settings from.
    """
    made: list[Group] = []
    origins: list[int] = []
    for first, last in _splits(layout):
        splits = layout.groups[first:last]
        settings = splits[0].settings
        names = [name for split in splits for name in split.names]
        by_size = all(_by_size(split, layout) for split in splits)
        if by_size:
            names.sort(key=layout.position)
        counts = [len(split.names) for split in splits]
        if splits[0].expert:
            settings = {**settings, "name": f"ep_size_{expert_parallel}"}
            if counts == expert_groups([layout.local_numel(name) for name in names], EXPERT_GROUP_LIMIT):
                sizes = [math.prod(params[name].local_shape(expert_parallel)) for name in names]
                counts = expert_groups(sizes, EXPERT_GROUP_LIMIT)
        for start, stop in itertools.pairwise(itertools.accumulate(counts, initial=0)):
            members = names[start:stop]
            if by_size:
                members.sort(key=lambda name: params[name].local_shape(expert_parallel), reverse=True)
            made.append(Group(settings, tuple(members)))
            origins.append(first)
    return tuple(made), origins


def _by_size(group: Group, layout: Layout) -> bool:
    """Whether Muon has sorted the group's parameters by their sizes.

    It does, unless the parameters are made in pieces under ``zero.Init`` and so have no size; then they are in the
    module's order.
    """
    if not group.settings.get("use_muon", False):
        return False
    original = sorted(group.names, key=layout.position)
    if layout.settings.stage == 3 and list(group.names) == original:
        return False
    return list(group.names) == sorted(original, key=layout.local_shape, reverse=True)


def _splits(layout: Layout) -> Iterator[tuple[int, int]]:
    """Stretches of groups that DeepSpeed may have split from one: consecutive groups of experts, set alike."""
    groups = layout.groups
    first = 0
    while first < len(groups):
        last = first + 1
        while groups[first].expert and last < len(groups) and groups[last].settings == groups[first].settings:
            last += 1
        yield first, last
        first = last


def _by_process_group(names: Sequence[str], apart: frozenset[str]) -> list[list[str]]:
    """A group's parameters, those of one process group together, that of the first one first."""
    split: dict[bool, list[str]] = {}
    for name in names:
        split.setdefault(name in apart, []).append(name)
    return list(split.values())


def _sub_groups(
    settings: Settings, group: int, expert: bool, names: Sequence[str], numels: Mapping[str, int], ranks: int
) -> Iterator[Flat]:
    sizes = [padded_piece(numels[name], ranks) for name in names]
    first = 0
    for count in sub_groups(sizes, settings.sub_group_size):
        last = first + count
        *offsets, size = itertools.accumulate(sizes[first:last], initial=0)
        members = tuple(names[first:last])
        local = tuple(numels[name] for name in members)
        yield Flat(
            group=group,
            expert=expert,
            names=members,
            numels=local,
            offsets=tuple(offsets),
            paddings=(0,) * count,
            size=size,
            ranks=ranks,
            window=False,
        )
        first = last


def _window(
    settings: Settings,
    group: int,
    expert: bool,
    names: Sequence[str],
    numels: Mapping[str, int],
    ranks: int,
    params: Mapping[str, Param],
) -> Flat:
    if settings.round_robin:
        names = [names[position] for position in round_robin(len(names), ranks)]
    aligned = 1
    if settings.parameter_alignment:
        aligned = _PARAMETER_ALIGNMENT // math.gcd(_PARAMETER_ALIGNMENT, params[names[0]].dtype.itemsize)
    offsets, paddings, end = [], [], 0
    for position, name in enumerate(names):
        offsets.append(end)
        end += numels[name]
        paddings.append(0 if position == len(names) - 1 else -end % aligned)
        end += paddings[-1]
    multiple = _WINDOW_ALIGNMENT * ranks
    size = -(-end // multiple) * multiple // ranks
    return Flat(
        group=group,
        expert=expert,
        names=tuple(names),
        numels=tuple(numels[name] for name in names),
        offsets=tuple(offsets),
        paddings=tuple(paddings),
        size=size,
        ranks=ranks,
        window=True,
    )
