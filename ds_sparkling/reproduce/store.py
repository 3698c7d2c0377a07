"""Outcomes of finished runs, in a file that only ever gets longer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.reproduce.runs import Outcome, Run


class Store:
    """``runs.jsonl``: a line per finished run, with what it was and what it came to.

    Args:
        path: the file; it is made when the first run is finished.
        corpus: the fingerprint of the text that runs read.

    Raises:
        SparklingError: if a line of it, other than a last one that was cut off, can't be read, or its runs have read
            another text.
    """

    def __init__(self, path: Path, corpus: str) -> None:
        self.path = path
        self.corpus = corpus
        self.outcomes: dict[str, Outcome] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break  # killed while writing it: that run is run again
            try:
                entry = json.loads(line)
                self.outcomes[entry["key"]] = Outcome.from_dict(entry["outcome"])
                read = entry["corpus"]
            except (ValueError, KeyError, TypeError) as error:
                raise SparklingError(
                    f"{path}, line {number}, isn't a finished run ({error}); delete the line to run it again"
                ) from None
            if read != corpus:
                raise SparklingError(
                    f"{path} has runs on another text ({read}, this is {corpus}), which can't be compared; the "
                    "standard library's sources differ between versions of Python: use that one, or another --output "
                    "DIR"
                )
            whole += len(line.encode())
        if lines and whole < path.stat().st_size:
            os.truncate(path, whole)

    def add(self, run: Run, outcome: Outcome) -> None:
        """Keep a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": run.key, "corpus": self.corpus, "run": asdict(run), "outcome": asdict(outcome)}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.outcomes[run.key] = outcome
