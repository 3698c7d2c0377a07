"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ds_sparkling.errors import CheckpointError
from ds_sparkling.files import beside, longest_name

_LOCK = "lock"
_DATA = "data"
_MOMENT = 0.3
#: Bytes that a path may have on Linux.
_LONGEST_PATH = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def staging(out: Path) -> Path:
    """Where the contents of ``out`` are written before they are published."""
    return beside(out, ".incomplete") / _DATA


def check_free(out: Path) -> None:
    """Raise CheckpointError unless ``out`` doesn't exist or is an empty directory, and nothing else is in the way."""
    if not out.name:
        raise CheckpointError(f"{out} can't be made; name a directory")
    length, most = len(os.fsencode(out.name)), longest_name(out.parent)
    if length > most:
        raise CheckpointError(f"{out} can't be made: its name has {length} bytes, of {most} at most; name another")
    if out.is_dir() and os.path.ismount(out):
        raise CheckpointError(f"{out} is a mount point, which can't be replaced; name a directory in it")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CheckpointError(f"{out} exists and isn't an empty directory; nothing is overwritten, name another")
    incomplete = staging(out).parent
    if not incomplete.exists() and not incomplete.is_symlink():
        return
    left = {entry.name for entry in incomplete.iterdir()} if incomplete.is_dir() else {""}
    # A call that is killed leaves the lock, with or without data, or at its very beginning and end nothing.
    if incomplete.is_symlink() or not left <= {_LOCK, _DATA} or (left and not (incomplete / _LOCK).is_file()):
        raise CheckpointError(f"{incomplete} is in the way, and isn't left from an earlier call; remove it")


def check_names(out: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError unless files of these names, paths within ``out``, can be made there.

    Args:
        out: what is to be published.
        names: of the files.
    """
    longest, root = longest_name(out.parent), os.fsencode(staging(out))
    for name in names:
        try:
            parts = os.fsencode(name).split(b"/")
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{out} can't hold a file {name!r:.200}: {error}") from error
        length = max(map(len, parts))
        if length > longest:
            raise CheckpointError(
                f"{out} can't hold the file {name!r:.200}: its name has {length} bytes, of {longest} at most; "
                "rename the parameter, or write another --format"
            )
        if len(root) + len(name) >= _LONGEST_PATH:
            raise CheckpointError(f"{out} can't hold {name!r:.200}: the path would be too long; name a shorter one")


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``out`` at the end of the ``with``; after an error nothing is left.

    What an earlier call left when it was killed is removed.

    Raises:
        CheckpointError: if ``out`` is taken or can't be written, or another process is writing it.
    """
    data = staging(out)
    with writing(out), _locked(out):
        try:
            check_free(out)
            if data.exists():
                shutil.rmtree(data)
            data.mkdir()
            yield data
            sync_tree(data)
            os.rename(data, out)
            sync(out.parent)
        finally:
            # The lock goes last, so that what is left of a call killed here is known as its.
            shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make errors of the file system errors that name what can't be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock in the staging directory, which is made and removed with it."""
    incomplete = staging(out).parent
    path = incomplete / _LOCK
    check_free(out)
    lock = _acquire(out, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            incomplete.rmdir()
        lock.release()


def _acquire(out: Path, path: Path) -> BaseFileLock:
    """The lock, held; not held where the file system knows no locks.

    Raises:
        CheckpointError: if another process holds it.
    """
    while True:
        path.parent.mkdir(exist_ok=True)
        # With a moment to try again: its last holder may have removed the file between open and lock.
        lock = FileLock(path, timeout=_MOMENT, fallback_to_soft=False)
        try:
            lock.acquire()
        except FileNotFoundError:
            continue  # another call has just removed the directory
        except Timeout as error:
            raise CheckpointError(f"another process is writing {out} (it holds {path})") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return lock


def sync_tree(root: Path) -> None:
    """See that all files under ``root``, and their names, are on the disk."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(directory) / name)
        sync(Path(directory))


def sync(path: Path) -> None:
    """See that a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
