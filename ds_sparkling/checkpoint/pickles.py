"""DeepSpeed's ``.pt`` files: read without running what is pickled in them, and laid out to be filled in place.

The few DeepSpeed classes that its checkpoints hold are read as stand-ins, which are pickled under DeepSpeed's names
again. So neither reading nor writing needs DeepSpeed.
"""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ds_sparkling.errors import CheckpointError
from ds_sparkling.files import check_regular


class StandIn:
    """An instance of a class of DeepSpeed's: its attributes, and the name it is pickled under."""

    qualified_name: ClassVar[str]


class LossScaler(StandIn):
    qualified_name = "deepspeed.runtime.fp16.loss_scaler.LossScaler"


class DynamicLossScaler(StandIn):
    qualified_name = "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"


class FragmentAddress(StandIn):
    """Where ``numel`` elements of a parameter lie: from ``start`` on in a rank's flat tensor."""

    qualified_name = "deepspeed.utils.tensor_fragment.fragment_address"

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class ZeroStage(int):
    """DeepSpeed's ``ZeroStageEnum``, which is pickled as a call with its number."""

    qualified_name = "deepspeed.runtime.zero.config.ZeroStageEnum"

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return ZeroStage, (int(self),)


STAND_INS: tuple[Any, ...] = (LossScaler, DynamicLossScaler, FragmentAddress, ZeroStage)


def load(path: Path, *, trust: bool = False, verify: bool = False) -> Any:
    """What ``path`` holds, its tensors mapped into memory and not read yet.

    Args:
        trust: unpickle classes that aren't known, which may run any code.
        verify: read all of it first, to see that it has its checksums.

    Raises:
        CheckpointError: if the file is missing, can't be read, is damaged, or holds classes that aren't known.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if verify:
        _check_sums(path, trust=trust)
    known: list[Any] = [(stand_in, stand_in.qualified_name) for stand_in in STAND_INS]
    try:
        with torch.serialization.safe_globals(known):
            if trust:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_Trusting)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        unknown = _unknown_classes(path)
        if unknown:
            raise CheckpointError(
                f"{path} holds {', '.join(unknown)}, which unpickling would run; if you trust who made the checkpoint, "
                "pass --trust-checkpoint"
            ) from None
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    except Exception as error:  # torch and pickle raise all kinds on bytes that aren't theirs
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def _check_sums(path: Path, *, trust: bool) -> None:
    """Raise CheckpointError if a part of ``path`` doesn't have its checksum.

    A part without one isn't looked at: torch can be told to write none, and release 0.1 of this package did.
    """
    part = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:
                    part = entry.filename
                    with archive.open(entry) as record:
                        while record.read(1 << 24):
                            pass
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # zipfile raises all kinds on bytes that aren't its own
        held = _held_in(path, part, trust=trust)
        raise CheckpointError(f"{path} is damaged, by its checksums{held}: {_first_line(error)}") from error


def _held_in(path: Path, part: str, *, trust: bool) -> str:
    """What a part of a file holds, for an error: the keys of a tensor; empty for anything else."""
    folder, _, number = part.rpartition("/")
    if not folder.endswith("/data"):
        return ""
    try:
        storages: dict[int, str] = {}  # torch numbers them as it meets them, and no two empty ones are taken for one
        for name, tensor in _named_tensors(load(path, trust=trust)):
            storages.setdefault(tensor.untyped_storage().data_ptr() or -len(storages) - 1, name)
        return f", in the tensor {list(storages.values())[int(number)]}"
    except (CheckpointError, IndexError, ValueError):
        return ""


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the file system doesn't give."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing")
    if error.errno == errno.EINVAL:  # by its own tables of contents something lies outside of it
        return CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}")
    return CheckpointError(f"{path} can't be read: {error.strerror or error}")


@dataclass(frozen=True)
class Place:
    """Where a tensor storage's ``size`` bytes belong in a file.

    Attributes:
        position: of the first byte.
        size: how many there are.
        checksums: the positions of their CRC-32, of four bytes each.
    """

    position: int
    size: int
    checksums: tuple[int, ...]


def lay_out(path: Path, content: Any) -> dict[int, Place]:
    """Write ``content`` to ``path`` with room for its tensors, but without their elements and checksums.

    Returns:
        Where each tensor storage's bytes belong in the file, by the storage's address (``data_ptr``).

    Raises:
        OSError: if the file can't be written.
    """
    storages: dict[int, int] = {}
    for tensor in tensors(content):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages.setdefault(storage.data_ptr(), storage.nbytes())
    with open(path, "wb") as file, torch.serialization.skip_data():
        torch.save(content, file, pickle_module=_Named)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records, listed = {}, archive.start_dir
        for entry in archive.infolist():
            folder, _, number = entry.filename.rpartition("/")
            if folder.endswith("/data") and entry.file_size:
                name, extra = _lengths(file, entry.header_offset + 26, 2)
                position = entry.header_offset + 30 + name + extra
                # Once more in its header or, where that was written first, behind it.
                again = position + entry.file_size + 4 if entry.flag_bits & 8 else entry.header_offset + 14
                records[int(number)] = Place(position, entry.file_size, (listed + 16, again))
            listed += 46 + sum(_lengths(file, listed + 28, 3))
    places = [records[number] for number in sorted(records)]
    # torch numbers storages as it meets them, which is the order of the walk.
    if [place.size for place in places] != list(storages.values()):
        raise CheckpointError(f"{path} would hold tensors in objects of unknown classes, which can't be written")
    return dict(zip(storages, places, strict=True))


def _lengths(file: BinaryIO, position: int, count: int) -> list[int]:
    """The lengths of what has no fixed one in a header of a zip archive: the name, the padding, a comment."""
    file.seek(position)
    return [int.from_bytes(file.read(2), "little") for _ in range(count)]


def tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in ``content``, in the order it is pickled.

    Raises:
        CheckpointError: if one of them can't be written.
    """
    for _, tensor in _named_tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(
                f"a tensor in it of {tensor.layout}, {tensor.dtype} on {tensor.device} can't be written"
            )
        yield tensor


