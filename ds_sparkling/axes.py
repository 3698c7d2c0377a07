"""Named width axes and what each dimension of a parameter has to do with them.

A *width axis* is a model width that can grow, called by the model config's own attribute (``hidden_size``,
``moe_intermediate_size`` ...). A dimension that carries an axis of width ``d`` has ``segments * d * block`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError


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


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter.

    Attributes:
        axis: the width axis it carries, or None for a dimension that never grows.
        role: its :class:`Role`; None exactly when ``axis`` is None.
        block: entries per unit (``head_dim`` rows per head); 1 otherwise.
        segments: copies of the axis in this dimension (2 for gate and up fused in one tensor).
        alive: segments that zero initialisation must leave copied, because a product of two zeroed factors has no
            gradient (the gate half of a gated MLP).
        interleaved: the segments take turns unit by unit (gate, up, gate, up ...) instead of lying end to end.
        groups: what parts the units into equal consecutive groups that grow each for itself: another axis, or a number
            that is fixed. Query heads are grouped by the key/value head that they share.
        power: the model itself multiplies what this parameter gives by ``width ** power``, as some do with embeddings
            (1/2) and logits (-1). A growth takes that out again.
    """

    axis: str | None = None
    role: Role | None = None
    block: int = 1
    segments: int = 1
    alive: tuple[int, ...] = ()
    interleaved: bool = False
    groups: str | int = 1
    power: float = 0.0

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.role is None):
            raise PlanError(
                f"a dimension needs both an axis and a role or neither, got {self.axis!r} and {self.role!r}"
            )
        if self.block < 1 or self.segments < 1:
            raise PlanError(f"block and segments must be at least 1, got {self.block} and {self.segments}")
        if isinstance(self.groups, int) and self.groups < 1:
            raise PlanError(f"groups must be an axis or at least 1, got {self.groups}")

    def size(self, width: int) -> int:
        """Entries of the dimension when its axis is ``width`` units wide."""
        return self.segments * width * self.block

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what isn't a default, and axis and role always; empty for a dimension that never grows."""
        if self.axis is None or self.role is None:
            return {}
        data: dict[str, Any] = {"axis": self.axis, "role": self.role.value}
        for entry in fields(self)[2:]:
            value = getattr(self, entry.name)
            if value != entry.default:
                data[entry.name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Dim:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError, TypeError, KeyError: if it is none of ours.
        """
        if not data:
            return FIXED
        unknown = sorted(data.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        return cls(**{**data, "role": Role(data["role"]), "alive": tuple(data.get("alive", ()))})


#: A dimension that carries no axis.
FIXED = Dim()


class Norm(str, Enum):
    """What a norm divides by, and takes off before: the root mean square, or the standard deviation and the mean."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True)
class ParamAxes:
    """What each dimension of one parameter is.

    Attributes:
        dims: one :class:`Dim` per dimension.
        stacked_experts: dimension 0 counts experts; each index is a weight matrix of its own.
        head_gain: this norm gain feeds a head that is tied to the embedding, and takes the head's fan-in factor
            (method, App. D.1).
        norm: the kind of norm that this is the gain of.
        offset: what the model adds to the stored gain (1 where the gain is ``1 + w``).
    """

    dims: tuple[Dim, ...]
    stacked_experts: bool = False
    head_gain: bool = False
    norm: Norm | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.norm is None and any(dim.role is Role.GAIN for dim in self.dims):
            raise PlanError("a gain needs the kind of norm that it belongs to: 'rms' or 'layer'")

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(dim.axis for dim in self.dims if dim.axis is not None)

    def shape(self, shape: tuple[int, ...], widths: Mapping[str, int]) -> tuple[int, ...]:
        """``shape`` with every dimension whose axis is in ``widths`` set to that width."""
        return tuple(
            dim.size(widths[dim.axis]) if dim.axis is not None and dim.axis in widths else size
            for dim, size in zip(self.dims, shape, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the dimensions, and what isn't a default."""
        data: dict[str, Any] = {"dims": [dim.to_dict() for dim in self.dims]}
        for entry in fields(self)[1:]:
            value = getattr(self, entry.name)
            if value != entry.default:
                data[entry.name] = value.value if isinstance(value, Norm) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParamAxes:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError, TypeError, KeyError: if it is none of ours.
        """
        unknown = sorted(data.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        known = {**data, "dims": tuple(Dim.from_dict(dim) for dim in data["dims"])}
        if known.get("norm") is not None:
            known["norm"] = Norm(known["norm"])
        return cls(**known)
