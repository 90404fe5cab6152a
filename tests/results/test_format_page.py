"""results/format_page.py: docs/results-format.md has the tables of the schema."""

from __future__ import annotations

import pytest

from moe_lab.records.fields import Field
from moe_lab.results import format_page
from moe_lab.results.columns import TABLES
from tests import tiny

PAGE = (tiny.ROOT / format_page.PAGE).read_text()


def test_the_page_in_docs_is_what_is_made() -> None:
    """Else: python -m moe_lab.results.format_page."""
    assert format_page.page(PAGE) == PAGE


def test_a_changed_meaning_changes_its_row_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the prose nor another table."""
    first, *others = TABLES["unreadable"]
    monkeypatch.setitem(TABLES, "unreadable", (first._replace(unit="m", meaning="of that"), *others))
    before, after = PAGE.splitlines(), format_page.page(PAGE).splitlines()
    assert [line for line in after if line not in before] == ["| `path` | text | m | of that |"]
    assert len(after) == len(before)


def test_a_column_more_is_a_row_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its place."""
    monkeypatch.setitem(TABLES, "unreadable", (*TABLES["unreadable"], Field("sizes", list[float], "B", "of all")))
    before, after = PAGE.split("\n## What commands print", 1)  # the section behind the last table
    row = "| `sizes` | list of float | B | of all |\n"
    assert format_page.page(PAGE) == f"{before}{row}\n## What commands print{after}"


def test_a_page_without_a_table_is_refused() -> None:
    """The message names the heading."""
    with pytest.raises(ValueError, match="## samples"):
        format_page.page(PAGE.replace("## samples", "## others"))
