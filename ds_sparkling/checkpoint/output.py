"""Files that are laid out first and then filled in place, piece by piece, by several workers."""

from __future__ import annotations

import bisect
import math
import mmap
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_sparkling.checkpoint import pickles
from ds_sparkling.checkpoint.checksums import combined
from ds_sparkling.checkpoint.contents import Contents
from ds_sparkling.checkpoint.publish import writing
from ds_sparkling.checkpoint.source import WEIGHT
from ds_sparkling.errors import CheckpointError

#: Of mmap(2): take address space without a promise of memory, which nobody will touch.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
#: Files that may wait for the disk.
_UNSYNCED_FILES = 32


@dataclass(frozen=True)
class ElementRange:
    """The elements ``start .. stop`` of a logical parameter's weight or state, from ``offset`` on in a tensor."""

    name: str
    key: str
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True)
class Slot:
    """A run's place in a file: from byte ``position`` on, as ``dtype``."""

    run: ElementRange
    position: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Written:
    """Bytes that were written, and their CRC-32."""

    path: Path
    position: int
    numel: int
    checksum: int


class OutputFile(ABC):
    """A file of the output.

    Attributes:
        sealed: whether it holds checksums of what it is filled with.
    """

    sealed: ClassVar[bool] = False

    @abstractmethod
    def lay_out(self, path: Path) -> Iterator[Slot | tuple[int, Tensor]]:
        """Write everything but the parameters, and yield their slots, and (position, tensor) of tensors as they are.

        Raises:
            OSError: if the file can't be written.
        """

    def seal(self, descriptor: int, written: Sequence[Written]) -> None:  # noqa: B027 (most hold none)
        """Write the checksums of what was written into the file, if it holds any.

        Raises:
            OSError: if the file can't be written.
        """


@dataclass
class PickledFile(OutputFile):
    """A ``.pt`` file.

    Attributes:
        content: what is pickled. Its tensors that aren't in ``runs`` are written as they are.
        runs: (tensor in ``content``, what goes into it); the rest of such a tensor is zero.
    """

    sealed = True

    content: Any
    runs: list[tuple[Tensor, list[ElementRange]]] = field(default_factory=list)
    _places: dict[int, pickles.Place] = field(default_factory=dict, init=False)

    def room(
        self, shape: Sequence[int], dtype: torch.dtype, runs: Iterator[ElementRange] | Sequence[ElementRange]
    ) -> Tensor:
        """A tensor to put into ``content`` that ``runs`` will fill. It takes address space, but no memory."""
        size = math.prod(shape) * dtype.itemsize
        if size:
            reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
            tensor = torch.frombuffer(reserved, dtype=dtype).view(tuple(shape))
        else:
            tensor = torch.empty(tuple(shape), dtype=dtype)
        self.runs.append((tensor, list(runs)))
        return tensor

    def lay_out(self, path: Path) -> Iterator[Slot | tuple[int, Tensor]]:
        places = self._places = pickles.lay_out(path, self.content)
        filled = set()
        for tensor, runs in self.runs:
            if tensor.numel():
                position = places[tensor.untyped_storage().data_ptr()].position
                filled.add(tensor.untyped_storage().data_ptr())
                for run in runs:
                    yield Slot(run, position + run.offset * tensor.dtype.itemsize, tensor.dtype)
        for tensor in pickles.tensors(self.content):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in filled:
                filled.add(storage.data_ptr())
                yield places[storage.data_ptr()].position, torch.empty(0, dtype=torch.uint8).set_(storage)

    def seal(self, descriptor: int, written: Sequence[Written]) -> None:
        places = sorted(self._places.values(), key=lambda place: place.position)
        starts = [place.position for place in places]
        parts: list[list[tuple[int, int, int]]] = [[] for _ in places]
        for part in written:
            parts[bisect.bisect(starts, part.position) - 1].append((part.position, part.numel, part.checksum))
        for place, held in zip(places, parts, strict=True):
            checksum = combined(held, place.position, place.size).to_bytes(4, "little")
            for position in place.checksums:
                os.pwrite(descriptor, checksum, position)


@dataclass
class OutputSummary:
    """What became of the output.

    Attributes:
        written: bytes of parameters and other tensors.
        not_finite: parameters with NaN or Inf in their weights.
        verified: bytes that were read back and found as written.
    """

    written: int = 0
    not_finite: set[str] = field(default_factory=set)
    verified: int = 0


