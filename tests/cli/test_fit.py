"""cli/fit.py: which columns a width has room for, and that no number is broken in it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from moe_lab.cli.fit import Column, fit, lines


def drawn(columns: list[Column], width: int | None) -> tuple[list[str], list[str]]:
    """The lines of the table, and what is left out of it."""
    fitted = fit(columns, width)
    heading, rows = lines(fitted)
    return heading + [line for row in rows for line in row], fitted.left_out


NAMES, NUMBERS = ["torch", "expert_choice", "sinkhorn(temperature=0.25)"], ["1.23 [1.2, 1.3]", "12.3 [12, 13]", "-"]


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        pytest.param(None, ["variant", "p50 ms", "ratio", "error"], id="as_wide_as_it_needs"),
        pytest.param(64, ["variant", "p50 ms", "ratio", "error"], id="all"),
        pytest.param(44, ["variant", "p50 ms", "ratio"], id="names_folded"),
        pytest.param(30, ["variant", "p50 ms"], id="without_the_ratio"),
        pytest.param(10, ["variant", "p50 ms"], id="what_is_always_shown"),
    ],
)
def test_what_fits_is_shown_and_the_rest_is_named(width: int | None, headings: list[str]) -> None:
    """The lowest ranks stay; ranks of 1 and 2 may fold the names for it."""
    columns = [
        Column("variant", NAMES, is_name=True),
        Column("p50 ms", NUMBERS),
        Column("ratio", NUMBERS, rank=1),
        Column("error", ["1e-7"] * 3, rank=9),
    ]
    found, left_out = drawn(columns, width)
    assert [heading for heading in ("variant", "p50 ms", "ratio", "error") if heading not in left_out] == headings
    assert all(len(line) <= (width or 200) for line in found) or width == 10
    text = "\n".join(found)
    assert all(number in text for number in NUMBERS)


def test_a_name_is_folded_where_it_has_words() -> None:
    """Behind an underscore or a bracket; a number in it stays whole."""
    found, _ = drawn([Column("variant", NAMES, is_name=True), Column("p50", ["1", "2", "3"])], 18)
    assert found[1:] == ["torch            1", "expert_choice    2", "sinkhorn(        3", "temperature=", "0.25)"]


def test_a_control_character_counts_as_what_is_printed() -> None:
    """Else the columns behind it would be moved."""
    found, _ = drawn([Column("variant", ["a\x1b[2Jb", "c"], is_name=True), Column("p50", ["1", "2"])], None)
    assert found == ["variant   p50", r"a\x1b[2Jb   1", "c           2"]


def test_wide_characters_take_two_cells() -> None:
    """In names of folders."""
    found, _ = drawn([Column("variant", ["模型", "c"], is_name=True), Column("p50", ["1", "2"])], None)
    assert {cell_len(line) for line in found} == {11}


NUMBER = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: f"{value:.4g}")
TEXT = st.text("ab_/(,= ", max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    width=st.sampled_from([80, 120]),
    names=st.lists(st.tuples(TEXT, NUMBER, TEXT), min_size=1, max_size=3),
    numbers=st.lists(st.lists(NUMBER, min_size=3, max_size=3), min_size=1, max_size=7),
    ranks=st.lists(st.integers(1, 9), min_size=7, max_size=7),
)
def test_no_number_is_broken(
    width: int, names: list[tuple[str, str, str]], numbers: list[list[str]], ranks: list[int]
) -> None:
    """Those of the columns shown, and those in names, stand whole in one line each."""
    cells = [[f"{low} [{low}, {high}]" for low, high, _ in numbers]] * len(names)
    columns = [Column("variant", ["".join(name) for name in names], is_name=True)]
    columns += [
        Column(f"column {place}", [row[place % len(row)] for row in cells], rank=rank)
        for place, rank in enumerate(ranks[: len(numbers)])
    ]
    found, left_out = drawn(columns, width)
    text = "\n".join(found)
    for column in columns[1:]:
        assert column.heading in left_out or all(cell in text for cell in column.cells)
    for _, number, _ in names:
        assert re.search(rf"(?<![\d.]){re.escape(number.lstrip('-'))}(?![\d.])", text)
    assert all(len(line) <= width for line in found)
