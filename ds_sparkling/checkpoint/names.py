"""A model's own names of its tensors: without what wrappers put before them, and held against the model's config."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_sparkling.checkpoint.layout import Shape
from ds_sparkling.discovery.factory import import_transformers
from ds_sparkling.errors import CheckpointError

logger = logging.getLogger(__name__)

#: What ``torch.compile`` puts into names, before those of the module that it wraps.
_COMPILED = "_orig_mod."
#: What other wrappers put before all names.
_WRAPPED = "module."
#: Names that an error lists.
_SHOWN = 5


@dataclass(frozen=True)
class OwnNames:
    """Turns the names of a wrapped model's tensors into those that they have in the model itself.

    Attributes:
        wrapped: whether a first part ``module`` is a wrapper's.
    """

    wrapped: bool = False

    @classmethod
    def of(cls, names: Collection[str], known: Collection[str] = ()) -> OwnNames:
        """The way to turn a checkpoint's ``names`` into a model's.

        Args:
            known: the model's own names, if they are known.
        """
        if known:
            return cls(not any(name.startswith(_WRAPPED) for name in known))
        return cls(bool(names) and all(name.startswith(_WRAPPED) for name in names))

    def __call__(self, name: str) -> str:
        own = name.replace(_COMPILED, "")
        while self.wrapped and own.startswith(_WRAPPED):
            own = own.removeprefix(_WRAPPED)
        return own


def some(names: Collection[str]) -> str:
    """The first few of the names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more


@dataclass(frozen=True)
class _Faults:
    """How a checkpoint differs from a model: names, and names with the shapes found and wanted."""

    missing: Collection[str]
    unexpected: Collection[str]
    mismatched: Collection[tuple[str, Shape, Shape]]

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"it lacks {some(self.missing)}")
        if self.unexpected:
            parts.append(f"the model has no {some(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{name} ({found}, not {wanted})" for name, found, wanted in self.mismatched]
            parts.append(f"it has other shapes of {some(shapes)}")
        return "; ".join(parts)


class HuggingFaceModel:
    """The model that a config describes, on the meta device: what its checkpoints hold.

    Attributes:
        shapes: of all tensors that belong to its checkpoints, by name.
        ties: the names of each tensor that has several.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        state = model.state_dict(keep_vars=True)
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
        self.ties = [tuple(group) for group in names.values() if len(group) > 1]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> HuggingFaceModel | None:
        """The model of a ``config.json``; None, with a warning that says why, if it can't be built here."""
        try:
            return cls(_built(config))
        except Exception as error:  # a library's, on a config that it may not know
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning(
                "names and shapes can't be held against the model's config, because its model can't be built here (%s)",
                reason,
            )
            return None

    def check(self, found: Mapping[str, Shape], where: object) -> None:
        """See that ``found`` is all that the model needs, by its names and in its shapes, and nothing else.

        Names that transformers itself changes when it loads them, as those of earlier versions, will do.

        Args:
            where: what holds it, for the error.

        Raises:
            CheckpointError: names what is missing, what isn't the model's, and what has another shape.
        """
        for tied in self.ties:
            apart = [name for name in tied if name in found]
            if len(apart) > 1:
                raise CheckpointError(
                    f"{where} holds {' and '.join(apart)} apart, but by the model's config they are one; set "
                    '"tie_word_embeddings", or what else ties them, to false in the config'
                )
        faults = self._faults(found)
        if str(faults):
            faults = self._faults_on_loading(found) or faults
        if str(faults):
            hint = " (was it saved with exclude_frozen_parameters?)" if faults.missing else ""
            raise CheckpointError(
                f"{where} doesn't hold the model of the config, a {type(self._model).__name__}: {faults}{hint}; "
                "nothing is exported"
            )

    def _faults(self, found: Mapping[str, Shape]) -> _Faults:
        """By the names of the model in memory."""
        held = {other for tied in self.ties if any(name in found for name in tied) for other in tied}
        return _Faults(
            [name for name in self.shapes if name not in found and name not in held],
            [name for name in found if name not in self.shapes],
            [(n, shape, self.shapes[n]) for n, shape in found.items() if self.shapes.get(n, shape) != shape],
        )

    def _faults_on_loading(self, found: Mapping[str, Shape]) -> _Faults | None:
        """What ``from_pretrained`` finds wrong, which knows how names have changed; None if it can't be asked."""
        state = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
        try:
            with _quiet():
                _, info = type(self._model).from_pretrained(
                    None,
                    config=self._model.config,
                    state_dict=state,
                    device_map="meta",
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # accelerate isn't there, or a part of an older tensor
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("transformers doesn't take these names for others (%s)", reason)
            return None
        mismatched = [(name, tuple(has), tuple(wants)) for name, has, wants in info["mismatched_keys"]]
        return _Faults(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched))


def _built(config: Mapping[str, Any]) -> nn.Module:
    if "model_type" not in config:
        raise ValueError("it has no 'model_type'")
    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(**config)
    classes = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    with torch.device("meta"):
        for found in filter(None, classes):
            return found(settings)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(settings)
        return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports and progress bars of transformers."""
    logs = import_transformers().utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
