"""How a growth fills new entries, rescales tensors and treats optimizer state; the names used in the JSON block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.spec.state_kinds import StateKind, gradient_degree, state_kind


class Init(str, Enum):
    """What the entries of new units hold (method, Sec. 3.2).

    ``cancel`` is for the fan-in side of random units: they come in pairs that are drawn alike and consumed with
    opposite signs, so that they add nothing to the function at first (Yuan et al. 2023, arXiv:2306.12700).
    """

    COPY = "copy"
    RANDOM = "random"
    ZERO = "zero"
    CANCEL = "cancel"


class NewIndex(str, Enum):
    """What the entries of new tokens (or anything else that is told apart by an index) hold.

    ``mean`` is the mean over the old ones, so that a new token's logit is the mean of theirs. ``random`` is drawn with
    the old ones' RMS.
    """

    MEAN = "mean"
    RANDOM = "random"


class Scaling(str, Enum):
    """How grown tensors are rescaled.

    ``rms`` keeps the activation RMS (Eq. 14 and 16). ``function`` keeps the function itself, at every ratio.
    ``none`` rescales nothing.
    """

    RMS = "rms"
    FUNCTION = "function"
    NONE = "none"


class OptimizerState(str, Enum):
    """What becomes of the optimizer's per-element state (method, Sec. 4.2.1).

    ``asymmetric_reset`` keeps old elements' state and zeroes the new ones' (S' = [S, 0]). ``asymmetric_reset_scaled``
    also rescales the kept state to the gradients the old elements get in the wide model. ``copy`` gives copies their
    source's state; ``copy_scaled`` also rescales all of it to the gradients in the wide model (staged training, Shen et
    al. 2022, arXiv:2203.06211). ``drop`` restarts every state, step counters included.
    """

    ASYMMETRIC_RESET = "asymmetric_reset"
    ASYMMETRIC_RESET_SCALED = "asymmetric_reset_scaled"
    COPY = "copy"
    COPY_SCALED = "copy_scaled"
    DROP = "drop"

    @property
    def resets_new(self) -> bool:
        """Whether new elements start with empty state while old ones keep theirs."""
        return self in (OptimizerState.ASYMMETRIC_RESET, OptimizerState.ASYMMETRIC_RESET_SCALED)

    @property
    def copies(self) -> bool:
        """Whether copies get their source's state."""
        return self in (OptimizerState.COPY, OptimizerState.COPY_SCALED)

    @property
    def rescales(self) -> bool:
        """Whether state is rescaled to the gradients in the wide model."""
        return self in (OptimizerState.ASYMMETRIC_RESET_SCALED, OptimizerState.COPY_SCALED)

    @property
    def meaning(self) -> str:
        """What it does, in a few words for a printed plan."""
        return {
            OptimizerState.ASYMMETRIC_RESET: "kept for old elements, zero for new ones",
            OptimizerState.ASYMMETRIC_RESET_SCALED: "kept and rescaled for old elements, zero for new ones",
            OptimizerState.COPY: "kept for old elements, copied for copies",
            OptimizerState.COPY_SCALED: "kept for old elements, copied for copies, all rescaled",
            OptimizerState.DROP: "zero for all elements, step counters too",
        }[self]


class Scope(str, Enum):
    """Which elements a re-warm-up lifts: those the growth made (Eq. 27-28), all of them, or none."""

    NEW = "new"
    ALL = "all"
    NONE = "none"


class RewarmupCurve(str, Enum):
    """How the re-warmed rate goes on after its peak.

    ``cosine`` is the paper's (Eq. 27-28): down to the base schedule's end. ``factor`` stays at ratio times the base
    rate, or comes back to it, whatever the base schedule does. ``auto`` takes ``cosine`` where the base schedule is in
    its cosine phase. ``weight_norm`` is no re-warm-up: new elements follow the base rate times the norm of what the
    growth made of their parameter over that of its original elements, step by step (Yuan et al. 2023,
    arXiv:2306.12700).
    """

    AUTO = "auto"
    COSINE = "cosine"
    FACTOR = "factor"
    WEIGHT_NORM = "weight_norm"


