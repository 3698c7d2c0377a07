"""Other libraries' private parts are touched, and their objects changed, in the files that are there for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_sparkling

PACKAGE = Path(ds_sparkling.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

#: Here all of it is allowed.
PLACES = ("engine/hooks.py", "engine/internals.py", "engine/optimizers/")
#: Rooms that see engines, optimizers or other people's modules.
ROOMS = ("engine/", "optim/", "discovery/", "integrations/")

#: Private names elsewhere, by file, and why.
PRIVATE = {
    # The room below the engine room, which can't import it: torch's process groups are replaced by a context there.
    "discovery/one_rank.py": {
        "_C",
        "_c10d_functional",
        "_c10d_functional_autograd",
        "_create_work_from_future",
        "_distributed_c10d",
        "_getframe",
        "_resolve_process_group",
        "_set_ep_group",
        "_world",
    },
    # Only asks whether a parameter is partitioned already, to refuse it.
    "discovery/build.py": {"ds_tensor"},
    # torch has no public way to tell which buffers are persistent, or to replace one by a subclass.
    "discovery/forward.py": {"_buffers"},
    "discovery/roles.py": {"_buffers"},
    # Whether a module is compiled.
    "spec/unsupported.py": {"_orig_mod"},
    # The milestones of a SequentialLR, which torch keeps to itself.
    "optim/scheduler.py": {"_milestones", "_schedulers"},
    # The functions of this package's own libraries.
    "growth/random.py": {"ds_sparkling_add_normal"},
    "optim/adam.py": {"ds_sparkling_adam_step"},
    # Python's own.
    "checkpoint/command.py": {"_exit"},
    "checkpoint/pickles.py": {"_Pickler"},
    "engine/rollcall.py": {"_current_frames", "_exit"},
    # torch's documented way to call through a __torch_function__ is in a private module.
    "engine/stale_references.py": {"_C"},
}

#: Attributes set on objects that aren't a class's own ``self``, by file, and why.
CHANGED = {
    # Layers get the groups that DeepSpeed would give them, within a context; what is replaced, as above.
    "discovery/one_rank.py": {"layer.ep_group", "layer.gate.ep_group", "setattr(owner, name)"},
    # A module of the user's own that averages; tensors' data, and modes of modules that are the grown model's.
    "engine/averaged.py": {"averaged.module", "wide.get_buffer(name).data", "param.data", "module.training"},
    # What a fresh engine takes over.
    "engine/carry_over.py": {"module.training", "setattr(engine, name)"},
    # The package's own objects, the run on the engine among them.
    "engine/checkpoints.py": {
        "engine.sparkling",
        "run_of(engine).observations.unseen_losses",
        "run_of(engine).observations.spent",
    },
    "engine/transition.py": {"transition.checkpoint"},
    "engine/rollcall.py": {"self._attendance.in_step"},
    "engine/watch/diagnosis.py": {"self._step.watch"},
    "engine/watch/token_meter.py": {"run.observations.spent"},
    # The grown engine gets the objects that others hold, which have become its own.
    "engine/in_place.py": {"grown.module", "grown.optimizer", "grown.lr_scheduler"},
    # accelerate's wrappers and Trainer's state, in whose hands the engine is.
    "integrations/accelerate.py": {"held.prepare", "wrapper.optimizer", "wrapper.scheduler"},
    "integrations/trainer.py": {
        "control.should_save",
        "setattr(model.config, name)",
        "state.best_global_step",
        "state.best_metric",
        "state.best_model_checkpoint",
    },
    # An optimizer on trial is put back; the step is given back by BirthStep.give_back.
    "optim/optimizer_trial.py": {"optimizer.param_groups", "optimizer.state", "tensor.grad"},
    "optim/step.py": {"optimizer.step", "piece.grad", "self._optimizer.param_groups", "self._optimizer.step"},
}


def is_private(name: str) -> bool:
    return (name.startswith("_") and not name.startswith("__")) or name.startswith("ds_")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private attributes of other objects than the class's own, and those asked for by name."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, holder = node.attr, ast.unparse(node.value)
            if is_private(name) and holder not in ("self", "cls") and name not in own and name != "ds_config":
                yield name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            asked = node.args[1]
            if isinstance(asked, ast.Constant) and is_private(str(asked.value)):
                yield str(asked.value)


def changes(tree: ast.AST) -> Iterator[str]:
    """What is assigned to, or deleted, of objects other than ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if ast.unparse(node.value) not in ("self", "cls"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "__setattr__"):
            holder, name = map(ast.unparse, node.args[:2])
            if holder != "self" and not holder.startswith("super("):
                yield f"setattr({holder}, {name})"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("delattr", "object.__delattr__"):
            yield f"delattr({', '.join(map(ast.unparse, node.args))})"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(PLACES)])
def test_private_parts_are_read_in_their_places(name: str) -> None:
    assert set(private_names(ast.parse(FILES[name].read_text()))) == PRIVATE.get(name, set())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(ROOMS) and not name.startswith(PLACES)])
def test_what_others_own_is_changed_in_its_places(name: str) -> None:
    assert set(changes(ast.parse(FILES[name].read_text()))) == CHANGED.get(name, set())


def test_nothing_is_listed_that_is_gone() -> None:
    assert PRIVATE.keys() | CHANGED.keys() <= FILES.keys()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("engine.step = replaced", "engine.step"),
        ("for engine.step in [1]: pass", "engine.step"),
        ("del engine.step", "engine.step"),
        ("setattr(engine, 'step', replaced)", "setattr(engine, 'step')"),
        ("object.__setattr__(engine, '__class__', kind)", "setattr(engine, '__class__')"),
    ],
)
def test_the_scan_finds_changes(code: str, found: str) -> None:
    assert set(changes(ast.parse(code))) == {found}


@pytest.mark.parametrize("code", ["param.ds_tensor", "optimizer._step()", "getattr(param, '_x', None)"])
def test_the_scan_finds_private_names(code: str) -> None:
    assert len(set(private_names(ast.parse(code)))) == 1
