"""Small instances of a model: the same code and proportions, with fewer layers and narrower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from ds_sparkling.discovery.build import BuildModel, build_alone, build_on_meta
from ds_sparkling.discovery.factory import HuggingFaceFactory
from ds_sparkling.discovery.layer_lists import kinds_of, layer_lists
from ds_sparkling.discovery.moves import Moves, find_moves
from ds_sparkling.discovery.small_config import (
    TOKENS,
    VOCABULARY,
    fewer_experts,
    fewer_layers,
    fewer_tokens,
    following,
    head_counts,
    narrower,
    resolved,
    safe_tokens,
    with_widths,
)
from ds_sparkling.discovery.token_selection import selecting
from ds_sparkling.errors import PlanError

#: Parameters of a narrow model that is run without being made smaller: fractions of a second on one core.
SMALL = 5_000_000
#: Parameters of the narrow model beyond which it isn't run unless asked for as it is.
LARGE = 50_000_000
#: Units that a width axis is shrunk to at least: enough for an RMS to mean something.
_UNITS = 16
#: How many powers of two widths are divided by: 1 to 1024.
_POWERS = 11


@dataclass(frozen=True)
class Instance:
    """A model to grow, narrow enough to be run.

    Attributes:
        build_model: builds it from its widths.
        before: width of every axis of the narrow model.
        after: width of every axis that grows, in the wide model.
        layers: how many modules every list of layers is cut to; other lists stay whole.
        note: how it differs from the model asked for, in words; empty if it is that model.
    """

    build_model: BuildModel
    before: dict[str, int]
    after: dict[str, int]
    layers: tuple[tuple[str, int], ...] = ()
    note: str = ""

    @cached_property
    def moves(self) -> Moves:
        """What moves with its axes, as far as that can be told."""
        return find_moves(self, self.before, {name for name, _ in self.build(meta=True).named_parameters()})

    def __call__(self, **widths: int) -> nn.Module:
        """The model at any widths, as probing asks for it."""
        model = self.build_model(**widths)
        for name, kept in self.layers:
            del model.get_submodule(name)[kept:]  # type: ignore[operator]
        return model

    def build(self, *, wide: bool = False, meta: bool = False) -> nn.Module:
        """The narrow (or wide) model.

        Raises:
            PlanError: if it can't be built.
        """
        widths = {**self.before, **self.after} if wide else self.before
        return build_on_meta(self, widths) if meta else _build(self, widths)


@dataclass(frozen=True)
class _Family:
    """An instance at the model's own axis widths, and whether its other widths may be divided along with these."""

    instance: Instance
    narrow: bool = False


def instances(
    build_model: BuildModel, before: Mapping[str, int], after: Mapping[str, int], *, keep_vocabulary: bool = False
) -> Iterator[Instance]:
    """Small instances of a model that grows from widths ``before`` to ``after``, the best one first.

    That is the model itself if it has at most :data:`SMALL` parameters. Otherwise its lists of layers are cut to the
    shortest prefix that has a layer of each kind, and its widths divided by powers of two. Later ones are larger, for
    models that can't be run so small.

    Args:
        keep_vocabulary: whether the inputs are made for the whole vocabulary.

    Raises:
        PlanError: if the model can't be built, or isn't small enough at any widths.
    """
    whole = Instance(build_model, dict(before), dict(after))
    size = _parameters(whole)
    if size <= SMALL:
        yield from _selecting(whole)
        yield whole
        return
    found = False
    for family in _families(whole, keep_vocabulary):
        for instance in _best(family):
            found = True
            yield instance
    if not found:
        raise PlanError(
            f"the model has {size:,} parameters, and no fewer than {LARGE:,} with its widths divided by any power of "
            "two that it can be built with; check it as it is, or give a build_model of fewer layers"
        )


def _selecting(whole: Instance) -> Iterator[Instance]:
    """The model with selections that act on few tokens, if it is built from a config and has such."""
    factory = whole.build_model
    changed = selecting(resolved(factory.config)) if isinstance(factory, HuggingFaceFactory) else {}
    if isinstance(factory, HuggingFaceFactory) and changed:
        note = ", ".join(f"{key} {value}" for key, value in changed.items())
        small = replace(whole, build_model=HuggingFaceFactory({**factory.config, **changed}), note=note)
        yield from (instance for instance, _ in _sized(iter([small])))


def _best(family: _Family) -> list[Instance]:
    """The least divided instance of a family that is small, and the next larger one, if they aren't too large."""
    tried: list[tuple[Instance, int]] = []
    for instance, count in _sized(_narrowed(family)):
        tried.append((instance, count))
        if count <= SMALL:
            break
    return [instance for instance, count in reversed(tried[-2:]) if count <= LARGE]


def _families(whole: Instance, keep_vocabulary: bool) -> Iterator[_Family]:
    """Ways to make a model smaller, those that go furthest first."""
    layers = layer_kinds(whole.build(meta=True))
    if isinstance(whole.build_model, HuggingFaceFactory):
        yield from _hugging_face_families(whole, whole.build_model, layers, keep_vocabulary)
    else:
        cut = tuple((name, count) for name, (count, total) in layers.items() if count < total)
        if cut:
            kept = ", ".join(f"{count} of {layers[name][1]} modules of {name}" for name, count in cut)
            yield _Family(replace(whole, layers=cut, note=kept))
    yield _Family(whole)


