"""The factors that keep activation RMS, or the function, through a widening (method, Sec. 3.2).

``d`` and ``d'`` are an axis's width before and after, ``c = d'/d - 1``, and ``m_j`` is the multiplicity of the source
of unit ``j``. An axis is *normed* if RMSNorm gains carry it: its activations are divided by their RMS over all units
before they are consumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ds_sparkling.errors import PlanError
from ds_sparkling.growth.random import standard_normal, stream_key
from ds_sparkling.growth.units import check_widths, multiplicities, old_units, source_units
from ds_sparkling.spec.axes import Dim, Role
from ds_sparkling.spec.strategy import Init, Scaling, Strategy

#: A factor: the same for all entries of a dimension, or float64 per entry.
Scale = float | Tensor


@dataclass(frozen=True)
class AxisGrowth:
    """One axis going from ``before`` to ``after`` units.

    Attributes:
        normed: whether its activations are divided by their RMS over all units.
        groups: how many groups its units are in before and after.
        rigid: why the function can be kept only if all units get equally many copies; empty if it always can.
    """

    axis: str
    before: int
    after: int
    _: KW_ONLY
    normed: bool
    groups: tuple[int, int] = (1, 1)
    rigid: str = ""

    def __post_init__(self) -> None:
        check_widths(self.axis, self.before, self.after, self.groups)


def rms_factor(before: int, after: int, both_copied: bool) -> float:
    """The factor on a tensor whose fan-in grows (Eq. 14, 16).

    It keeps RMS(y)/RMS(x), but for new columns that are zero, which App. B rescales like random ones: there the ratio
    right after the growth is ``sqrt(d/d')`` times what it was.

    ``sqrt(d/d')`` unless producing rows and consuming columns are both copied; then ``1/sqrt(1 + 3c)`` for c <= 1 and
    ``1/(1 + c)`` above.
    """
    if not both_copied:
        return math.sqrt(before / after)
    c = after / before - 1
    return 1 / math.sqrt(1 + 3 * c) if c <= 1 else before / after


@dataclass(frozen=True, kw_only=True)
class UnitScales:
    """Factors of the weights and of the gradients of an axis's units, float64 of shape [d'] each.

    Every field is the factor relative to the source unit: of rows that produce the unit, of columns that consume it,
    of its norm gain, and of a norm gain that feeds a tied head. The gradient factors hold for old units in the wide
    model where the function is kept. ``stretch`` is d'/d.
    """

    fan_out: Tensor
    fan_in: Tensor
    gain: Tensor
    head_gain: Tensor
    fan_out_gradient: Tensor
    fan_in_gradient: Tensor
    gain_gradient: Tensor
    head_gain_gradient: Tensor

    stretch: float

    def weight(self, dim: Dim, head_gain: bool) -> Tensor:
        """The factors of a dimension's units, with the model's own ``width ** power`` taken out."""
        factors = {
            Role.FAN_OUT: self.fan_out,
            Role.FAN_IN: self.fan_in,
            Role.GAIN: self.head_gain if head_gain else self.gain,
        }.get(dim.role or Role.INDEX, self._ones)
        return factors * self.stretch**-dim.power

    def gradient(self, dim: Dim, head_gain: bool) -> Tensor:
        """The factors of the gradients of a dimension's old units."""
        factors = {
            Role.FAN_OUT: self.fan_out_gradient,
            Role.FAN_IN: self.fan_in_gradient,
            Role.GAIN: self.head_gain_gradient if head_gain else self.gain_gradient,
            # Copies share what their source's gradient was.
            Role.PER_UNIT: self.gain_gradient,
        }.get(dim.role or Role.INDEX, self._ones)
        return factors * self.stretch**dim.power

    @property
    def _ones(self) -> Tensor:
        return torch.ones_like(self.gain)


def consumed_shares(growth: AxisGrowth, strategy: Strategy, number: int) -> Tensor:
    """What share of its even one each unit keeps of the columns that consume its twins; float64 of shape [d'].

    Over the twins of a unit they are 1 in the mean. Random ones are uniform on the simplex.
    """
    sizes = growth.before, growth.after, growth.groups
    source, m = source_units(*sizes), multiplicities(*sizes).double()
    if strategy.split.shares is None:
        # A sum of two squared normals is exponential, without a logarithm, which differs between vector units.
        key = stream_key(strategy.seed, number, f"split/{growth.axis}")
        first, second = standard_normal(key, torch.arange(2), torch.arange(growth.after)).double().square()
        parts = first + second
    else:
        old, copy = strategy.split.shares
        parts = torch.where(old_units(*sizes), old, copy).double()
    totals = torch.zeros(growth.before, dtype=torch.float64).index_add_(0, source, parts)[source]
    return torch.where(m > 1, m * parts / totals, 1.0)


def unit_scales(growth: AxisGrowth, strategy: Strategy, number: int = 1) -> UnitScales:
    """The factors of every unit of one grown axis at growth ``number``.

    ``function`` with copies divides each consuming column by its source's multiplicity. On a normed axis whose ratio
    isn't an integer that alone would change the RMS that RMSNorm divides by, so unit ``j`` is also produced
    ``a_j = sqrt(d'/(d m_j))`` times as large (which leaves the mean square over units as it was) and consumed
    ``1/(m_j a_j)`` times; ``m_j a_j^2 = d'/d`` makes a tied head's factor the same for every unit, ``d/d'``.

    Raises:
        PlanError: if ``function`` can't be kept on this axis.
    """
    d, d_new = growth.before, growth.after
    ones = torch.ones(d_new, dtype=torch.float64)
    m = multiplicities(d, d_new, growth.groups).double()
    shares = ones if strategy.split.even else consumed_shares(growth, strategy, number)
    if strategy.scaling is Scaling.FUNCTION and growth.rigid:
        if strategy.fan_out is not Init.COPY:
            raise PlanError(
                f"{growth.axis}: scaling 'function' can't hold with init {strategy.pair}, because {growth.rigid}; use "
                "copy-copy or scaling 'rms'"
            )
        if bool((m != m[0]).any()):
            raise PlanError(
                f"{growth.axis}: scaling 'function' can't hold from {d} to {d_new} units, because {growth.rigid}; grow "
                "by a whole ratio or use scaling 'rms'"
            )
    if strategy.scaling is Scaling.FUNCTION and strategy.fan_out is Init.COPY:
        a = (d_new / d / m).sqrt() if growth.normed else ones
        return UnitScales(
            fan_out=a,
            fan_in=shares / (m * a),
            gain=ones,
            head_gain=shares * (d / d_new),
            fan_out_gradient=shares / (m * a),
            fan_in_gradient=a,
            gain_gradient=shares / m,
            head_gain_gradient=a * a,
            stretch=d_new / d,
        )
    if strategy.scaling is Scaling.FUNCTION:
        if growth.normed and strategy.fan_out is Init.RANDOM:
            raise PlanError(
                f"{growth.axis}: scaling 'function' can't hold with init {strategy.pair}, because new random units "
                "change the RMS that the norms on this axis divide by; use copy-copy or zero-copy"
            )
        # Zero units leave everything as it was but the width that RMSNorm averages over.
        factor = math.sqrt(d / d_new) if growth.normed else 1.0
    elif strategy.scaling is Scaling.RMS:
        factor = rms_factor(d, d_new, strategy.fan_out is Init.COPY and strategy.fan_in is Init.COPY)
    else:
        factor = 1.0
    # Zero units don't add to the RMS that RMSNorm divides by, so old units come out of it this much larger.
    louder = math.sqrt(d_new / d) if growth.normed and strategy.fan_out is Init.ZERO else 1.0
    scaled = shares * factor
    return UnitScales(
        fan_out=ones,
        fan_in=scaled,
        gain=ones,
        head_gain=scaled,
        fan_out_gradient=scaled * louder,
        fan_in_gradient=ones * louder,
        gain_gradient=scaled * louder,
        head_gain_gradient=ones * louder,
        stretch=d_new / d,
    )


def keeps_function(strategy: Strategy, integer: bool) -> bool:
    """Whether a strategy promises the same function, at ``integer`` ratios or at any."""
    return strategy.scaling is Scaling.FUNCTION or (strategy.all_copied and integer and strategy.scaling is Scaling.RMS)


def whole_ratios(growths: Iterable[AxisGrowth]) -> bool:
    """Whether every unit gets equally many copies, within the groups of each axis, too."""
    return all(growth.after * growth.groups[0] % (growth.before * growth.groups[1]) == 0 for growth in growths)
