"""Finding a checkpoint, opening it, and looking at all of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ds_sparkling.checkpoint.source import Source
from ds_sparkling.checkpoint.team import Team
from ds_sparkling.checkpoint.universal import UniversalSource, is_universal
from ds_sparkling.checkpoint.zero_source import ZeroSource
from ds_sparkling.errors import CheckpointError, SparklingError
from ds_sparkling.record import find_checkpoint


def find(root: Path, tag: str | None) -> Path:
    """The checkpoint directory ``root``/TAG; the one named in ``latest`` or ``latest_universal`` by default.

    Raises:
        CheckpointError: if there is none, or the tag would lead out of ``root``.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root} isn't a directory")
    tag = _latest(root) if tag is None else tag
    if not tag or tag != Path(tag).name or tag in (".", ".."):
        raise CheckpointError(f"tag {tag!r} isn't the name of a directory in {root}")
    try:
        path = find_checkpoint(root, tag)
    except OSError as error:
        raise CheckpointError(f"tag {tag[:80]!r} isn't the name of a directory in {root}: {error.strerror}") from error
    assert path is not None
    return path


def _latest(root: Path) -> str:
    for name in ("latest", "latest_universal"):
        if (root / name).is_file():
            try:
                return (root / name).read_text().strip()
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
        with understanding(source.path):
            for _ in tqdm(checked, "looking at files", count, unit="file", disable=not shown, leave=False):
                pass

    team.together(check)


@contextlib.contextmanager
def understanding(path: Path) -> Iterator[None]:
    """Make what metadata of an unexpected kind leads to an error that names the checkpoint."""
    try:
        yield
    except SparklingError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(f"{path}: metadata isn't as expected: {type(error).__name__}: {error}") from error
