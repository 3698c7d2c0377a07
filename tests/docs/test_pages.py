"""The pages as a whole: what they name exists, what is made from the code is as the code is, and the site builds."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ds_sparkling
import ds_sparkling.integrations
import make_docs
from docs_pages import NAMES, ROOT, spans


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text()) <= 13_000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_files_named_exist() -> None:
    named = [
        (page, span)
        for page in NAMES
        for span in spans(page)
        if re.fullmatch(r"(?:ds_sparkling|docs|tests|tools|configs)/[\w./-]*", span)
    ]
    assert len(named) > 30
    for page, path in named:
        assert (ROOT / path).exists() or re.search(r"NAME", path), f"{page}: {path}"


def test_the_strategies_table_has_every_file() -> None:
    page = (ROOT / "docs" / "guide" / "strategies.md").read_text()
    files = {path.name for path in (ROOT / "configs" / "strategies").glob("*.json")}
    assert set(re.findall(r"^\| `([\w-]+\.json)`", page, re.MULTILINE)) == files


@pytest.mark.parametrize("page", make_docs.MADE)
def test_what_is_made_from_the_code_is_as_the_code_is(page: str) -> None:
    """Else run python tools/make_docs.py."""
    assert make_docs.made(page) == (make_docs.DOCS / page).read_text()


def test_every_public_name_is_in_the_reference() -> None:
    documented = [name for names in make_docs.SECTIONS.values() for name in names]
    assert sorted(documented) == sorted(ds_sparkling.__all__)
    assert sorted(make_docs.INTEGRATIONS) == sorted(ds_sparkling.integrations.__all__)


def test_functions_named_on_the_architecture_page_exist() -> None:
    rooms = {path.stem for path in (ROOT / "ds_sparkling").iterdir()}
    named = {
        span
        for span in spans("docs/concepts/architecture.md")
        if re.fullmatch(r"\w+(?:\.\w+)+", span) and span.split(".")[0] in rooms
    }
    assert len(named) > 40
    for name in sorted(named):
        pkgutil.resolve_name(f"ds_sparkling.{name}")


def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere fails. Nothing in it is fetched from elsewhere by who reads it."""
    nowhere = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "all")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:")
    for page in tmp_path.rglob("*.html"):
        assert not fetched.search(page.read_text()), page