class BiasCorrection(str, Enum):
    """The step count that Adam's bias correction takes for new elements.

    ``restart`` counts from their birth, as for a parameter of their own. ``inherit`` goes on with the tensor's count.
    """

    RESTART = "restart"
    INHERIT = "inherit"


@dataclass(frozen=True)
class Rewarmup:
    """The learning-rate re-warm-up after a growth (method, Sec. 4.2.2).

    Attributes:
        ratio: peak rate over the base rate at the growth (rho).
        steps: optimizer steps from the base rate up to the peak (tau_w).
        scope: which elements follow it.
        curve: what comes after the peak.
        faster_decay: share of the steps left that the cosine is shortened by; the rate stays at its end from there on
            (0.25 to 0.5 in LEMON, Wang et al. 2023, arXiv:2310.07999).
        from_step: go on as the base schedule did from this step on: that at which a wide model has the loss of the
            narrow one (staged training, Shen et al. 2022, arXiv:2203.06211); None for where the schedule stands.
        decay_steps: with curve ``factor``, optimizer steps from the peak back to the base rate; None for no way back.
    """

    ratio: float = 1.3
    steps: int = 250
    scope: Scope = Scope.NEW
    curve: RewarmupCurve = RewarmupCurve.AUTO
    faster_decay: float = 0.0
    from_step: int | None = None
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ConfigError(f"rewarmup.ratio must be positive, got {self.ratio}")
        if self.steps < 0:
            raise ConfigError(f"rewarmup.steps must not be negative, got {self.steps}")
        if not 0 <= self.faster_decay < 1:
            raise ConfigError(f"rewarmup.faster_decay must be at least 0 and less than 1, got {self.faster_decay}")
        if self.scope is Scope.NONE and (self.faster_decay or self.from_step is not None):
            raise ConfigError(
                "rewarmup.scope 'none' leaves every rate as it is; faster_decay and from_step need scope 'new' or 'all'"
            )
        if self.from_step is not None:
            if self.from_step < 0:
                raise ConfigError(f"rewarmup.from_step must not be negative, got {self.from_step}")
            if (self.ratio, self.steps, self.faster_decay) != (1.0, 0, 0.0):
                raise ConfigError(
                    "rewarmup.from_step follows the base schedule, so it needs ratio 1, steps 0 and no faster_decay"
                )
        if self.curve is RewarmupCurve.FACTOR and self.needs_cosine:
            raise ConfigError(
                "rewarmup.curve 'factor' leaves the base schedule as it is; faster_decay and from_step don't"
            )
        if self.decay_steps is not None:
            if self.decay_steps < 1:
                raise ConfigError(f"rewarmup.decay_steps must be positive, got {self.decay_steps}")
            if self.curve is not RewarmupCurve.FACTOR or self.scope is Scope.NONE:
                raise ConfigError(
                    "rewarmup.decay_steps leads back to the base rate; it needs curve 'factor' and scope 'new' or 'all'"
                )
        if self.curve is RewarmupCurve.WEIGHT_NORM and (
            self.scope is not Scope.NEW or (self.ratio, self.steps, self.needs_cosine) != (1.0, 0, False)
        ):
            raise ConfigError(
                "rewarmup.curve 'weight_norm' sets the rate of new elements by itself, so it needs scope 'new', ratio "
                "1, steps 0 and neither faster_decay nor from_step"
            )

    @property
    def needs_cosine(self) -> bool:
        """Whether it makes sense only where the base schedule is a cosine."""
        return self.curve is RewarmupCurve.COSINE or self.faster_decay > 0 or self.from_step is not None

    def to_dict(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "steps": self.steps,
            "scope": self.scope.value,
            "curve": self.curve.value,
            "faster_decay": self.faster_decay,
            "from_step": self.from_step,
            "decay_steps": self.decay_steps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rewarmup:
        """What :meth:`to_dict` gave; without the last three keys, as earlier versions wrote it, too."""
        return cls(
            float(data["ratio"]),
            int(data["steps"]),
            Scope(data["scope"]),
            RewarmupCurve(data["curve"]),
            float(data.get("faster_decay", 0.0)),
            data.get("from_step"),
            data.get("decay_steps"),
        )

    @property
    def meaning(self) -> str:
        """What it does, in a few words for a printed plan."""
        if self.scope is Scope.NONE:
            return "none: new elements follow the base rate"
        elements = f"for {self.scope.value} elements"
        if self.curve is RewarmupCurve.WEIGHT_NORM:
            return "none: the base rate times ||W_new|| / ||W_old|| of each parameter, for new elements"
        if self.from_step is not None:
            return f"none: the base schedule from step {self.from_step} on, {elements}"
        text = f"to {self.ratio:g}x the base rate in {self.steps} steps"
        if self.faster_decay:
            text += f", then down to the end in {self.faster_decay:.0%} fewer steps"
        if self.decay_steps is not None:
            text += f" and back in {self.decay_steps}"
        return f"{text}, {elements}"


#: The init strategies, as (fan-out side, fan-in side): the paper's five, and one of Yuan et al. 2023.
INIT_PAIRS = (
    (Init.COPY, Init.COPY),
    (Init.RANDOM, Init.RANDOM),
    (Init.RANDOM, Init.ZERO),
    (Init.RANDOM, Init.COPY),
    (Init.ZERO, Init.COPY),
    (Init.RANDOM, Init.CANCEL),
)


@dataclass(frozen=True)
class Split:
    """How units that are copies of one another share the weights of the columns that consume them (LEMON, Wang et al.
    2023, arXiv:2310.07999).

    Attributes:
        shares: parts of the old unit and of each of its copies; None for random ones, uniform on the simplex, which are
            the same for all tensors.
    """

    shares: tuple[float, float] | None = (1.0, 1.0)

    @property
    def even(self) -> bool:
        return self.shares is not None and self.shares[0] == self.shares[1]

    @classmethod
    def parse(cls, text: str) -> Split:
        """From ``"random"`` or ``"OLD:COPY"``, like ``"1:2"``.

        Raises:
            ConfigError: if it is neither.
        """
        if text == "random":
            return cls(None)
        try:
            old, copy = (float(part) for part in text.split(":"))
        except (AttributeError, ValueError):
            raise ConfigError(f"init.split must be 'random' or like '1:2' (old unit to copy), got {text!r}") from None
        if not (0 <= old < math.inf and 0 <= copy < math.inf and old + copy > 0):
            raise ConfigError(f"init.split must be of parts that aren't negative and not both zero, got {text!r}")
        return cls((old, copy))

    def __str__(self) -> str:
        return "random" if self.shares is None else f"{self.shares[0]:g}:{self.shares[1]:g}"


@dataclass(frozen=True)
class Strategy:
    """Everything but the widths that decides a growth's outcome.

    Attributes:
        fan_out, fan_in: init of the rows that produce new units and of the columns that consume them.
        norm: init of new units' norm gains.
        scaling: how grown tensors are rescaled.
        optimizer_state: what becomes of the optimizer's state.
        rewarmup: the learning rate after the growth.
        bias_correction: which steps Adam's bias correction counts for new elements.
        seed: of everything random.
        vocabulary: init of new tokens.
        split: how twins share the columns that consume them, for copy-copy.
        perturbation: RMS of the noise on the columns that consume twins, relative to the tensor's; it sums to zero over
            the twins of a unit, so their consumers see no change. For copy-copy.
        state_kinds: what states of the optimizer are whose names don't tell, by name.
    """

    fan_out: Init = Init.COPY
    fan_in: Init = Init.COPY
    norm: Init = Init.COPY
    scaling: Scaling = Scaling.RMS
    optimizer_state: OptimizerState = OptimizerState.ASYMMETRIC_RESET
    rewarmup: Rewarmup = Rewarmup()
    bias_correction: BiasCorrection = BiasCorrection.RESTART
    seed: int = 0
    vocabulary: NewIndex = NewIndex.MEAN
    split: Split = Split()
    perturbation: float = 0.0
    state_kinds: Mapping[str, StateKind] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (self.fan_out, self.fan_in) not in INIT_PAIRS:
            known = ", ".join(f"{fan_out.value}-{fan_in.value}" for fan_out, fan_in in INIT_PAIRS)
            raise ConfigError(f"init {self.pair} isn't a strategy; the (fan-out)-(fan-in) pairs are {known}")
        if self.norm not in (Init.COPY, Init.RANDOM):
            raise ConfigError("init.norm must be 'copy' or 'random': a zero gain would silence the new units")
        if not (math.isfinite(self.perturbation) and self.perturbation >= 0):
            raise ConfigError(f"init.perturbation must not be negative, got {self.perturbation}")
        if not self.all_copied and not (self.split.even and self.perturbation == 0):
            raise ConfigError(
                "init.split and init.perturbation are for units that are copied on all sides; use copy-copy with norm "
                f"'copy', not {self.pair} with norm {self.norm.value!r}"
            )
        if self.scaling is Scaling.FUNCTION and (self.fan_out, self.fan_in) in (
            (Init.RANDOM, Init.RANDOM),
            (Init.RANDOM, Init.COPY),
        ):
            raise ConfigError(
                f"scaling 'function' can't hold with init {self.pair}: random units change the function; "
                "use copy-copy, zero-copy, random-zero or random-cancel, or scaling 'rms'"
            )
        if self.scaling is Scaling.FUNCTION and self.norm is not Init.COPY:
            raise ConfigError("scaling 'function' can't hold with init.norm 'random'; use 'copy'")

    @property
    def pair(self) -> str:
        """The init strategy's name, (fan-out side)-(fan-in side)."""
        return f"{self.fan_out.value}-{self.fan_in.value}"

    @property
    def all_copied(self) -> bool:
        """Whether new units are copies in every respect, before what is done to their consumers."""
        return {self.fan_out, self.fan_in, self.norm} == {Init.COPY}

    @property
    def cancels(self) -> bool:
        """Whether new units come in pairs whose contributions cancel."""
        return self.fan_in is Init.CANCEL

    def state_kind(self, key: str) -> StateKind:
        """What the optimizer's per-element state ``key`` is.

        Raises:
            PlanError: if that isn't known, or the state would have to be rescaled and isn't known how.
        """
        kind = state_kind(key, self.state_kinds)
        if kind is StateKind.MOMENT and self.optimizer_state.rescales and gradient_degree(key) is None:
            plain = OptimizerState.COPY if self.optimizer_state.copies else OptimizerState.ASYMMETRIC_RESET
            raise PlanError(
                f"optimizer state {key!r} has no known degree in the gradient, so {self.optimizer_state.value!r} can't "
                f"rescale it (as it can exp_avg); use {plain.value!r}"
            )
        return kind

    @property
    def units_meaning(self) -> str:
        """What new units are, in a few words for a printed plan."""
        text = self.pair
        if not self.split.even:
            text += f", twins' consumers split {self.split}"
        if self.perturbation:
            text += f", perturbed by +-{self.perturbation:g} RMS"
        return f"{text}; norm gains {self.norm.value}; tokens {self.vocabulary.value}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "init": {
                "fan_out": self.fan_out.value,
                "fan_in": self.fan_in.value,
                "norm": self.norm.value,
                "vocabulary": self.vocabulary.value,
                "split": str(self.split),
                "perturbation": self.perturbation,
            },
            "scaling": self.scaling.value,
            "optimizer_state": self.optimizer_state.value,
            "rewarmup": self.rewarmup.to_dict(),
            "bias_correction": self.bias_correction.value,
            "seed": self.seed,
            "state_kinds": {key: kind.value for key, kind in self.state_kinds.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Strategy:
        init = data["init"]
        return cls(
            Init(init["fan_out"]),
            Init(init["fan_in"]),
            Init(init["norm"]),
            Scaling(data["scaling"]),
            OptimizerState(data["optimizer_state"]),
            Rewarmup.from_dict(data["rewarmup"]),
            BiasCorrection(data["bias_correction"]),
            int(data["seed"]),
            NewIndex(init["vocabulary"]),
            Split.parse(init.get("split", "1:1")),
            float(init.get("perturbation", 0.0)),
            {key: StateKind(kind) for key, kind in data.get("state_kinds", {}).items()},
        )