def _named_tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """The same with the keys that lead to each."""
    seen: set[int] = set()

    def walk(content: Any, keys: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(content, (str, bytes, int, float, type, type(None))) or id(content) in seen:
            return
        seen.add(id(content))  # the same object is pickled once
        if isinstance(content, Tensor):
            yield keys, content
        elif isinstance(content, Mapping):
            for key, value in content.items():
                yield from walk(key, keys)
                yield from walk(value, f"{keys}[{key!r}]")
            yield from walk(getattr(content, "__dict__", None), keys)
        elif isinstance(content, (list, tuple, set, frozenset)):
            for index, value in enumerate(content):
                yield from walk(value, f"{keys}[{index}]")
        elif hasattr(content, "__dict__") and not callable(content):
            yield from walk(vars(content), keys)

    return walk(content, "")


def _unknown_classes(path: Path) -> list[str]:
    known = {stand_in.qualified_name for stand_in in STAND_INS}
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is damaged in another way
        return []
    return sorted(set(found) - known)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


_PythonPickler: Any = pickle._Pickler


class _NamingPickler(_PythonPickler):
    """Pickles stand-ins under the names of DeepSpeed's classes. In Python, because the C pickler looks them up."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj in STAND_INS:
            module, _, attribute = obj.qualified_name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


class _StandInUnpickler(pickle.Unpickler):
    """Unpickles anything, DeepSpeed's few classes as stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        for stand_in in STAND_INS:
            if stand_in.qualified_name == f"{module}.{name}":
                return stand_in
        return super().find_class(module, name)


class _Named:
    """A pickle module for ``torch.save``."""

    __name__ = "pickle"
    Pickler = _NamingPickler
    Unpickler = pickle.Unpickler
    dump, dumps, load, loads = pickle.dump, pickle.dumps, pickle.load, pickle.loads


class _Trusting(_Named):
    """A pickle module for ``torch.load``."""

    Unpickler = _StandInUnpickler