class Filler:
    """Lays files out and fills them.

    Args:
        contents: what goes into them.
        workers: how many threads; they share the mapped inputs and write into the files directly.
        verify: keep a checksum of everything that is written, for :meth:`verify`.
        progress: called with the number of bytes whenever some are done.
    """

    def __init__(
        self,
        contents: Contents,
        *,
        workers: int,
        verify: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.report = OutputSummary()
        self._contents = contents
        self._workers = workers
        self._verify = verify
        self._progress = progress
        self._written: list[Written] = []
        self._lock = Lock()

    def fill(self, files: Iterator[tuple[Path, OutputFile]]) -> None:
        """Write every file, and see that it is on the disk.

        Raises:
            CheckpointError: names the file that can't be written.
        """
        with ThreadPoolExecutor(self._workers) as pool, ThreadPoolExecutor(self._workers) as syncing:
            synced: list[tuple[Path, Future[None]]] = []
            for path, file in files:
                with writing(path):
                    descriptor = self._fill_file(pool, path, file)
                synced.append((path, syncing.submit(_sync, descriptor)))  # while the next ones are filled
                if len(synced) > _UNSYNCED_FILES:
                    _finish_sync(*synced.pop(0))
            for path, done in synced:
                _finish_sync(path, done)

    def verify(self, progress: Callable[[int], None]) -> None:
        """Read everything back from the disk and compare it with the checksums taken while writing.

        Args:
            progress: called with the number of bytes whenever some are done.

        Raises:
            CheckpointError: names the file and the position of the first difference.
        """
        with ThreadPoolExecutor(self._workers) as pool:
            for written in pool.map(self._verified, self._written):
                self.report.verified += written
                progress(written)

    def _fill_file(self, pool: ThreadPoolExecutor, path: Path, file: OutputFile) -> int:
        """Write a file; its descriptor, which is still open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        slots, written = list(file.lay_out(path)), list[Written]()
        kept = written if file.sealed or self._verify else None
        descriptor = os.open(path, os.O_RDWR)
        try:
            futures: list[Future[None]] = []
            for slot in slots:
                if isinstance(slot, Slot):
                    for start, stop in self._contents.cuts(slot.run.name, slot.run.start, slot.run.stop):
                        futures.append(pool.submit(self._fill_slot, path, descriptor, slot, start, stop, kept))
                else:
                    self._write(path, descriptor, *slot, kept)
            _settle(futures)
            file.seal(descriptor, written)
        except BaseException:
            os.close(descriptor)
            raise
        if self._verify:
            self._written += written
        return descriptor

    def _fill_slot(
        self, path: Path, descriptor: int, slot: Slot, start: int, stop: int, written: list[Written] | None
    ) -> None:
        piece = self._contents.make(slot.run.name, slot.run.key, start, stop, slot.dtype)
        # A sum that isn't finite may also have overflowed, so look closer then.
        if slot.run.key == WEIGHT and not piece.sum().isfinite() and not piece.isfinite().all():
            with self._lock:
                self.report.not_finite.add(slot.run.name)
        self._write(path, descriptor, slot.position + (start - slot.run.start) * slot.dtype.itemsize, piece, written)

    def _write(self, path: Path, descriptor: int, position: int, piece: Tensor, written: list[Written] | None) -> None:
        data = memoryview(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], position + done)
        part = None if written is None else Written(path, position, len(data), zlib.crc32(data))
        with self._lock:
            if written is not None and part is not None:
                written.append(part)
            self.report.written += len(data)
            self._progress(len(data))

    def _verified(self, written: Written) -> int:
        with open(written.path, "rb") as file:
            if hasattr(os, "posix_fadvise"):  # from the disk, not from the cache
                os.posix_fadvise(file.fileno(), written.position, written.numel, os.POSIX_FADV_DONTNEED)
            data = os.pread(file.fileno(), written.numel, written.position)
        if zlib.crc32(data) != written.checksum or len(data) != written.numel:
            raise CheckpointError(
                f"{written.path} isn't what was written: bytes {written.position} to "
                f"{written.position + written.numel} differ; is the disk sound?"
            )
        return written.numel


def _finish_sync(path: Path, done: Future[None]) -> None:
    with writing(path):
        done.result()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(futures: Sequence[Future[None]]) -> None:
    """Wait for all; on a failure, or when stopped, drop those not yet begun, wait for the others and raise it."""
    try:
        wait(futures, return_when="FIRST_EXCEPTION")
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
