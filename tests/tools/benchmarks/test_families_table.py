"""The table of model families: every cell of the docs', and the command that makes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import BEGIN, COLUMNS, END, KEPT, grow_module, write_into
from benchmarks.family_list import FAMILIES, Family
from check_families import main
from ds_sparkling.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
#: OLMoE's norms of queries and keys have sizes that follow from its hidden width.
REFUSED = {("OLMoE", "heads")}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_plain_modules_keep_their_function_along_every_axis(family: Family) -> None:
    families.quiet()
    grown = {column: cell for column in COLUMNS if (cell := grow_module(family, column)) is not None}
    assert {"hidden", "vocabulary"} <= grown.keys()
    for column, cell in grown.items():
        if (family.name, column) in REFUSED:
            assert "in model.layers.0.self_attn.q_norm (OlmoeRMSNorm)" in cell.refusal
        else:
            assert cell.differences["module"] <= KEPT, column


def test_the_table_in_the_docs_is_whole() -> None:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert rows[0] == ["family", *COLUMNS]
    assert [row[0].removesuffix(" (AutoEP)") for row in rows[2:]] == [family.name for family in FAMILIES]
    for row, family in zip(rows[2:], FAMILIES, strict=True):
        assert row[0].endswith("(AutoEP)") is (family.preset is not None)
        for column, cell in zip(COLUMNS, row[1:], strict=True):
            figures = re.findall(r"\d(?:e-\d)?", cell.partition("(")[0])
            if (family.name, column) in REFUSED:
                assert cell == "refused [1]"
            elif cell != "-":
                assert len(figures) == 3
                assert all(float(figure) <= KEPT for figure in figures)


def test_the_command_grows_engines_and_files_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    main(["GPT-2", "--write", str(page)])
    table = capsys.readouterr().out
    assert re.search(r"\| GPT-2 \| (\de-\d / ){2}\de-\d \(with heads\) \|.*\| 0 / 0 / 0 \|", table)
    assert page.read_text() == f"above\n{BEGIN}\n\n{table}\n{END}\nbelow\n"


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["Nothing"])
    assert "unknown family 'Nothing'; known: Qwen3-MoE" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ConfigError, match="no lines"):
        write_into(tmp_path / "page.md", "table")
