"""A strategy says how a growth fills new entries, rescales tensors and treats optimizer state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from pydantic import (
    AliasPath,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ds_sparkling.errors import PlanError
from ds_sparkling.spec.checked import Checked, Integer, InWords, Number, checked, json_keys, shown
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


class LayerOrder(str, Enum):
    """Where new layers come to stand, and which old layer each of them comes from.

    ``stack`` repeats the whole stack: 1 2 3 1 2 3 (Du et al. 2024, arXiv:2405.15319). ``interpose`` puts copies behind
    their sources: 1 1 2 2 3 3 (arXiv:2510.08008). ``middle`` repeats the middle of the stack (MIDAS, arXiv:2409.19044).
    ``last`` puts copies of the last layer at the end.
    """

    STACK = "stack"
    INTERPOSE = "interpose"
    MIDDLE = "middle"
    LAST = "last"


class LayerContent(str, Enum):
    """What new layers hold.

    ``zero_output`` copies the source, but for what the layer writes to the residual stream, which is zero: the function
    is kept. ``copy`` copies all of it. ``random`` draws matrices with their source's RMS and copies gains and biases.
    """

    ZERO_OUTPUT = "zero_output"
    COPY = "copy"
    RANDOM = "random"


def _order_or_sources(value: Any) -> Any:
    if isinstance(value, (LayerOrder, tuple)) or (isinstance(value, str) and value in [*LayerOrder]):
        return value
    numbers = isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)
    if not numbers or not value:
        orders = ", ".join(repr(order.value) for order in LayerOrder)
        raise ValueError(f"must be {orders} or a list of old layers, from 0 on, got {shown(value)}")
    return tuple(value)


@checked(kw_only=True)
class Layers(Checked):
    """How a growth of the number of layers is done."""

    PATH = "layers"

    sources: Annotated[
        LayerOrder | tuple[int, ...],
        BeforeValidator(_order_or_sources),
        InWords('"stack", "interpose", "middle", "last" or list of integers'),
    ] = Field(
        default=LayerOrder.STACK,
        description="Which old layer every layer comes from, by a rule or as a list with one entry per layer. The "
        "first that comes from an old layer is that layer.",
    )
    content: LayerContent = Field(default=LayerContent.ZERO_OUTPUT, description="What new layers hold.")

    @property
    def meaning(self) -> str:
        """What it does, in a few words for a printed plan."""
        order = self.sources.value if isinstance(self.sources, LayerOrder) else f"from {list(self.sources)}"
        return f"{order}; {self.content.value}"


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


@checked(kw_only=True)
class Rewarmup(Checked):
    """The learning-rate re-warm-up after a growth (method, Sec. 4.2.2)."""

    PATH = "rewarmup"

    ratio: Number = Field(default=1.3, gt=0, description="Peak rate over the base rate at the growth (rho).")
    steps: Integer = Field(default=250, ge=0, description="Optimizer steps from the base rate up to the peak (tau_w).")
    scope: Scope = Field(default=Scope.NEW, description="Which elements follow the re-warmed rate.")
    curve: RewarmupCurve = Field(default=RewarmupCurve.AUTO, description="What comes after the peak.")
    faster_decay: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the steps left that the cosine is shortened by. The rate stays at its end from there on "
        "(0.25 to 0.5 in LEMON, Wang et al. 2023, arXiv:2310.07999).",
    )
    from_step: Integer | None = Field(
        default=None,
        ge=0,
        description="Go on as the base schedule did from this step on: that at which a wide model has the loss of the "
        "narrow one (staged training, Shen et al. 2022, arXiv:2203.06211). null goes on where the schedule stands.",
    )
    decay_steps: Integer | None = Field(
        default=None,
        ge=1,
        description='With curve "factor", optimizer steps from the peak back to the base rate. null never comes back.',
    )

    def __post_init__(self) -> None:
        if self.scope is Scope.NONE and (self.faster_decay or self.from_step is not None):
            raise ValueError(
                "{path}.scope 'none' leaves every rate as it is; faster_decay and from_step need scope 'new' or 'all'"
            )
        if self.from_step is not None and (self.ratio, self.steps, self.faster_decay) != (1.0, 0, 0.0):
            raise ValueError(
                "{path}.from_step follows the base schedule, so it needs ratio 1, steps 0 and no faster_decay"
            )
        if self.curve is RewarmupCurve.FACTOR and self.needs_cosine:
            raise ValueError(
                "{path}.curve 'factor' leaves the base schedule as it is; faster_decay and from_step don't"
            )
        if self.decay_steps is not None and (self.curve is not RewarmupCurve.FACTOR or self.scope is Scope.NONE):
            raise ValueError(
                "{path}.decay_steps leads back to the base rate; it needs curve 'factor' and scope 'new' or 'all'"
            )
        if self.curve is RewarmupCurve.WEIGHT_NORM and (
            self.scope is not Scope.NEW or (self.ratio, self.steps, self.needs_cosine) != (1.0, 0, False)
        ):
            raise ValueError(
                "{path}.curve 'weight_norm' sets the rate of new elements by itself, so it needs scope 'new', ratio "
                "1, steps 0 and neither faster_decay nor from_step"
            )

    @property
    def needs_cosine(self) -> bool:
        """Whether it makes sense only where the base schedule is a cosine."""
        return self.curve is RewarmupCurve.COSINE or self.faster_decay > 0 or self.from_step is not None

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
    def parse(cls, text: Any) -> Split:
        """From ``"random"`` or ``"OLD:COPY"``, like ``"1:2"``; one that is a split already stays it.

        Raises:
            ValueError: if it is none of these.
        """
        if isinstance(text, Split):
            return text
        if text == "random":
            return cls(None)
        try:
            old, copy = (float(part) for part in text.split(":"))
        except (AttributeError, ValueError):
            raise ValueError(f"must be 'random' or like '1:2' (old unit to copy), got {shown(text)}") from None
        if not (0 <= old < math.inf and 0 <= copy < math.inf and old + copy > 0):
            raise ValueError(f"must be of parts that aren't negative and not both zero, got {shown(text)}")
        return cls((old, copy))

    def __str__(self) -> str:
        return "random" if self.shares is None else f"{self.shares[0]:g}:{self.shares[1]:g}"


def _in_init(name: str) -> AliasPath:
    """Where the JSON has what is said of initial values."""
    return AliasPath("init", name)


@checked(kw_only=True)
class Strategy(Checked):
    """Everything but the widths that decides a growth's outcome."""

    fan_out: Init = Field(
        default=Init.COPY,
        validation_alias=_in_init("fan_out"),
        description="Initial values of the rows that produce new units.",
    )
    fan_in: Init = Field(
        default=Init.COPY,
        validation_alias=_in_init("fan_in"),
        description="Initial values of the columns that consume new units.",
    )
    norm: Init = Field(
        default=Init.COPY,
        validation_alias=_in_init("norm"),
        description='Initial values of new units\' norm gains: "copy" or "random".',
    )
    vocabulary: NewIndex = Field(
        default=NewIndex.MEAN, validation_alias=_in_init("vocabulary"), description="Initial values of new tokens."
    )
    split: Annotated[Split, BeforeValidator(Split.parse), PlainSerializer(str), InWords('"random" or "OLD:COPY"')] = (
        Field(
            default=Split(),
            validation_alias=_in_init("split"),
            description="How twins share the columns that consume them, as the old unit's part to each copy's. For "
            "copy-copy.",
        )
    )
    perturbation: Number = Field(
        default=0.0,
        ge=0,
        validation_alias=_in_init("perturbation"),
        description="RMS of the noise on the columns that consume twins, relative to the tensor's. It sums to zero "
        "over the twins of a unit, so their consumers see no change. For copy-copy.",
    )
    scaling: Scaling = Field(default=Scaling.RMS, description="How grown tensors are rescaled.")
    optimizer_state: OptimizerState = Field(
        default=OptimizerState.ASYMMETRIC_RESET, description="What becomes of the optimizer's state."
    )
    rewarmup: Rewarmup = Field(default=Rewarmup(), description="The learning rate after the growth.")
    bias_correction: BiasCorrection = Field(
        default=BiasCorrection.RESTART,
        description="Which steps Adam's bias correction counts for new elements: those since their birth, or the "
        "tensor's.",
    )
    layers: Layers = Field(default=Layers(), description="New layers, where their number grows.")
    seed: Integer = Field(default=0, description="Seed of everything random in a growth.")
    state_kinds: Annotated[
        dict[str, StateKind],
        Field(description="What states of the optimizer are whose names don't tell, by name."),
    ] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (self.fan_out, self.fan_in) not in INIT_PAIRS:
            known = ", ".join(f"{fan_out.value}-{fan_in.value}" for fan_out, fan_in in INIT_PAIRS)
            raise ValueError(f"{{path}}.init {self.pair} isn't a strategy; the (fan-out)-(fan-in) pairs are {known}")
        if self.norm not in (Init.COPY, Init.RANDOM):
            raise ValueError("{path}.init.norm must be 'copy' or 'random': a zero gain would silence the new units")
        if not self.all_copied and not (self.split.even and self.perturbation == 0):
            raise ValueError(
                "{path}.init.split and init.perturbation are for units that are copied on all sides; use copy-copy "
                f"with norm 'copy', not {self.pair} with norm {self.norm.value!r}"
            )
        if self.scaling is Scaling.FUNCTION and (self.fan_out, self.fan_in) in (
            (Init.RANDOM, Init.RANDOM),
            (Init.RANDOM, Init.COPY),
        ):
            raise ValueError(
                f"{{path}}.scaling 'function' can't hold with init {self.pair}: random units change the function; "
                "use copy-copy, zero-copy, random-zero or random-cancel, or scaling 'rms'"
            )
        if self.scaling is Scaling.FUNCTION and self.norm is not Init.COPY:
            raise ValueError("{path}.scaling 'function' can't hold with init.norm 'random'; use 'copy'")

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

    @model_serializer(mode="wrap")
    def _with_init(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = handler(self)
        return {"init": {key: data.pop(key) for key in json_keys(Strategy)["init"] or ()}, **data}
