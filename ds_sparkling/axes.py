"""Named width axes and what each dimension of a parameter has to do with them.

A *width axis* is a model width that can grow, called by the model config's own attribute (``hidden_size``,
``moe_intermediate_size`` ...). A dimension that carries an axis of width ``d`` has ``segments * d * block`` entries,
laid out segment by segment, unit by unit: entry ``(s * d + u) * block + b`` belongs to unit ``u``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ds_sparkling.errors import PlanError


class Role(str, Enum):
    """Which side of a linear map a dimension is (method, Sec. 3.2)."""

    FAN_OUT = "fan_out"
    FAN_IN = "fan_in"
    GAIN = "gain"


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter.

    Attributes:
        axis: the width axis it carries, or None for a dimension that never grows.
        role: its :class:`Role`; None exactly when ``axis`` is None.
        block: entries per unit (``head_dim`` rows per head); 1 otherwise.
        segments: independent copies of the axis laid end to end (2 for gate and up fused in one tensor).
        alive: segments that zero initialisation must leave copied, because a product of two zeroed factors has no
            gradient (the gate half of a gated MLP).
    """

    axis: str | None = None
    role: Role | None = None
    block: int = 1
    segments: int = 1
    alive: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.role is None):
            raise PlanError(
                f"a dimension needs both an axis and a role or neither, got {self.axis!r} and {self.role!r}"
            )
        if self.block < 1 or self.segments < 1:
            raise PlanError(f"block and segments must be at least 1, got {self.block} and {self.segments}")

    def size(self, width: int) -> int:
        """Entries of the dimension when its axis is ``width`` units wide."""
        return self.segments * width * self.block


#: A dimension that carries no axis.
FIXED = Dim()


@dataclass(frozen=True)
class ParamAxes:
    """What each dimension of one parameter is.

    Attributes:
        dims: one :class:`Dim` per dimension.
        stacked_experts: dimension 0 counts experts; each index is a weight matrix of its own.
        head_gain: this norm gain feeds a head that is tied to the embedding, and takes the head's fan-in factor
            (method, App. D.1).
    """

    dims: tuple[Dim, ...]
    stacked_experts: bool = False
    head_gain: bool = False

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
        dims = [
            {}
            if dim.axis is None or dim.role is None
            else {
                "axis": dim.axis,
                "role": dim.role.value,
                "block": dim.block,
                "segments": dim.segments,
                "alive": list(dim.alive),
            }
            for dim in self.dims
        ]
        return {"dims": dims, "stacked_experts": self.stacked_experts, "head_gain": self.head_gain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParamAxes:
        dims = tuple(
            Dim(d["axis"], Role(d["role"]), d["block"], d["segments"], tuple(d["alive"])) if d else FIXED
            for d in data["dims"]
        )
        return cls(dims, data["stacked_experts"], data["head_gain"])
