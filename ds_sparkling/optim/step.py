"""The optimizer step of a run that has grown: every birth stage's elements with their own learning rate and age.

An optimizer whose update of an element doesn't look at other elements gives the same result when a tensor is stepped
piece by piece. So the pieces of each birth stage become parameters of their own for the length of a step, with views
or copies of their state, and the optimizer's own code steps them. Adam on the CPU has a kernel that does it in one pass
(:mod:`ds_sparkling.optim.adam`). A tensor whose stages are all treated alike is stepped as it always was.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.optim.adam import AdamKernel
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.segments import Segment
from ds_sparkling.optim.treatment import Treatment, treatments
from ds_sparkling.schedule import rates_by_birth

#: Elements of a segment with a map that are copied out at a time.
_CHUNK = 1 << 20

#: Elements of a tensor: a stretch, or the indices of scattered ones.
_Where = slice | Tensor


class BirthStep:
    """Takes the place of ``optimizer.step``.

    Args:
        optimizer: the base optimizer, whose tensors may be flat partitions.
        scheduler: tells rates and ages.
        groups: the index of the parameter group of every tensor that it steps.
        segments: makes the segments of every tensor, end to end. Called when they are first needed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: RewarmupScheduler,
        groups: Mapping[Tensor, int],
        segments: Callable[[], Mapping[Tensor, Sequence[Segment]]],
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._groups = dict(groups)
        self._make_segments = segments
        self._segments: Mapping[Tensor, Sequence[Segment]] | None = None
        self._own_step = optimizer.step
        self._kernel: AdamKernel | None = None
        replacement = types.MethodType(lambda _, *args, **kwargs: self.step(*args, **kwargs), optimizer)
        optimizer.step = replacement  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **arguments: Any) -> Any:
        """One step of the groups that ``optimizer.param_groups`` now holds."""
        if not self._scheduler.births:
            return self._own_step(**arguments) if closure is None else self._own_step(closure, **arguments)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        apart: list[tuple[dict[str, Any], Tensor, tuple[Treatment, ...]]] = []
        as_ever: list[dict[str, Any]] = []
        for group in self._optimizer.param_groups:
            params = []
            for param in group["params"]:
                stages = self._treatments(group, param)
                if set(stages) == {Treatment(group["lr"], None)}:
                    params.append(param)
                else:
                    apart.append((group, param, stages))
            as_ever.append({**group, "params": params})
        if not apart:
            self.forget_segments()  # every curve has met the base curve again
            self._own_step(**arguments)
            return loss
        self._step_groups([group for group in as_ever if group["params"]], arguments)
        for group, param, stages in apart:
            self._step_apart(group, param, stages, arguments)
        return loss

    @property
    def segments(self) -> Mapping[Tensor, Sequence[Segment]]:
        """The segments of every tensor."""
        if self._segments is None:
            self._segments = self._make_segments()
        return self._segments

    def forget_segments(self) -> None:
        """Let the segments go; they are made again when they are needed."""
        self._segments = None

    def _treatments(self, group: dict[str, Any], param: Tensor) -> tuple[Treatment, ...]:
        """What the elements of every birth stage get; a single entry if the tensor has no part in it."""
        index = self._groups.get(param)
        if index is None or param.grad is None:
            return (Treatment(group["lr"], None),)
        births = self._scheduler.births
        rates = rates_by_birth(births, index, float(group["lr"]))
        return treatments(births, rates, group, self._optimizer.state.get(param, {}))

    def _step_apart(
        self, group: dict[str, Any], param: Tensor, stages: tuple[Treatment, ...], arguments: dict[str, Any]
    ) -> None:
        """Step a tensor whose birth stages are treated differently, or otherwise than its group."""
        if len(set(stages)) == 1:
            segments: Sequence[Segment] = (Segment(0, param.numel(), 0),)
        else:
            segments = self.segments[param]
        if self._kernel is None:
            self._kernel = AdamKernel(self._optimizer)
        if self._kernel.takes(group, param):
            self._kernel.step(group, param, segments, stages)
            return
        state = self._optimizer.state[param]
        numbers = {key: value for key, value in state.items() if not _per_element(value, param)}
        for parts in _parts(segments, stages):
            after = self._step_parts(group, param, parts, arguments)
        state.update(after)
        if "step" in numbers:
            state["step"] = numbers["step"] + 1

    def _step_parts(
        self,
        group: dict[str, Any],
        param: Tensor,
        parts: list[tuple[_Where, Treatment]],
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """Step some elements as parameters of their own; returns the numbers (like ``step``) in their state."""
        flat, grad, state = param.data.view(-1), param.grad, self._optimizer.state[param]
        assert grad is not None
        pieces = []
        for where, treatment in parts:
            piece = flat[where]
            piece.grad = grad.view(-1)[where]
            if state:
                self._optimizer.state[piece] = {
                    key: value.view(-1)[where] if _per_element(value, param) else _number(key, value, treatment)
                    for key, value in state.items()
                }
            pieces.append(piece)
        # A group for each, as an optimizer may keep one step count for all tensors of a group.
        self._step_groups(
            [{**group, "params": [piece], "lr": stage.lr} for piece, (_, stage) in zip(pieces, parts, strict=True)],
            arguments,
        )
        numbers = {}
        for piece, (where, _) in zip(pieces, parts, strict=True):
            if isinstance(where, Tensor):
                flat[where] = piece
            for key, value in self._optimizer.state.pop(piece, {}).items():
                if not _per_element(value, piece):
                    numbers[key] = value
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(param, dtype=value.dtype, requires_grad=False)
                whole = state[key].view(-1)
                if whole[where].data_ptr() != value.data_ptr():
                    whole[where] = value
        return numbers

    def _step_groups(self, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        """The optimizer's own step, on these groups instead of its own."""
        own = self._optimizer.param_groups
        self._optimizer.param_groups = groups
        try:
            if groups:
                self._own_step(**arguments)
        finally:
            self._optimizer.param_groups = own


def _parts(segments: Sequence[Segment], stages: Sequence[Treatment]) -> Iterator[list[tuple[_Where, Treatment]]]:
    """The elements by treatment: all stretches of one birth stage first, then the mapped segments chunk by chunk."""
    stretches: list[tuple[_Where, Treatment]] = [
        (slice(segment.start, segment.stop), stages[segment.births])
        for segment in segments
        if isinstance(segment.births, int)
    ]
    if stretches:
        yield stretches
    for segment in segments:
        if isinstance(segment.births, int):
            continue
        for start in range(segment.start, segment.stop, _CHUNK):
            births = segment.births[start - segment.start :][:_CHUNK]
            kinds: dict[Treatment, Tensor] = {}
            for stage, treatment in enumerate(stages):
                chosen = births == stage
                kinds[treatment] = kinds[treatment] | chosen if treatment in kinds else chosen
            found = [(chosen.nonzero().flatten() + start, treatment) for treatment, chosen in kinds.items()]
            yield [(where, treatment) for where, treatment in found if len(where)]


def _per_element(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape


def _number(key: str, value: Any, treatment: Treatment) -> Any:
    """A copy of a number in a tensor's state; the step count is the age of the elements, if that is younger."""
    if key == "step" and treatment.age is not None:
        return value.clamp(max=treatment.age) if isinstance(value, Tensor) else min(value, treatment.age)
    return value.clone() if isinstance(value, Tensor) else value
