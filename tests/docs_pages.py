"""README.md and the pages in docs/: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Made by an experiment's own code, and tested with it.
MADE = ROOT / "docs" / "results" / "small" / "README.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page != MADE),
]
#: What every page is called in tests.
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: where it stands, from the root.
        language: as it says behind the fence.
        text: without the indentation of the fence.
    """

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0] if self.text else ''}"


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    found = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [
        Block(page, language.strip(), re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in found
    ]


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in some languages."""
    return [block for page in NAMES for block in blocks(page) if block.language in languages]


def spans(page: str) -> list[str]:
    """Code within the text of a page."""
    text = re.sub(r"^( *)```.*?^\1```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text.replace("\\|", "|"))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block; variables stay as they are."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
