"""Columns side by side in the width of a terminal: names are folded, numbers never; what does not fit is named."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from rich.cells import cell_len, chop_cells

from moe_lab.terminal import printable

_LEAST_NAME, _READABLE_NAME, _MOST_LINES = 8, 30, 4
_FOLDS_NAMES = 2
_WORDS = r"[^\s_/(,=]*[\s_/(,=]*"  # a name is folded behind these
_NUMBER = r"[+-]?\d[\d.]*(?:[eE][+-]?\d+)?"


class Column(NamedTuple):
    """Texts under a heading."""

    heading: str
    cells: Sequence[str]
    is_name: bool = False
    """Names may be folded. All else is a number, or as short."""
    is_left: bool = False
    """On the left of its column, as names are."""
    rank: int = 0
    """0: always shown. Else the smallest are, as many as fit; only for ranks of 1 and 2 names are folded."""


class Fitted(NamedTuple):
    """What fits."""

    columns: list[Column]
    widths: list[int]
    left_out: list[str]
    """The headings of the others."""


def fit(columns: Sequence[Column], width: int | None) -> Fitted:
    """The columns of a table that is `width` wide (None: as wide as it needs).

    What is always shown may need more than that; its numbers are not broken then either.
    """
    columns = [column._replace(cells=[_clean(cell) for cell in column.cells]) for column in columns]
    if width is None:
        return Fitted(columns, [_natural(column) for column in columns], [])
    shown = [column for column in columns if column.rank == 0]
    for column in sorted((column for column in columns if column.rank), key=lambda column: column.rank):
        folds = column.rank <= _FOLDS_NAMES
        if sum(_least(one, folds) + 1 for one in (*shown, column)) - 1 <= width:
            shown.append(column)
    shown = [column for column in columns if column in shown]
    widths = [_least(column, True) for column in shown]
    free = width - sum(widths) - len(widths) + 1
    for place in sorted(range(len(shown)), key=lambda place: not shown[place].is_name):  # names first
        more = max(0, min(free, _natural(shown[place]) - widths[place]))
        widths[place] += more
        free -= more
    return Fitted(shown, widths, [column.heading for column in columns if column not in shown])


def lines(fitted: Fitted) -> tuple[list[str], list[list[str]]]:
    """Those of the heading, and those of each row."""
    heading = [folded(column.heading, width, r"\S+\s*") for column, width in _pairs(fitted)]
    cells = [
        [folded(cell, width) if column.is_name else [cell] for cell in column.cells] for column, width in _pairs(fitted)
    ]
    height = max(map(len, heading), default=0)
    heading = [[""] * (height - len(words)) + words for words in heading]  # beside the first row
    return _side_by_side(heading, fitted), [_side_by_side(row, fitted) for row in zip(*cells, strict=True)]


def _side_by_side(row: Sequence[Sequence[str]], fitted: Fitted) -> list[str]:
    """One row, of which a cell may have several lines."""
    result = []
    for parts in zip_longest(*row, fillvalue=""):
        line = ""
        for text, (column, width) in zip(parts, _pairs(fitted), strict=True):
            blank = " " * (width - cell_len(text))
            line += (text + blank if column.is_name or column.is_left else blank + text) + " "
        result.append(line.rstrip())
    return result


def _pairs(fitted: Fitted) -> list[tuple[Column, int]]:
    return list(zip(fitted.columns, fitted.widths, strict=True))


def _clean(text: str) -> str:
    return " ".join(printable(text).split())


def _natural(column: Column) -> int:
    return max(cell_len(text) for text in (column.heading, *column.cells))


def _least(column: Column, folds: bool) -> int:
    """The width without which a number, a word of the heading or, unless it folds, a readable name would be broken."""
    heading = max(map(cell_len, column.heading.split()))
    if not column.is_name:
        return max(heading, *map(cell_len, column.cells), 0)
    natural = _natural(column)
    name = max(_LEAST_NAME, math.ceil(natural / _MOST_LINES)) if folds else _READABLE_NAME
    numbers = (len(number) for cell in column.cells for number in re.findall(_NUMBER, cell))
    return max(heading, min(name, natural), *numbers)


def folded(text: str, width: int, words: str = _WORDS) -> list[str]:
    """Lines of at most `width`, broken between the words; in a longer word before and behind its numbers."""
    parts: list[str] = []
    for word in filter(None, re.findall(words, text)):
        if cell_len(word.rstrip()) <= width:
            parts.append(word)
            continue
        for part in filter(None, re.split(f"({_NUMBER})", word)):
            cut = chop_cells(part.rstrip(), width)
            parts += [*cut[:-1], (cut[-1] if cut else "") + part[len(part.rstrip()) :]]
    lines = [""]
    for part in parts:
        if cell_len(lines[-1] + part.rstrip()) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return [line.rstrip() for line in lines if line.rstrip()]
