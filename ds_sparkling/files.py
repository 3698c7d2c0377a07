"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ds_sparkling.errors import SparklingError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """What to write to instead of ``path``, whose place it takes when the ``with`` ends.

    After an error an earlier file is as it was, and nothing else is left.

    Raises:
        SparklingError: if the file system refuses.
    """
    part = beside(path, f".{os.getpid()}.part", hidden=True)  # another process may be writing the same file
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise SparklingError(f"{path} can't be written: {error.strerror or error}") from error
        raise


def check_regular(path: Path) -> None:
    """Look at what ``path`` is before it is opened: a FIFO keeps whoever opens it waiting, a device never ends.

    Raises:
        OSError: if it is anything but a regular file, or can't be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENOTSUP, "it is a FIFO, a socket or a device, and no file", str(path))


def longest_name(directory: Path) -> int:
    """How many bytes a file's name in ``directory`` may have."""
    try:
        return os.pathconf(directory, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # it doesn't exist, or the system doesn't tell
        return 255


def beside(path: Path, suffix: str, *, hidden: bool = False) -> Path:
    """A place next to ``path`` that belongs to it: its name and ``suffix``, always the same one.

    Where that is too long for the file system, the name is shortened, and told from others by its checksum.
    """
    name = f"{'.' if hidden else ''}{path.name}{suffix}"
    room = longest_name(path.parent)
    if len(os.fsencode(name)) > room:
        suffix = f"~{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{suffix}"
        kept = os.fsencode(name)[: room - len(os.fsencode(suffix))].decode(errors="ignore")
        name = kept + suffix
    return path.with_name(name)
