"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise SparklingError(f"{path} can't be written: {error.strerror or error}") from error
        raise
