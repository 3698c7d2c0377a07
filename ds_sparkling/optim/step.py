"""The optimizer step of a run that has grown: every birth's elements with their own learning rate and age.

An optimizer whose update of an element doesn't look at other elements gives the same result when a tensor is stepped
piece by piece. So the pieces of each birth become parameters of their own for the length of a step, with views
or copies of their state, and the optimizer's own code steps them. Adam has kernels that do it in one pass, on GPUs
(:mod:`ds_sparkling.optim.device_adam`) and on the CPU (:mod:`ds_sparkling.optim.adam`). A tensor whose births are all
treated alike is stepped as it always was.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.growth import Block
from ds_sparkling.growth.births import stretch
from ds_sparkling.growth.schedule import curve_of, rates_by_birth
from ds_sparkling.optim.adam import AdamKernel
from ds_sparkling.optim.device_adam import DeviceAdam
from ds_sparkling.optim.element_rates import Apart, Treatment, treatments
from ds_sparkling.optim.optimizer_trial import counts_in_one
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.weight_norm import NormRatios

#: Elements that are copied out at a time, on the CPU.
_CHUNK = 1 << 20
#: The same elsewhere, at most: there a copy costs more to launch than to make.
_CHUNK_ON_DEVICE = 1 << 26
#: Bytes that an element of a chunk takes: copies of it and of its state, and what the optimizer makes of them.
_BYTES_COPIED = 40


class BirthStep:
    """Takes the place of ``optimizer.step``.

    Args:
        optimizer: the base optimizer, whose tensors may be flat partitions.
        scheduler: tells rates and ages.
        groups: the index of the parameter group of every tensor that it steps.
        blocks: tells the births of every tensor's elements, as blocks end to end; called when first needed.
        norms: measures weight norms, for births whose rates follow them.

    Attributes:
        watch: called before a step with the tensors that it is for, whose ``grad`` is what the optimizer gets; a step
            of the engine may be several of these.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: RewarmupScheduler,
        groups: Mapping[Tensor, int],
        blocks: Callable[[], Mapping[Tensor, Sequence[Block]]],
        norms: NormRatios | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._groups = dict(groups)
        self._make_blocks = blocks
        self._norms = norms
        self._blocks: Mapping[Tensor, Sequence[Block]] | None = None
        self._births_in: dict[Tensor, set[int]] = {}
        self._chunks: dict[torch.device, int] = {}
        self._counts_in_one: bool | None = None
        self.watch: Callable[[Sequence[Tensor]], None] | None = None
        self._own_step = optimizer.step
        self._kernels = (DeviceAdam(optimizer), AdamKernel(optimizer))

        @functools.wraps(self._own_step)  # with the marks that torch's schedulers leave and look for
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.step(*args, **kwargs)

        self._replaced = vars(optimizer).get("step")  # where torch's schedulers leave theirs
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]

    def give_back(self) -> None:
        """Let the optimizer step by itself again."""
        del self._optimizer.step
        if self._replaced is not None:
            self._optimizer.step = self._replaced  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **arguments: Any) -> Any:
        """One step of the groups that ``optimizer.param_groups`` now holds."""
        if self.watch is not None:
            self.watch([param for group in self._optimizer.param_groups for param in group["params"]])
        if not self._scheduler.births:
            return self._own_step(**arguments) if closure is None else self._own_step(closure, **arguments)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        births = self._scheduler.births
        norms = self._norms if any(curve_of(birth).follows_norms for birth in births) else None
        if norms is not None:
            stepped = [param for group in self._optimizer.param_groups for param in group["params"]]
            norms.measure(stepped, len(births) + 1)
        apart: list[Apart] = []
        as_ever: list[dict[str, Any]] = []
        for group in self._optimizer.param_groups:
            params = []
            usual = Treatment(float(group["lr"]), None)
            self._share_count(group)
            for param in group["params"]:
                by_birth = self._treatments(group, param)
                if norms is not None and len(by_birth) > 1:
                    adapted = norms.treatments(param, by_birth, births)
                    apart.append(Apart(group, param, norms.blocks(param, len(by_birth)), adapted))
                elif self._occurring(param, by_birth) == {usual}:
                    params.append(param)
                elif len(set(by_birth)) == 1:
                    apart.append(Apart(group, param, [stretch(0, param.numel(), 0)], by_birth))
                else:
                    apart.append(Apart(group, param, self.blocks[param], by_birth))
            as_ever.append({**group, "params": params})
        if not apart:
            self._own_step(**arguments)
            return loss
        self._step_groups([group for group in as_ever if group["params"]], arguments)
        for kernel in self._kernels:
            taken: list[Apart] = []
            left: list[Apart] = []
            for each in apart:
                (taken if kernel.takes(each.group, each.param) else left).append(each)
            kernel.step(taken)
            apart = left
        for each in apart:
            self._step_apart(each, arguments)
        return loss

    @property
    def blocks(self) -> Mapping[Tensor, Sequence[Block]]:
        """The births of every tensor's elements."""
        if self._blocks is None:
            self._blocks = self._make_blocks()
        return self._blocks

    def forget_blocks(self) -> None:
        """The births may have changed; they are told anew when they are next needed."""
        self._blocks = None
        if self._norms is not None:
            self._norms.forget()
        self._births_in.clear()
        self._chunks.clear()
        for kernel in self._kernels:
            kernel.forget_blocks()

    def _occurring(self, param: Tensor, by_birth: tuple[Treatment, ...]) -> set[Treatment]:
        """The treatments that any element of the tensor gets."""
        if len(set(by_birth)) == 1:
            return set(by_birth)
        if param not in self._births_in:
            self._births_in[param] = {run.birth for block in self.blocks[param] for run in block.runs}
        return {by_birth[birth] for birth in self._births_in[param]}

    def _share_count(self, group: dict[str, Any]) -> None:
        """DeepSpeed's FusedAdam may count in one tensor for all of a group; apart, each needs that count."""
        if type(self._optimizer).__name__ != "FusedAdam" or not group["params"]:
            return
        if self._counts_in_one is None:
            self._counts_in_one = counts_in_one(self._optimizer, group, group["params"][0])
        if self._counts_in_one:
            states = [self._optimizer.state.get(param, {}) for param in group["params"]]
            counted = [state for state in states if "step" in state]
            count = max((state["step"] for state in counted), default=0)
            for state in counted:
                state["step"] = count

    def _treatments(self, group: dict[str, Any], param: Tensor) -> tuple[Treatment, ...]:
        """What the elements of every birth get; a single entry if the tensor has no part in it."""
        index = self._groups.get(param)
        if index is None or param.grad is None:
            return (Treatment(float(group["lr"]), None),)
        births = self._scheduler.births
        rates = rates_by_birth(births, index, float(group["lr"]))
        return treatments(births, rates, group, self._optimizer.state.get(param, {}))

    def _step_apart(self, each: Apart, arguments: dict[str, Any]) -> None:
        """Step a tensor by the optimizer's own code, piece by piece."""
        state = self._optimizer.state[each.param]
        before = dict(state)
        numbers: dict[str, Any] = {}
        for parts in _parts(each.blocks, each.by_birth, self._chunk(each.param.device)):
            numbers = self._step_parts(each.group, each.param, parts, before, arguments)
            if "step" in before:
                # By what the pieces' count went up: not at all, if a gradient scaler skips the step.
                numbers["step"] = before["step"] + (numbers["step"] - _number("step", before["step"], [*parts][-1]))
        state.update(numbers)

    def _chunk(self, device: torch.device) -> int:
        """How many elements are copied out at a time; the memory that is free is asked for once after a growth."""
        if device not in self._chunks:
            self._chunks[device] = _CHUNK if device.type == "cpu" else _chunk_in(_free_memory(device))
        return self._chunks[device]

    def _step_parts(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        parts: dict[Treatment, list[_Part]],
        before: dict[str, Any],
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """Step some elements as parameters of their own; returns the numbers (like ``step``) in their state.

        Args:
            group: the tensor's parameter group.
            param: the tensor.
            parts: which elements, by treatment.
            before: its optimizer state before the step; if that is empty, the elements' is made in this one.
            arguments: of the optimizer's own step.
        """
        assert param.grad is not None
        groups, pieces = [], []
        for treatment, members in parts.items():
            params = []
            for part in members:
                piece = part.of(param.data)
                piece.grad = part.of(param.grad)
                if before:
                    self._optimizer.state[piece] = {
                        key: part.of(value) if _per_element(key, value, param) else _number(key, value, treatment)
                        for key, value in before.items()
                    }
                params.append(piece)
                pieces.append((part, piece))
            groups.append({**group, "params": params, "lr": treatment.lr})
        self._step_groups(groups, arguments)
        state = self._optimizer.state[param]
        numbers = {}
        for part, piece in pieces:
            part.put(param.data, piece)
            for key, value in self._optimizer.state.pop(piece, {}).items():
                if not _per_element(key, value, piece):
                    numbers[key] = value
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(param, dtype=value.dtype, requires_grad=False)
                part.put(state[key], value)
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


@dataclass(frozen=True)
class _Part:
    """Columns ``column`` to ``column + width`` of ``rows`` rows of ``row`` elements that begin at ``start``."""

    start: int
    rows: int
    row: int
    column: int
    width: int

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor, 1-D and contiguous like a flat partition: a view if they lie end to end."""
        return self._place(tensor).contiguous().view(-1)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write ``values`` to these elements, unless they are a view of them."""
        place = self._place(tensor)
        if values.data_ptr() != place.data_ptr() or not place.is_contiguous():
            place.copy_(values.view(place.shape))

    def _place(self, tensor: Tensor) -> Tensor:
        rows = tensor.view(-1)[self.start :][: self.rows * self.row].view(self.rows, self.row)
        return rows[:, self.column :][:, : self.width]


def _free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated; infinitely many where nobody tells."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _chunk_in(free: float) -> int:
    """Elements of a chunk that fits into ``free`` bytes."""
    return int(min(_CHUNK_ON_DEVICE, max(_CHUNK, free / _BYTES_COPIED)))


def _parts(
    blocks: Sequence[Block], by_birth: Sequence[Treatment], chunk: int
) -> Iterator[dict[Treatment, list[_Part]]]:
    """All elements by treatment, about ``chunk`` of them at a time."""
    parts: dict[Treatment, list[_Part]] = {}
    size = 0
    for block in blocks:
        step = max(1, chunk // block.row)
        for first in range(0, block.rows, step):
            rows = min(step, block.rows - first)
            column = 0
            for run in block.runs:
                part = _Part(block.start + first * block.row, rows, block.row, column, run.stop - column)
                parts.setdefault(by_birth[run.birth], []).append(part)
                column = run.stop
            size += rows * block.row
            if size >= chunk:
                yield parts
                parts, size = {}, 0
    if parts:
        yield parts


def _per_element(key: str, value: Any, param: Tensor) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.shape == param.shape


def _number(key: str, value: Any, treatment: Treatment) -> Any:
    """A copy of a number in a tensor's state; the step count is the age of the elements, if that is younger."""
    if key == "step" and treatment.age is not None:
        return value.clamp(max=treatment.age) if isinstance(value, Tensor) else min(value, treatment.age)
    return value.clone() if isinstance(value, Tensor) else value
