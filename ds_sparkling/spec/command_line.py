"""Commands share arguments of the same kinds, and end in one line where a user can mend what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ds_sparkling.errors import SparklingError

#: The largest number of anything that a command counts.
_MOST = (1 << 63) - 1


def ends_in_words(status: int = 2) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command's entry point: what users can cause ends it with one line and a status, Ctrl-C with 130.

    Args:
        status: the process's, after an error.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
            try:
                main(argv)
            except SparklingError as error:
                end(str(error), status)
            except BrokenPipeError:  # the reader has seen enough
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(128 + 13)
            except OSError as error:
                named = "" if error.filename is None else f"{error.filename}: "
                end(f"{named}{error.strerror or error}", status)
            except KeyboardInterrupt:
                sys.stderr.write("interrupted\n")
                sys.exit(130)

        return run

    return decorate


def end(message: str, status: int) -> NoReturn:
    """End the process with an error in one line."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(status)


def path_argument(text: str) -> Path:
    """The type of every argument that is a path: one that the file system can look at, whether or not something is
    there."""
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):  # it may be about to be made
        pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{_short(text)}: {error.strerror}") from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a path can't have a NUL") from None
    if not text:
        raise argparse.ArgumentTypeError("a path can't be empty")
    return Path(text)


def directory_argument(text: str) -> Path:
    """The type of an argument that is a directory which is there."""
    path = path_argument(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{_short(text)} isn't a directory; make it first")
    return path


def whole_number(text: str) -> int:
    """The type of an argument that is a whole number, of decimal digits alone."""
    digits = text[1:] if text.startswith("-") else text
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {_short(text)!r}")
    if len(digits) > len(str(_MOST)) or int(digits) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {_short(text)}")
    return int(text)


def count(text: str) -> int:
    """The type of an argument that is 0 or more."""
    number = whole_number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def positive(text: str) -> int:
    """The type of an argument that is 1 or more."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def positive_float(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {_short(text)!r}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {_short(text)}")
    return number


def port(text: str) -> int:
    """The type of an argument that is a port."""
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be a port, at most 65535, got {text}")
    return number


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}...{text[-40:]}"
