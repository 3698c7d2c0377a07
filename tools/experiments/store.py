"""Outcomes of finished runs, in a file that only ever gets longer."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from filelock import BaseFileLock, FileLock, Timeout

from ds_sparkling.errors import SparklingError
from ds_sparkling.spec.json_files import parse_json
from experiments.runs import Outcome, TrainingRun


class Store:
    """``runs.jsonl``: a line per finished run, with what it was and what it came to.

    Args:
        path: the file.
        corpus: the fingerprint of the text that runs read.
        adding: whether runs are to be added; then the file is made, and locked until :meth:`close`.

    Raises:
        SparklingError: if a line of it, other than a last one that was cut off, can't be read, its runs have read
            another text, or another process is adding to it.
    """

    def __init__(self, path: Path, corpus: str, *, adding: bool = False) -> None:
        self.path = path
        self.corpus = corpus
        self.outcomes: dict[str, Outcome] = {}
        self._lock: BaseFileLock | None = None
        self._file: TextIO | None = None
        if adding:
            self._lock, self._file = _locked(path)
        try:
            self._read()
        except SparklingError:
            self.close()
            raise

    def close(self) -> None:
        """Let others add to it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()

    def _read(self) -> None:
        path = self.path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break  # killed while writing it: that run is run again
            try:
                entry = parse_json(line.encode())
                self.outcomes[entry["key"]] = Outcome.from_dict(entry["outcome"])
                read = entry["corpus"]
            except (ValueError, KeyError, TypeError) as error:
                raise SparklingError(
                    f"{path}, line {number}, isn't a finished run ({error}); delete the line to run it again"
                ) from None
            if read != self.corpus:
                raise SparklingError(
                    f"{path} has runs on another text ({read}, this is {self.corpus}), which can't be compared; the "
                    "standard library's sources differ between versions of Python: use that one, or another --output "
                    "DIR"
                )
            whole += len(line.encode())
        if self._file is not None:
            self._file.truncate(whole)

    def add(self, run: TrainingRun, outcome: Outcome) -> None:
        """Keep a finished run."""
        assert self._file is not None, "opened without adding"
        entry = {"key": run.key, "corpus": self.corpus, "run": asdict(run), "outcome": asdict(outcome)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.outcomes[run.key] = outcome


def _locked(path: Path) -> tuple[BaseFileLock, TextIO]:
    """The lock on the file, a file of its own beside it, and the file, open for adding to it.

    Raises:
        SparklingError: if another one holds it, or it can't be made.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"), blocking=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise SparklingError(f"{path} can't be written: {error.strerror}") from error
    try:
        lock.acquire()
    except Timeout:
        file.close()
        raise SparklingError(
            f"another process is adding runs to {path}; wait for it, stop it, or pass another --output DIR"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            file.close()
            raise SparklingError(f"{path} can't be locked: {error.strerror}") from error
    return lock, file
