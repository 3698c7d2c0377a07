"""The files that a report consists of."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.report.pictures import SECTIONS


class Target:
    """Where a report goes: the page, and its pictures beside it, named after it.

    Args:
        output: a directory for ``report.html``, or the page's own name, ``.html``.
    """

    def __init__(self, output: Path) -> None:
        self.page = output if output.suffix == ".html" else output / "report.html"

    def picture(self, name: str) -> Path:
        return self.page.with_name(f"{self.page.stem}-{name}.png")

    def check(self, force: bool) -> None:
        """Raise SparklingError if something stands there that may not be overwritten."""
        there = [path for path in (self.page, *map(self.picture, self._names())) if path.exists()]
        if there and not force:
            raise SparklingError(f"{there[0]} exists; pass --force to overwrite the report, or another --output")

    def write(self, html: str, pictures: Mapping[str, bytes]) -> None:
        """Write all files into a directory of their own first, then rename them into place, the page last.

        Pictures of an earlier report that this one hasn't go.

        Raises:
            SparklingError: if they can't be written; then nothing of an earlier report is lost.
        """
        directory = self.page.parent
        made = next((path for path in (*reversed(directory.parents), directory) if not path.exists()), None)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".report-", dir=directory) as part:
                files = {self.picture(name): png for name, png in pictures.items()}
                files[self.page] = html.encode(errors="backslashreplace")
                for path, data in files.items():
                    (Path(part) / path.name).write_bytes(data)
                for path in files:
                    os.replace(Path(part) / path.name, path)
            for name in self._names() - pictures.keys():
                self.picture(name).unlink(missing_ok=True)
        except OSError as error:
            if made is not None:
                with contextlib.suppress(OSError):
                    shutil.rmtree(made)
            raise SparklingError(f"the report can't be written to {self.page}: {error.strerror}") from error

    def _names(self) -> set[str]:
        return {section.name for section in SECTIONS}
