"""A source gives a checkpoint's metadata and any stretch of any logical parameter, whatever the format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint import pickles
from ds_sparkling.checkpoint.layout import Layout
from ds_sparkling.errors import CheckpointError, SparklingError
from ds_sparkling.spec.record import GrowthRecord

#: The key of a parameter's weights, next to the optimizer's own keys of its states: fp32 masters, or the compute
#: weights of a frozen parameter.
WEIGHT = "weight"


class Source(ABC):
    """A checkpoint that is read.

    Attributes:
        path: DIR/TAG.
        layout: its parameters, groups and topology.
        record: its growth record, if it has one.

    Args:
        path: DIR/TAG.
        trust, verify: see :func:`pickles.load`.

    Raises:
        CheckpointError, UnsupportedError: see the message.
    """

    layout: Layout
    record: GrowthRecord | None

    def __init__(self, path: Path, *, trust: bool = False, verify: bool = False) -> None:
        self.path = path
        self._trust, self._verify = trust, verify
        self._opened: dict[str, Any] = {}
        self._lock = Lock()

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that belongs to it."""

    @abstractmethod
    def check(self, part: int = 0, parts: int = 1) -> Iterator[Path]:
        """Look at every file (every ``parts``-th from ``part`` on), yielding it when it is found good.

        Raises:
            CheckpointError: names the first file that is missing, damaged, or of another checkpoint.
        """

    @abstractmethod
    def states(self, name: str) -> Mapping[str, torch.dtype]:
        """The per-element states that the optimizer keeps of a parameter, and their dtypes."""

    def whole_states(self, name: str) -> frozenset[str]:
        """Those of them that every rank holding a part of the parameter keeps as a whole.

        That is Muon's momentum in stages 1 and 2, unless it is offloaded.
        """
        group = self.layout.groups[self.layout.flats[self.layout.flat_of(name)].group]
        settings = self.layout.settings
        if settings.stage == 3 or settings.offloaded or not group.settings.get("use_muon", False):
            return frozenset()
        return frozenset({"momentum_buffer"} & self.states(name).keys())

    @abstractmethod
    def numbers(self, name: str) -> dict[str, Any]:
        """The rest of a parameter's optimizer state: step counters."""

    @abstractmethod
    def weight_dtype(self, name: str) -> torch.dtype:
        """Of its master weights."""

    @abstractmethod
    def read(self, name: str, key: str, start: int, stop: int) -> Iterator[Tensor]:
        """The elements ``start .. stop`` of a logical parameter's weight or state, as 1-D tensors end to end."""

    @abstractmethod
    def model_states(self, rank: int) -> dict[str, Any]:
        """The model states file of ``rank`` (of rank 0 if there is one only)."""

    @abstractmethod
    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """The optimizer states file of ``rank``; only its metadata may be used."""

    def looked_at(self, names: Iterable[str], look: Callable[[str], None]) -> Iterator[Path]:
        """Every file that ``look`` finds nothing wrong with.

        Raises:
            CheckpointError: names the file where something in it is of a kind that ``look`` doesn't know.
        """
        for name in names:
            try:
                look(name)
            except (SparklingError, OSError):
                raise
            except Exception as error:  # what somebody else wrote can be wrong in any way
                raise CheckpointError(
                    f"{self.path / name} isn't as expected ({type(error).__name__}: {error!s:.200}); is it damaged?"
                ) from error
            yield self.path / name

    def open(self, name: str) -> Any:
        """What the file ``name`` of the checkpoint holds; it is opened once, when it is first needed."""
        with self._lock:
            if name not in self._opened:
                self._opened[name] = pickles.load(self.path / name, trust=self._trust, verify=self._verify)
            return self._opened[name]

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """The elements ``start .. stop`` in one 1-D tensor, which is copied only if they lie in several places."""
        pieces = list(self.read(name, key, start, stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
