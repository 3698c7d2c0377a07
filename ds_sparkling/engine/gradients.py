"""Gradients that an engine holds because no optimizer step has used them yet: a growth would drop them.

Where they lie differs between DeepSpeed's optimizers (``param.grad``, flat buffers, host memory), and stale ones lie
there after a step. So what is looked at is whether a backward pass has reached a parameter since the last step.
"""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_sparkling.engine.hooks import until_unhooked
from ds_sparkling.engine.internals import boundary_by_hand, unmanaged_backwards
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.errors import GrowthError


class GradientWatch:
    """Remembers when a gradient was last accumulated, whoever called ``backward``.

    Args:
        engine: a fresh one, or one that has trained: then its own counters tell whether it is in the middle of a step.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._step: int | None = engine.global_steps if _in_mid_step(engine) else None
        self._micro_step = -1
        self._trained = [param for param in engine.module.parameters() if param.requires_grad]
        for param in self._trained:
            hook = param.register_post_accumulate_grad_hook(self._accumulated)
            until_unhooked(engine, hook.remove)

    def _accumulated(self, _: Tensor) -> None:
        self._step = self._engine.global_steps
        self._micro_step = self._engine.micro_steps

    @property
    def held(self) -> bool:
        """Whether there are gradients that the next optimizer step would use."""
        if any(param.grad is not None and _any(param.grad) for param in self._trained):
            return True
        # Where all gradients are in param.grad, a loop may have emptied it to skip a batch.
        return adapter_of(self._engine).gradients_elsewhere and self._step == self._engine.global_steps

    @property
    def unstepped(self) -> bool:
        """Whether ``engine.step`` hasn't been called since the last backward pass."""
        return self._step == self._engine.global_steps and self._micro_step == self._engine.micro_steps

    @property
    def waiting(self) -> bool:
        """Whether gradients are held for the micro-batches still to come, in a place where a growth may be due."""
        by_hand = boundary_by_hand(self._engine)  # set by accelerate, which calls step() at it only
        if by_hand is None:
            between_passes = self._engine.managed_gradient_accumulation() and not self.unstepped
        else:
            between_passes = not by_hand
        return between_passes and self.held

    def refuse_held(self) -> None:
        """Raise GrowthError if a growth now would drop gradients."""
        if not self.held:
            return
        where = "between backward and step" if self.unstepped else "in the middle of gradient accumulation"
        raise GrowthError(
            f"growth {where} (step {self._engine.global_steps}, micro step {self._engine.micro_steps}) would drop the "
            "gradients of the micro-batches so far: grow before the forward pass of a step's first micro-batch"
        )


def _any(gradient: Tensor) -> bool:
    return gradient.is_sparse or bool(gradient.any())


def _in_mid_step(engine: DeepSpeedEngine) -> bool:
    """Whether an engine has had backward passes that no optimizer step followed, by its own counters."""
    if not engine.managed_gradient_accumulation():
        return bool(unmanaged_backwards(engine))
    if boundary_by_hand(engine) is not None:
        return False  # it tells of the passes to come
    return bool(engine.micro_steps % engine.gradient_accumulation_steps())
