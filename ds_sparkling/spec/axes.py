"""Named width axes and what each dimension of a parameter has to do with them.

A *width axis* is a model width that can grow, called by the model config's own attribute (``hidden_size``,
``moe_intermediate_size`` ...). A dimension that carries an axis of width ``d`` has ``segments * d * block`` entries.
A dimension may also be made of parts of different widths, of which some never grow: latent attention holds what every
head's keys need and its values side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from enum import Enum
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.spec.checked import Checked, Integer, InWords, Number, Switch, Text, checked, shown
from ds_sparkling.spec.widths import LARGEST_WIDTH


def _some_axis(widths: dict[str, int]) -> dict[str, int]:
    if not widths:
        raise ValueError("is empty; name at least one axis, or drop the growth")
    return widths


#: How many units or entries there are of something.
Count = Annotated[Integer, Field(ge=1, le=LARGEST_WIDTH)]
#: Axis -> width.
Widths = dict[str, Count]
#: Those that a growth grows to.
GrownWidths = Annotated[Widths, AfterValidator(_some_axis)]
#: Of a width, that a model multiplies by.
Power = Annotated[Number, Field(ge=-8, le=8)]


class Role(str, Enum):
    """What a dimension is to the map that its parameter takes part in (method, Sec. 3.2).

    ``fan_out`` and ``fan_in`` are the two sides of a linear map; a bias is fan-out. ``gain`` is a factor (or, next to
    one, a shift) per unit of a norm. ``per_unit`` is any other number per unit, which a new unit always takes over from
    its source. ``index`` counts things that are looked up or told apart, as tokens are: new ones are nobody's copies.
    """

    FAN_OUT = "fan_out"
    FAN_IN = "fan_in"
    GAIN = "gain"
    PER_UNIT = "per_unit"
    INDEX = "index"


def _axis_or_number(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and 1 <= value <= LARGEST_WIDTH):
        raise ValueError(f"must be an axis or at least 1, got {shown(value)}")
    return value


@checked()
class Dim(Checked):
    """One dimension of a parameter."""

    ERROR = PlanError

    axis: Text | None = Field(
        default=None, description="The width axis that it carries. A dimension without one never grows."
    )
    role: Role | None = Field(default=None, description="What it is to the parameter's map. It goes with the axis.")
    block: Count = Field(default=1, kw_only=True, description="Entries per unit, as the head_dim rows of a head.")
    segments: Count = Field(
        default=1,
        kw_only=True,
        description="Copies of the axis in this dimension: 2 for gate and up fused in one tensor.",
    )
    alive: tuple[Integer, ...] = Field(
        default=(),
        kw_only=True,
        description="Segments that zero initialisation must leave copied, as a product of two zeroed factors has no "
        "gradient. The gate half of a gated MLP is one.",
    )
    interleaved: Switch = Field(
        default=False,
        kw_only=True,
        description="Whether the segments take turns unit by unit (gate, up, gate, up) instead of lying end to end.",
    )
    groups: Annotated[int | str, BeforeValidator(_axis_or_number), InWords("axis or number of groups")] = Field(
        default=1,
        kw_only=True,
        description="What parts the units into equal consecutive groups that grow each for itself: another axis, or a "
        "fixed number. Query heads are grouped by the key/value head that they share.",
    )
    power: Power = Field(
        default=0.0,
        kw_only=True,
        description="The model itself multiplies what this parameter gives by width ** power, as some do with "
        "embeddings (1/2) and logits (-1). A growth takes that out again. Of a dimension of parts, the width is the "
        "entries of one segment.",
    )
    fixed: Integer = Field(
        default=0, ge=0, le=LARGEST_WIDTH, kw_only=True, description="Entries of a part that never grows."
    )
    parts: tuple[Dim, ...] = Field(
        default=(),
        kw_only=True,
        description="What each of the segments is made of, end to end: dimensions with an axis of their own, and fixed "
        "ones. The dimension itself then has neither axis nor role.",
    )

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.role is None):
            raise PlanError(
                f"a dimension needs both an axis and a role or neither, got {self.axis!r} and {self.role!r}"
            )
        allowed = {"segments", "power", "parts"} if self.parts else {"fixed"} if self.axis is None else None
        for name in self.given():
            if name == "fixed" if allowed is None else name not in allowed:
                raise PlanError(f"{name} can't be said of a dimension {self._kind}")
        for part in self.parts:
            if part.parts or (part.axis is None and not part.fixed):
                raise PlanError("a part has either an axis and a role or fixed entries, and no parts of its own")
        if self.parts and not self.axes:
            raise PlanError("one of a dimension's parts must carry an axis")
        for segment in self.alive:
            if not 0 <= segment < self.segments:
                raise PlanError(f"alive names segment {segment} of a dimension that has {self.segments}, from 0 on")

    @property
    def _kind(self) -> str:
        if self.parts:
            return "made of parts: say it of one of these"
        return "without an axis" if self.axis is None else "with an axis"

    @property
    def leaves(self) -> tuple[Dim, ...]:
        """Its parts; itself if it isn't made of any."""
        return self.parts or (self,)

    @property
    def axes(self) -> frozenset[str]:
        """The axes that it carries."""
        return frozenset(leaf.axis for leaf in self.leaves if leaf.axis is not None)

    def mapped(self, change: Callable[[Dim], Dim]) -> Dim:
        """The dimension with every part that carries an axis changed; itself changed if it isn't made of parts."""
        if not self.parts:
            return change(self)
        return replace(self, parts=tuple(part if part.axis is None else change(part) for part in self.parts))

    def size(self, width: int) -> int:
        """Entries of a dimension of one axis, or of a part, when that is ``width`` units wide."""
        return self.fixed or self.segments * width * self.block

    def sizes(self, widths: Mapping[str, int]) -> list[int]:
        """Entries of every leaf, in one segment if it is a part.

        Raises:
            PlanError: if ``widths`` lacks an axis.
        """
        for axis in self.axes:
            if axis not in widths:
                raise PlanError(
                    f"a dimension is made of {self.describe()}, so the width of {axis!r} must be known, too"
                )
        return [leaf.size(widths[leaf.axis] if leaf.axis is not None else 0) for leaf in self.leaves]

    def resized(self, size: int, widths: Mapping[str, int]) -> int:
        """Entries at ``widths`` of a dimension that has ``size`` now; ``size`` if none of its axes is in ``widths``."""
        if not self.axes & widths.keys():
            return size
        return sum(self.sizes(widths)) * (self.segments if self.parts else 1)

    def settled(self, widths: Mapping[str, int], growing: Collection[str]) -> Dim:
        """The dimension for a growth of some axes: parts of other axes are fixed at their present ``widths``."""
        if not self.parts:
            return self
        if not self.axes & set(growing):
            return FIXED
        sizes = zip(self.parts, self.sizes(widths), strict=True)
        return replace(self, parts=tuple(part if part.axis in growing else Dim(fixed=size) for part, size in sizes))

    def laid(self, make: Callable[[Dim], Tensor]) -> Tensor:
        """What ``make`` gives for the entries of a leaf, for those of the dimension."""
        if not self.parts:
            return make(self)
        return torch.cat([make(part) for part in self.parts]).repeat(self.segments)

    def laid_indices(self, make: Callable[[Dim], Tensor], widths: Mapping[str, int]) -> Tensor:
        """The same of indices: ``make`` gives those in a leaf, this those in the dimension.

        Args:
            widths: at which the indices count.
        """
        if not self.parts:
            return make(self)
        sizes = torch.tensor(self.sizes(widths))
        starts = (sizes.cumsum(0) - sizes).tolist()
        segment = torch.cat([make(part) + start for part, start in zip(self.parts, starts, strict=True)])
        return (torch.arange(self.segments)[:, None] * int(sizes.sum()) + segment).flatten()

    def describe(self) -> str:
        """Its parts in words: axis and role of those that have them, "-" for what never grows."""
        text = " + ".join(f"{leaf.axis} ({leaf.role.value})" if leaf.role is not None else "-" for leaf in self.leaves)
        return text if self.segments == 1 or not self.parts else f"{self.segments} of ({text})"

    def group_count(self, widths: Mapping[str, int]) -> int:
        """How many groups its units are in at ``widths``.

        Raises:
            PlanError: if ``widths`` doesn't have the axis that groups them.
        """
        if isinstance(self.groups, int):
            return self.groups
        if self.groups not in widths:
            raise PlanError(
                f"{self.axis} is grouped by {self.groups!r}, whose width isn't known: name it as an axis, too, or give "
                "the number of groups"
            )
        return widths[self.groups]

    def units(self, width: int) -> Tensor:
        """The unit of every entry, int64 of shape [size(width)]."""
        unit = torch.arange(width)
        if self.interleaved:
            return unit.repeat_interleave(self.segments * self.block)
        return unit.repeat_interleave(self.block).repeat(self.segments)

    def segment(self, width: int) -> Tensor:
        """The segment of every entry, int64 of shape [size(width)]."""
        segment = torch.arange(self.segments)
        if self.interleaved:
            return segment.repeat_interleave(self.block).repeat(width)
        return segment.repeat_interleave(width * self.block)

    def sources(self, unit_sources: Tensor, before: int) -> Tensor:
        """The old entry that every new entry comes from.

        Args:
            unit_sources: the old unit that every new unit comes from, [width after].
            before: the width before.

        Returns:
            int64 of shape [size(after)].
        """
        width = len(unit_sources)
        source = unit_sources[self.units(width)]
        segment = self.segment(width)
        if self.interleaved:
            base = source * self.segments + segment
        else:
            base = segment * before + source
        return base * self.block + torch.arange(self.size(width)) % self.block

    @model_serializer(mode="wrap")
    def _what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What isn't a default; empty for a dimension that never grows."""
        data = handler(self)
        return {key: data[key] for key in self.given()}