def _hugging_face_families(
    whole: Instance, factory: HuggingFaceFactory, layers: Mapping[str, tuple[int, int]], keep_vocabulary: bool
) -> Iterator[_Family]:
    derived = following(factory.config, whole.before)
    everything = resolved({**factory.config, **whole.before})
    config, notes = {key: value for key, value in everything.items() if key not in derived}, []
    before, after = dict(whole.before), dict(whole.after)
    for kept, total in layers.values():
        shorter = fewer_layers(config, total, kept) if kept < total else None
        if shorter is not None:
            config = shorter
            notes.append(f"{kept} of {total} layers")
            break
    changed = selecting(config)
    config |= changed
    notes += [f"{key} {value}" for key, value in changed.items()]
    if not keep_vocabulary:
        config = safe_tokens(config)
    if not keep_vocabulary and VOCABULARY not in before:
        config = fewer_tokens(config)
        notes.append(f"a vocabulary of {config[VOCABULARY]}")
    fewer = fewer_experts(config)
    for experts in (fewer, config) if fewer != config else (config,):
        layered = replace(whole, before=before, after=after, build_model=HuggingFaceFactory(experts))
        layered = replace(layered, note=", ".join([*notes, "fewer experts"] if experts is not config else notes))
        yield _Family(layered, narrow=True)
        yield _Family(layered)


def layer_kinds(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For every outermost list of modules: the shortest prefix with all kinds of its modules, and its length.

    A prefix has two modules at least.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, layers in layer_lists(model).items():
        kinds = kinds_of(model, layers)
        prefix = max(kinds.index(kind) for kind in kinds) + 1
        found[name] = (min(max(prefix, 2), len(kinds)), len(kinds))
    return found


def _narrowed(family: _Family) -> Iterator[Instance]:
    """A family's instance with its widths divided by 1, 2, 4 ... as long as that changes anything."""
    latest = None
    for power in range(_POWERS):
        narrowed = _divided(family, 2**power)
        if latest is None or (narrowed.build_model, narrowed.before) != (latest.build_model, latest.before):
            yield narrowed
        latest = narrowed


def _divided(family: _Family, divisor: int) -> Instance:
    """A family's instance with its widths divided by ``divisor``, as far as they can be."""
    whole, build_model = family.instance, family.instance.build_model
    heads = {axis: width for axis, width in whole.before.items() if _counts_heads(axis)}
    config = dict(build_model.config) if isinstance(build_model, HuggingFaceFactory) else {}
    if family.narrow:  # heads that aren't an axis keep their ratio to those that are
        heads = {**head_counts(config), **heads}
    by = _common_divisor([*heads.values(), *(whole.after[axis] for axis in heads if axis in whole.after)], divisor)
    before = {
        axis: width // by if axis in heads else _shrunk(axis, width, whole.after.get(axis, width), divisor)
        for axis, width in whole.before.items()
    }
    after = {axis: width * before[axis] // whole.before[axis] for axis, width in whole.after.items()}
    if config:
        config = narrower(config, divisor, before) if family.narrow else config
        others = {axis: width // by for axis, width in heads.items() if axis not in before}
        build_model = HuggingFaceFactory(with_widths(config, {**others, **before}))
    divided = ", ".join(f"{axis} {width}" for axis, width in before.items()) if before != whole.before else ""
    note = ", ".join(filter(None, (whole.note, divided)))
    return replace(whole, build_model=build_model, before=before, after=after, note=note)


def _counts_heads(axis: str) -> bool:
    return "head" in axis and not axis.endswith("dim")


def _common_divisor(counts: list[int], most: int) -> int:
    """The largest power of two up to ``most`` that divides all counts and leaves two of each, or 1."""
    by = 1
    while counts and 2 * by <= most and all(count % (2 * by) == 0 and count // (2 * by) >= 2 for count in counts):
        by *= 2
    return by


def _shrunk(axis: str, before: int, after: int, divisor: int) -> int:
    """The width nearest to ``before / divisor`` that can grow by the same ratio, and isn't too small."""
    step = before // math.gcd(before, after)
    least = TOKENS if axis == VOCABULARY else _UNITS
    return min(max(round(max(before / divisor, least) / step), 1) * step, before)


def _sized(candidates: Iterator[Instance]) -> Iterator[tuple[Instance, int]]:
    """Those that can be built, narrow and wide, with the narrow model's parameters."""
    for instance in candidates:
        try:
            instance.build(wide=True, meta=True)
            yield instance, _parameters(instance)
        except PlanError:
            continue


def _parameters(instance: Instance) -> int:
    return sum(param.numel() for param in instance.build(meta=True).parameters())


def _build(build_model: BuildModel, widths: Mapping[str, int]) -> nn.Module:
    """The model on the CPU, always the same, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not those of GPUs, which stay as they are
        return build_alone(build_model, widths, "cpu")
