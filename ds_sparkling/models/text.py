"""Text for the main job: byte-level, from files or from the Python standard library's own sources.

A batch is a function of (seed, step), so a resumed or grown run reads on where it was without any saved position,
and every number of ranks sees the same global batch.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_sparkling.errors import ConfigError

#: Every n-th file (or the last n-th of a single one) is held out for validation.
_HELD_OUT = 20

Tokens = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, one 1-D array each."""

    train: Tokens
    validation: Tokens
    source: str

    @classmethod
    def standard_library(cls) -> Corpus:
        """The Python standard library's sources, without its tests: real text that is always there."""
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [path for path in sorted(root.rglob("*.py")) if not skipped.intersection(path.relative_to(root).parts)]
        return cls._from_files(files, f"the standard library's sources in {root}")

    @classmethod
    def from_path(cls, path: Path) -> Corpus:
        """A file, or every file below a directory: ``.npy`` holds token ids (1-D), anything else is read as bytes.

        Raises:
            ConfigError: if there is nothing to read, or an array isn't 1-D and of an unsigned type.
        """
        if path.is_dir():
            return cls._from_files([file for file in sorted(path.rglob("*")) if file.is_file()], str(path))
        if not path.is_file():
            raise ConfigError(f"--data {path} doesn't exist")
        tokens = _read(path)
        cut = len(tokens) - len(tokens) // _HELD_OUT
        return cls(tokens[:cut], tokens[cut:], str(path))

    @classmethod
    def _from_files(cls, files: list[Path], source: str) -> Corpus:
        if len(files) < 2:
            raise ConfigError(f"{source}: need at least two files, found {len(files)}")
        held_out = files[:: min(_HELD_OUT, len(files))]
        train = [file for file in files if file not in set(held_out)]
        return cls(
            np.concatenate([_read(file) for file in train]),
            np.concatenate([_read(file) for file in held_out]),
            source,
        )

    @property
    def fingerprint(self) -> str:
        """A name for the text: of its lengths, and of the first and last megabytes of either part."""
        digest = hashlib.blake2b(digest_size=8)
        for tokens in (self.train, self.validation):
            digest.update(str(len(tokens)).encode())
            digest.update(tokens[: 1 << 20].tobytes())
            digest.update(tokens[-(1 << 20) :].tobytes())
        return digest.hexdigest()

    def check(self, *, length: int, vocabulary: int) -> None:
        """Raise ConfigError if a window of ``length`` + 1 tokens or the largest token id doesn't fit."""
        for name, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) <= length:
                raise ConfigError(
                    f"{self.source}: the {name} part has {len(tokens)} tokens, too few for windows of {length}"
                )
        largest = int(max(self.train.max(), self.validation.max()))
        if largest >= vocabulary:
            raise ConfigError(f"{self.source}: token {largest} exceeds the model's vocab_size {vocabulary}")

    def batch(self, step: int, *, size: int, length: int, seed: int, rank: int, ranks: int) -> dict[str, Tensor]:
        """This rank's share of the global batch of ``size`` random windows at ``step``.

        Returns:
            ``input_ids`` and ``labels``, int64 of shape [size / ranks, length]; ``labels`` are one token ahead.
        """
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(len(self.train) - length, size=size)
        share = size // ranks
        return _windows(self.train, starts[rank * share : (rank + 1) * share], length)

    def validation_batches(
        self, *, size: int, length: int, batches: int, rank: int, ranks: int
    ) -> Iterator[dict[str, Tensor]]:
        """The same ``batches`` batches of ``size`` evenly spread windows every time; this rank's share of each."""
        starts = np.linspace(0, len(self.validation) - length - 1, num=batches * size).astype(np.int64)
        share = size // ranks
        for batch in starts.reshape(batches, size):
            yield _windows(self.validation, batch[rank * share : (rank + 1) * share], length)


def _read(path: Path) -> Tokens:
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.kind != "u":
            raise ConfigError(f"{path} must hold a 1-D array of an unsigned type, found {tokens.dtype}{tokens.shape}")
        return tokens
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def _windows(tokens: Tokens, starts: NDArray[np.int64], length: int) -> dict[str, Tensor]:
    windows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    return {"input_ids": windows[:, :-1].contiguous(), "labels": windows[:, 1:].contiguous()}