#: A dimension that carries no axis.
FIXED = Dim()


class Norm(str, Enum):
    """What a norm divides by, and takes off before: the root mean square, or the standard deviation and the mean."""

    RMS = "rms"
    LAYER = "layer"


def _pairs(powers: Any) -> Any:
    return tuple(sorted(powers.items())) if isinstance(powers, Mapping) else powers


@checked()
class ParamAxes(Checked):
    """What each dimension of one parameter is."""

    ERROR = PlanError

    dims: tuple[Dim, ...] = Field(description="One entry per dimension.")
    stacked_experts: Switch = Field(
        default=False,
        kw_only=True,
        description="Whether dimension 0 counts experts, so that each index is a weight matrix of its own.",
    )
    head_gain: Switch = Field(
        default=False,
        kw_only=True,
        description="Whether this norm gain feeds a head that is tied to the embedding. It then takes the head's "
        "fan-in factor (method, App. D.1).",
    )
    norm: Norm | None = Field(default=None, kw_only=True, description="The kind of norm that this is the gain of.")
    layer_output: Switch = Field(
        default=False,
        kw_only=True,
        description="Whether a layer in which this is zero, with all others of its kind, adds nothing to what passes "
        "through it.",
    )
    offset: Number = Field(
        default=0.0,
        ge=-1000,
        le=1000,
        kw_only=True,
        description="What the model adds to the stored gain: 1 where the gain is 1 + w.",
    )
    powers: Annotated[
        tuple[tuple[Text, Power], ...],
        BeforeValidator(_pairs),
        PlainSerializer(dict),
        InWords("object of axis: number"),
    ] = Field(
        default=(),
        kw_only=True,
        description="Axes that no dimension carries, and by which powers of their widths the model multiplies what "
        "this parameter gives, as the bias of a map whose output is scaled by its input's width. A growth takes that "
        "out.",
    )

    def __post_init__(self) -> None:
        if self.powers and not self.dims:
            raise PlanError("powers are of parameters that have a dimension")
        carried = [axis for axis, _ in self.powers if axis in self.axes]
        if carried:
            raise PlanError(f"the power of {carried[0]} belongs to the dimension that carries it, not to 'powers'")
        if self.norm is None and any(leaf.role is Role.GAIN for leaf in self.leaves):
            raise PlanError("a gain needs the kind of norm that it belongs to: 'rms' or 'layer'")

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(leaf.axis for leaf in self.leaves if leaf.axis is not None)

    @property
    def leaves(self) -> tuple[Dim, ...]:
        """Its dimensions, those that are made of parts as these."""
        return tuple(leaf for dim in self.dims for leaf in dim.leaves)

    def mapped(self, change: Callable[[Dim], Dim]) -> ParamAxes:
        """The axes with every dimension, or part, that carries an axis changed."""
        return replace(self, dims=tuple(dim.mapped(change) if dim.axes else dim for dim in self.dims))

    def shape(self, shape: tuple[int, ...], widths: Mapping[str, int]) -> tuple[int, ...]:
        """``shape`` with every dimension whose axis is in ``widths`` set to that width.

        Raises:
            PlanError: if only some of the axes of a dimension of parts are in ``widths``.
        """
        return tuple(dim.resized(size, widths) for dim, size in zip(self.dims, shape, strict=True))

    def contradiction(self, shape: tuple[int, ...], widths: Mapping[str, int]) -> str | None:
        """How a parameter of that shape contradicts the axes at ``widths``, in words; None if it doesn't.

        Raises:
            PlanError: if only some of the axes of a dimension of parts are in ``widths``.
        """
        if len(self.dims) != len(shape):
            return f"has {len(self.dims)} dimensions, not {len(shape)}"
        expected = self.shape(shape, widths)
        if expected != tuple(shape):
            return f"is {shown(expected)}, not {tuple(shape)}"
        for leaf in self.leaves:
            groups = widths.get(leaf.groups) if isinstance(leaf.groups, str) else leaf.groups
            units = None if leaf.axis is None else widths.get(leaf.axis)
            if units is not None and groups is not None and units % groups:
                return f"has {units} units of {leaf.axis} in {groups} equal groups, which can't be"
        return None

    def settled(self, widths: Mapping[str, int], growing: Collection[str]) -> ParamAxes:
        """The axes for a growth of the axes ``growing`` from ``widths``, as :meth:`Dim.settled` makes them."""
        return replace(self, dims=tuple(dim.settled(widths, growing) for dim in self.dims))

    @model_serializer(mode="wrap")
    def _what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The dimensions, and what isn't a default."""
        data = handler(self)
        return {key: data[key] for key in self.given()}
