"""Find a checkpoint, open it, and look at all of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ds_sparkling.checkpoint.source import Source
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.checkpoint.universal import UniversalSource, is_universal
from ds_sparkling.checkpoint.zero_source import ZeroSource, is_checkpoint_file
from ds_sparkling.errors import CheckpointError, SparklingError
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.record import find_checkpoint

#: Characters of ``latest`` that are read.
_LONGEST_TAG = 4096


def find(root: Path, tag: str | None) -> Path:
    """The checkpoint directory ``root``/TAG; the one named in ``latest`` or ``latest_universal`` by default.

    Args:
        root: the directory that holds it, or itself the directory of a tag.

    Raises:
        CheckpointError: if there is none, or the tag would lead out of ``root``.
    """
    if not root.is_dir():  # a loop of links isn't one either
        raise CheckpointError(f"{root} isn't a directory")
    if _is_tag(root):
        if tag not in (None, root.resolve().name):
            raise CheckpointError(f"{root} is itself a checkpoint, not a directory with one called {tag!r}; drop --tag")
        return root.resolve()
    tag = _latest(root) if tag is None else tag
    if not tag or tag != Path(tag).name or tag in (".", ".."):
        raise CheckpointError(f"tag {tag!r} isn't the name of a directory in {root}")
    try:
        path = find_checkpoint(root, tag)
    except OSError as error:
        raise CheckpointError(f"tag {tag[:80]!r} isn't the name of a directory in {root}: {error.strerror}") from error
    assert path is not None
    return path


def _is_tag(root: Path) -> bool:
    """Whether a directory holds the files of a checkpoint, and doesn't name one."""
    names = {entry.name for entry in root.iterdir()}
    return not names & {"latest", "latest_universal"} and (is_universal(root) or any(map(is_checkpoint_file, names)))


def _latest(root: Path) -> str:
    for name in ("latest", "latest_universal"):
        if (root / name).is_file():
            try:
                with open(root / name) as file:
                    return file.read(_LONGEST_TAG).strip()
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{root / name} can't be read: {error}; say which checkpoint with --tag"
                ) from error
    raise CheckpointError(f"{root} has no file 'latest' or 'latest_universal'; say which checkpoint with --tag")


def open_checkpoint(path: Path, *, trust: bool = False, verify: bool = False) -> Source:
    """The checkpoint in the directory ``path`` (DIR/TAG).

    Args:
        trust, verify: see :func:`pickles.load`.

    Raises:
        CheckpointError, UnsupportedError: see the message.
    """
    with understanding(path):
        return (UniversalSource if is_universal(path) else ZeroSource)(path, trust=trust, verify=verify)


def check_files(source: Source, team: Team, *, progress: bool) -> None:
    """Look at every file of a checkpoint, each process of ``team`` at its share.

    Raises:
        CheckpointError, UnsupportedError: see :meth:`Source.check`.
    """

    def check() -> None:
        checked = source.check(team.rank, team.size)
        count = len(source.files[team.rank :: team.size])
        shown = progress and team.rank == 0
        bar = progress_bar(checked, desc="looking at files", total=count, unit="file", shown=shown)
        with understanding(source.path), bar as files:
            for _ in files:
                pass

    team.together(check)


@contextlib.contextmanager
def understanding(path: Path) -> Iterator[None]:
    """Make what unreadable files and metadata of an unexpected kind lead to errors that name them."""
    try:
        yield
    except SparklingError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # what somebody else wrote can be wrong in any way
        raise CheckpointError(
            f"{path}: metadata isn't as expected ({type(error).__name__}: {error!s:.200}); is a file damaged?"
        ) from error
