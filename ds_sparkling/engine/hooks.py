"""Everything that is replaced in an engine, in DeepSpeed, torch and transformers: listed in :data:`HOOKS`, put in from
here alone, and taken out again by :func:`unhook`.

Two more stand where they are, because those rooms know no engine: the optimizer's ``step``, which
:class:`~ds_sparkling.optim.step.BirthStep` takes and gives back, and torch's process groups, which
:mod:`ds_sparkling.discovery.one_rank` replaces while a model is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

#: Where an engine keeps what takes its hooks out again, the first one first.
_UNDO = "_ds_sparkling_undo"


@dataclass(frozen=True, kw_only=True)
class Hook:
    """An attribute of somebody else's object that this package replaces.

    Attributes:
        owner: the class, by its full name, on which or on whose objects it is replaced.
        attribute: its name.
        why: what it does there.
        lasts: "run" if it stays until :func:`unhook`, "block" if it goes with a ``with`` block.
    """

    owner: str
    attribute: str
    why: str
    lasts: str = "run"

    def install(self, engine: DeepSpeedEngine, replacement: Any) -> None:
        """Replace the attribute of ``engine`` until :func:`unhook`."""
        until_unhooked(engine, _replace(engine, self.attribute, replacement))

    @contextmanager
    def during(self, thing: Any, replacement: Any) -> Iterator[None]:
        """Replace the attribute of ``thing`` within a ``with`` block."""
        undo = _replace(thing, self.attribute, replacement)
        try:
            yield
        finally:
            undo()


_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_CHECKPOINT_ENGINE = "deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine"

ENGINE_CLASS = Hook(
    owner=_ENGINE,
    attribute="__class__",
    why="unpacking what initialize returns, as deepspeed.initialize's four values, says what to write instead",
)
RUN = Hook(owner=_ENGINE, attribute="sparkling", why="an engine knows the run that it is part of; DeepSpeed has none")
LR_SCHEDULER = Hook(owner=_ENGINE, attribute="lr_scheduler", why="every birth has its own rate around the base one")
SAVE_CHECKPOINT = Hook(owner=_ENGINE, attribute="save_checkpoint", why="checkpoints carry the growth record")
LOAD_CHECKPOINT = Hook(owner=_ENGINE, attribute="load_checkpoint", why="the growth record is held against the engine")
STEP = Hook(owner=_ENGINE, attribute="step", why="what is measured is told before and after each optimizer step")
BACKWARD = Hook(owner=_ENGINE, attribute="backward", why="losses are seen for the diagnosis and the monitors")
MAKE_DIRECTORIES = Hook(
    owner=_CHECKPOINT_ENGINE,
    attribute="makedirs",
    why="what fails on one rank's disk must not keep the others waiting",
    lasts="block",
)
WRITE_FILE = Hook(
    owner=_CHECKPOINT_ENGINE, attribute="save", why="as makedirs: what fails on one rank's disk", lasts="block"
)
COMMIT_FILES = Hook(
    owner=_CHECKPOINT_ENGINE, attribute="commit", why="as makedirs: what fails on one rank's disk", lasts="block"
)
WAIT = Hook(
    owner="torch.distributed.Work",
    attribute="wait",
    why="waits for collectives on the CPU end when another rank has failed",
    lasts="block",
)
INITIALIZE_WEIGHTS = Hook(
    owner="transformers.PreTrainedModel",
    attribute="_initialize_weights",
    why="parameters that zero.Init has partitioned are gathered while transformers initializes them",
    lasts="block",
)

#: All of them, in the order in which they come about in a run.
HOOKS = (
    INITIALIZE_WEIGHTS,
    RUN,
    LR_SCHEDULER,
    SAVE_CHECKPOINT,
    LOAD_CHECKPOINT,
    BACKWARD,
    STEP,
    ENGINE_CLASS,
    MAKE_DIRECTORIES,
    WRITE_FILE,
    COMMIT_FILES,
    WAIT,
)


def until_unhooked(engine: DeepSpeedEngine, undo: Callable[[], None]) -> None:
    """Have :func:`unhook` call ``undo``, which takes out what has just been put into ``engine`` or a part of it."""
    vars(engine).setdefault(_UNDO, []).append(undo)


def unhook(engine: DeepSpeedEngine) -> DeepSpeedEngine:
    """Make a growing engine the plain DeepSpeedEngine that it was, with all that it has learned.

    Its scheduler is the base scheduler, all its elements follow the base rate, and it can't grow any more unless it is
    adopted again.

    Returns:
        The engine itself.
    """
    for undo in reversed(vars(engine).pop(_UNDO, [])):
        undo()
    return engine


def recast(thing: Any, kind: type, attributes: dict[str, Any] | None = None) -> None:
    """Give ``thing`` another class, and another object's attributes if there are any: what a growth has replaced says
    so, or is its successor from now on. There is no way back.
    """
    object.__setattr__(thing, "__class__", kind)
    if attributes is not None:
        object.__setattr__(thing, "__dict__", attributes)


def _replace(thing: Any, attribute: str, replacement: Any) -> Callable[[], None]:
    """Replace an attribute, and return what puts it back; what was inherited is inherited again."""
    if attribute == "__class__":
        own, kept = True, type(thing)
    else:
        # Not getattr, which would take off what makes a method of it.
        own, kept = attribute in vars(thing), vars(thing).get(attribute)
    setattr(thing, attribute, replacement)

    def undo() -> None:
        if own:
            setattr(thing, attribute, kept)
        else:
            delattr(thing, attribute)

    return undo
