"""How a growth fills new entries, rescales tensors and treats optimizer state; the names used in the JSON block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ds_sparkling.errors import ConfigError


class Init(str, Enum):
    """What the entries of new units hold (method, Sec. 3.2)."""

    COPY = "copy"
    RANDOM = "random"
    ZERO = "zero"


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
    source's state. ``drop`` restarts every state, step counters included.
    """

    ASYMMETRIC_RESET = "asymmetric_reset"
    ASYMMETRIC_RESET_SCALED = "asymmetric_reset_scaled"
    COPY = "copy"
    DROP = "drop"

    @property
    def resets_new(self) -> bool:
        """Whether new elements start with empty state while old ones keep theirs."""
        return self in (OptimizerState.ASYMMETRIC_RESET, OptimizerState.ASYMMETRIC_RESET_SCALED)

    @property
    def meaning(self) -> str:
        """What it does, in a few words for a printed plan."""
        return {
            OptimizerState.ASYMMETRIC_RESET: "kept for old elements, zero for new ones",
            OptimizerState.ASYMMETRIC_RESET_SCALED: "kept and rescaled for old elements, zero for new ones",
            OptimizerState.COPY: "kept for old elements, copied for copies",
            OptimizerState.DROP: "zero for all elements, step counters too",
        }[self]


class Scope(str, Enum):
    """Which elements a re-warm-up lifts: those the stage made (Eq. 27-28), all of them, or none."""

    NEW = "new"
    ALL = "all"
    NONE = "none"


class Curve(str, Enum):
    """How the re-warmed rate goes on after its peak.

    ``cosine`` is the paper's (Eq. 27-28): down to the base schedule's end. ``factor`` stays at ratio times the base
    rate, whatever the base schedule does. ``auto`` takes ``cosine`` where the base schedule is in its cosine phase.
    """

    AUTO = "auto"
    COSINE = "cosine"
    FACTOR = "factor"


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
    """

    ratio: float = 1.3
    steps: int = 250
    scope: Scope = Scope.NEW
    curve: Curve = Curve.AUTO

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ConfigError(f"rewarmup.ratio must be positive, got {self.ratio}")
        if self.steps < 0:
            raise ConfigError(f"rewarmup.steps must not be negative, got {self.steps}")

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "steps": self.steps, "scope": self.scope.value, "curve": self.curve.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rewarmup:
        return cls(float(data["ratio"]), int(data["steps"]), Scope(data["scope"]), Curve(data["curve"]))

    @property
    def meaning(self) -> str:
        """What it does, in a few words for a printed plan."""
        if self.scope is Scope.NONE:
            return "none: new elements follow the base rate"
        return f"to {self.ratio:g}x the base rate in {self.steps} steps, for {self.scope.value} elements"


#: The init strategies, as (fan-out side, fan-in side).
INIT_PAIRS = (
    (Init.COPY, Init.COPY),
    (Init.RANDOM, Init.RANDOM),
    (Init.RANDOM, Init.ZERO),
    (Init.RANDOM, Init.COPY),
    (Init.ZERO, Init.COPY),
)


@dataclass(frozen=True)
class Strategy:
    """Everything but the widths that decides a growth's outcome."""

    fan_out: Init = Init.COPY
    fan_in: Init = Init.COPY
    norm: Init = Init.COPY
    scaling: Scaling = Scaling.RMS
    optimizer_state: OptimizerState = OptimizerState.ASYMMETRIC_RESET
    rewarmup: Rewarmup = Rewarmup()
    bias_correction: BiasCorrection = BiasCorrection.RESTART
    seed: int = 0
    vocabulary: NewIndex = NewIndex.MEAN

    def __post_init__(self) -> None:
        if (self.fan_out, self.fan_in) not in INIT_PAIRS:
            known = ", ".join(f"{fan_out.value}-{fan_in.value}" for fan_out, fan_in in INIT_PAIRS)
            raise ConfigError(f"init {self.pair} isn't a strategy; the (fan-out)-(fan-in) pairs are {known}")
        if self.norm is Init.ZERO:
            raise ConfigError("init.norm must be 'copy' or 'random': a zero gain would silence the new units")
        if self.scaling is Scaling.FUNCTION and (self.fan_out, self.fan_in) in (
            (Init.RANDOM, Init.RANDOM),
            (Init.RANDOM, Init.COPY),
        ):
            raise ConfigError(
                f"scaling 'function' can't hold with init {self.pair}: random units change the function; "
                "use copy-copy, zero-copy or random-zero, or scaling 'rms'"
            )
        if self.scaling is Scaling.FUNCTION and self.norm is not Init.COPY:
            raise ConfigError("scaling 'function' can't hold with init.norm 'random'; use 'copy'")

    @property
    def pair(self) -> str:
        """The init strategy's name, (fan-out side)-(fan-in side)."""
        return f"{self.fan_out.value}-{self.fan_in.value}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "init": {
                "fan_out": self.fan_out.value,
                "fan_in": self.fan_in.value,
                "norm": self.norm.value,
                "vocabulary": self.vocabulary.value,
            },
            "scaling": self.scaling.value,
            "optimizer_state": self.optimizer_state.value,
            "rewarmup": self.rewarmup.to_dict(),
            "bias_correction": self.bias_correction.value,
            "seed": self.seed,
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
        )
