"""Tables as lines of plain text."""

from __future__ import annotations

from ds_sparkling.text_tables import text_table


def test_columns_line_up_to_the_side_that_is_asked_for() -> None:
    rows = [("", "loss", "note"), ("grown", "1.5", "a"), ("x", "10.25", "")]
    assert text_table(rows, left=[0, 2], indent=" ") == [
        "         loss  note",
        " grown    1.5  a",
        " x      10.25",
    ]
    assert text_table([("a", "b")]) == ["a  b"]
