"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_sparkling.errors import CheckpointError

_LOCK = "lock"
_DATA = "data"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def staging(out: Path) -> Path:
    """Where the contents of ``out`` are written before they are published."""
    return out.with_name(f"{out.name}.incomplete") / _DATA


def check_free(out: Path) -> None:
    """Raise CheckpointError unless ``out`` doesn't exist or is an empty directory."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists and isn't an empty directory; nothing is overwritten, name another")
    incomplete = staging(out).parent
    if incomplete.exists() and not (incomplete / _LOCK).is_file():
        raise CheckpointError(f"{incomplete} is in the way, and isn't left from an earlier call; remove it")


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``out`` at the end of the ``with``; after an error nothing is left.

    What an earlier call left when it was killed is removed.

    Raises:
        CheckpointError: if ``out`` is taken, or another process is writing it.
    """
    check_free(out)
    data = staging(out)
    incomplete = data.parent
    incomplete.mkdir(parents=True, exist_ok=True)
    with open(incomplete / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"another process is writing {out} (it holds {lock.name})") from error
        try:
            if data.exists():
                shutil.rmtree(data)
            data.mkdir()
            yield data
            sync_tree(data)
            os.rename(data, out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(incomplete, ignore_errors=True)


def sync_tree(root: Path) -> None:
    """See that the names of all files under ``root`` are on the disk."""
    for directory, _, _ in os.walk(root, topdown=False):
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """See that the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
