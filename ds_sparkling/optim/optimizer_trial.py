"""Try an optimizer out on made-up tensors: which state it keeps of a tensor, and that the state can be grown.

An optimizer may keep state of other shapes of larger tensors, or make state at its first step only. So a small and a
large tensor are stepped for real, and the optimizer is put back as it was.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.errors import UnsupportedError
from ds_sparkling.spec.state_kinds import StateKind
from ds_sparkling.spec.strategy import OptimizerState, Strategy

#: Sizes of the tensors that are stepped, by whether they are matrices: a small one, and one that every optimizer takes
#: for large (bitsandbytes and torchao quantise from 4096 elements on).
SMALL = {False: (24,), True: (4, 6)}
_LARGE = {False: (1 << 20,), True: (128, 8192)}
#: Steps that are taken with a small one.
STEPS = 3
_WAY_OUT = (
    "use an optimizer like torch.optim.AdamW, whose state is ordinary tensors of the parameter's shape and counters"
)
#: Where torch's optimizers hold the hooks that users have put on their steps.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
#: Optimizers that step others within them only on tensors that are their own.
_SHARING = ("MuonWithAuxAdam",)


@dataclass(frozen=True)
class SteppedTensors:
    """How tensors came out of some steps.

    Attributes:
        tensors: as they are after the last step.
        states: the optimizer's state of each.
        counted: settings of their groups that changed with the steps.
    """

    tensors: list[Tensor]
    states: list[dict[str, Any]]
    counted: frozenset[str]


def step_apart(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    starts: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    **settings: Any,
) -> SteppedTensors:
    """Step some tensors, each in a group of its own; the optimizer's state, groups and attributes stay as they are.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        starts: what the tensors are before.
        gradients: of every step, those of all tensors.
        **settings: what is set otherwise than in the group.

    Raises:
        UnsupportedError: if the optimizer fails, or has another one within it that would step its real parameters.
    """
    name = type(optimizer).__name__
    if _within(optimizer) and name not in _SHARING:
        raise UnsupportedError(
            f"{name} wraps a {type(_within(optimizer)[0]).__name__}, whose state is out of sight; use that one itself"
        )
    tensors = [start.clone() for start in starts]
    groups = [{**{key: _own(value) for key, value in group.items()}, "params": [tensor]} for tensor in tensors]
    for one in groups:
        one.update(settings, lr=_like(group["lr"], 0.01))
    seen = []
    with _set_aside(optimizer, groups) as state, torch.no_grad():
        try:
            if callable(train := getattr(optimizer, "train", None)):
                train()  # schedule-free optimizers refuse to step otherwise
            seen.append([_settings(one) for one in groups])
            for step in gradients:
                for tensor, gradient in zip(tensors, step, strict=True):
                    tensor.grad = gradient.clone()
                # That of the class, without what schedulers and engines have put around it.
                type(optimizer).step(optimizer)
                seen.append([_settings(one) for one in groups])
        except Exception as error:
            raise UnsupportedError(
                f"{name} can't be tried on a tensor of its own ({type(error).__name__}: {error}), so it isn't known "
                f"whether it can be grown; {_WAY_OUT}"
            ) from error
    counted = {
        key
        for before, first, last in zip(seen[0], seen[1], seen[-1], strict=True)
        for key in last
        # A setting that the first step makes and no other changes counts nothing.
        if _differ(last[key], before.get(key, last[key])) or _differ(last[key], first.get(key))
    }
    return SteppedTensors(tensors, [state.get(tensor, {}) for tensor in tensors], frozenset(counted))


def counts_in_one(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor) -> bool:
    """Whether the optimizer counts the steps of all of a group's tensors in the state of one of them.

    Args:
        optimizer: one that keeps ``step`` in its state.
        group: one of its parameter groups.
        like: one of its tensors; two that are tried have its device and dtype.
    """
    values = [value.clone() for value in random_like(SMALL[False], like, 4)]
    tensors, gradients = values[:2], values[2:]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    together = {**{key: _own(value) for key, value in group.items()}, "params": tensors}
    with _set_aside(optimizer, [together]) as state, torch.no_grad():
        type(optimizer).step(optimizer)
        return bool(state[tensors[0]]["step"] != state[tensors[1]]["step"])


@dataclass(frozen=True)
class Kept:
    """The names of what an optimizer keeps of a tensor.

    Attributes:
        per_element: state with an entry per element.
        weights: those of it that differ as the weights do, of two tensors that get the same gradients.
        numbers: the rest of the state, step counters.
    """

    per_element: frozenset[str]
    weights: frozenset[str]
    numbers: frozenset[str]

    def check(self, name: str, strategy: Strategy) -> None:
        """Refuse state that a growth can't tell what to do with.

        Args:
            name: what the optimizer is called.
            strategy: of the growth.

        Raises:
            PlanError: if the kind of a state isn't known, or it would have to be rescaled and isn't known how.
            UnsupportedError: if a state isn't what its name says, or would have to be dropped and isn't known how.
        """
        for key in sorted(self.per_element):
            found = StateKind.WEIGHTS if key in self.weights else StateKind.MOMENT
            named = strategy.state_kind(key)
            if found is not named and key not in strategy.state_kinds:
                raise UnsupportedError(
                    f"{name}'s state {key!r} is known as {named.value} of other optimizers, but looks like "
                    f'{found.value} when it is tried; say what it is in the "sparkling" block: '
                    f'"state_kinds": {{"{key}": "{found.value}"}}, or "{named.value}"'
                )
        others = self.numbers - {"step"}
        if others and strategy.optimizer_state is OptimizerState.DROP:
            raise UnsupportedError(
                f"{name} keeps {sorted(others)} per tensor, which don't start at zero as a step count does; set "
                'optimizer_state to "asymmetric_reset"'
            )


def what_is_kept(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor) -> Kept:
    """Let the optimizer make its state of a small and a large tensor.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        like: one of its tensors; those that are tried have its device, dtype and number of dimensions (two at most).

    Raises:
        UnsupportedError: if the optimizer can't be tried, or keeps something that can't grow.
    """
    numbers: set[str] = set()
    per_element: set[str] = set()
    for shapes, steps in ((SMALL, STEPS), (_LARGE, 1)):
        start, *gradients = random_like(shapes[like.dim() > 1], like, steps + 1)
        (state,) = step_apart(optimizer, group, [start], [[gradient] for gradient in gradients]).states
        made = {key for key, value in state.items() if is_per_element(optimizer, key, value, start)}
        per_element |= made
        numbers |= {key for key, value in state.items() if value is not None} - made
    weights = _weights_among(per_element, optimizer, group, like)
    return Kept(frozenset(per_element), frozenset(weights), frozenset(numbers - per_element))


def _weights_among(
    keys: set[str], optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor
) -> set[str]:
    """The states that differ by 1 if the weights do."""
    start, *gradients = random_like(SMALL[like.dim() > 1], like, STEPS + 1)
    undecayed = {"weight_decay": 0.0} if "weight_decay" in group else {}
    both = step_apart(optimizer, group, [start, start + 1], [[gradient] * 2 for gradient in gradients], **undecayed)
    first, second = both.states
    return {key for key in keys & first.keys() if 0.5 < float((second[key] - first[key]).median()) < 1.5}


def is_per_element(optimizer: torch.optim.Optimizer, key: str, value: Any, like: Tensor) -> bool:
    """Whether a state of the tensor ``like`` has an entry per element; otherwise it is a number, or none at all.

    Raises:
        UnsupportedError: if it is something else.
    """
    if value is None or isinstance(value, (int, float)):  # None: not used, like the momentum of SGD without it
        return False
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter)
        if plain and (value.dim() == 0 or (key == "step" and value.numel() == 1)):
            return False
        if plain and value.shape == like.shape and value.is_floating_point() and value.layout is torch.strided:
            return True
        found = f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    else:
        found = f"a {type(value).__name__}"
    raise UnsupportedError(
        f"{type(optimizer).__name__} keeps state {key!r} of a tensor of shape {tuple(like.shape)} as {found}, which "
        f"can't be grown; {_WAY_OUT}"
    )


@contextmanager
def _set_aside(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Iterator[Mapping[Tensor, Any]]:
    """Give an optimizer ``groups`` and no state, and put everything back afterwards; yields the state that it makes."""
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    own = [(each, dict(vars(each))) for each in (optimizer, *_within(optimizer))]
    for each, attributes in own:
        vars(each).update(
            {key: _own(value) for key, value in attributes.items() if key not in ("state", "param_groups")}
        )
        vars(each).update({hooks: {} for hooks in _HOOKS if hooks in attributes})
    try:
        optimizer.state = state
        optimizer.param_groups = groups
        yield state
    finally:
        for each, attributes in own:
            vars(each).clear()
            vars(each).update(attributes)


def _within(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that an optimizer holds."""
    return [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]


def random_like(shape: tuple[int, ...], like: Tensor, count: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, math.prod(shape), generator=generator).view(count, *shape)
    return values.to(device=like.device, dtype=like.dtype).unbind()


def _own(value: Any) -> Any:
    """A copy of what a step may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # of several tensors or arrays
        return True


def _like(rate: Any, value: float) -> Any:
    return torch.full_like(rate, value) if isinstance(rate, Tensor) else value


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings as they are now, tensors as numbers."""
    settings = {}
    for key, value in group.items():
        if key != "params":
            settings[key] = value.tolist() if isinstance(value, Tensor) else _own(value)
    return settings
