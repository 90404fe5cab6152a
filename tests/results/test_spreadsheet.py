"""spreadsheet.py: text like a formula in a CSV file."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.cli.compare import to_csv
from moe_lab.results.aggregate import _csv
from moe_lab.results.spreadsheet import guarded, original

FIRST = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
TEXTS = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from(FIRST + "' 1a"))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name)
        for name, text in {
            "call": "=HYPERLINK(1)",
            "plus": "+1",
            "minus": "-2+3",
            "at": "@SUM(1)",
            "tab": "\t=1",
            "return": "\r=1",
            "line": "\n=1",
            "space": " =1",
            "wide": "\uff1d1",
            "apostrophe": "'=1",
        }.items()
    ],
)
def test_a_formula_begins_with_an_apostrophe(text: str) -> None:
    """A spreadsheet shows it."""
    assert guarded(text) == f"'{text}"
    assert original(guarded(text)) == text


@pytest.mark.parametrize("text", [pytest.param(text, id=text or "empty") for text in ("", "a=1", "'a", "1", "b-2")])
def test_other_text_stays(text: str) -> None:
    """Both ways."""
    assert guarded(text) == original(text) == text


@given(TEXTS)
def test_every_text_comes_back(text: str) -> None:
    """And none is left that a spreadsheet would compute."""
    assert original(guarded(text)) == text
    assert not guarded(text).startswith(tuple(FIRST))


@given(st.lists(st.tuples(TEXTS, st.none() | st.floats(allow_nan=False), st.integers(-(2**62), 2**62)), min_size=1))
def test_every_table_comes_back(rows: list[tuple[str, float | None, int]]) -> None:
    """Through the CSV of a sweep and that of a comparison: texts the same, numbers still numbers."""
    texts, floats, whole = map(list, zip(*rows, strict=True))
    table = pa.table({"t": pa.array(texts, pa.string()), "f": pa.array(floats, pa.float64()), "i": whole})
    written = _csv(table).decode()
    frame = pd.DataFrame({"t": texts, "f": floats, "i": whole})
    for content in (written, to_csv(frame)):
        back = list(csv.DictReader(io.StringIO(content, newline="")))
        assert [original(row["t"]) for row in back] == texts
        assert [float(row["f"]) if row["f"] else None for row in back] == floats
        assert [int(row["i"]) for row in back] == whole
        assert not any(row["t"].startswith(tuple(FIRST)) for row in back)
