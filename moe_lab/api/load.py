"""`moe_lab.load`: the records of a folder as pandas, which show what counts of their many columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.text import Text

from moe_lab.api.html_table import html_table
from moe_lab.cli import table
from moe_lab.cli.fit import Column
from moe_lab.results import load as loading
from moe_lab.results import numbers

_NAMES = ("variant", "model", "workload", "dtype", "device", "execution")
_SIZES = ("batch", "seq_len")
_MEASURED: tuple[tuple[str, str, str, Callable[..., str], int], ...] = (
    ("p50 [interval]", "latency_ms.", "p50", partial(numbers.with_interval, unit=" ms"), 0),
    ("ratio [interval]", "ratio_to_anchor.", "p50", numbers.with_interval, 1),
    ("bits/byte vs native [interval]", "quality.delta_bits_per_byte_", "", table.more_bits, 2),
)
"""Heading, how the names of the columns begin, which is the value, how it is written, and its rank (`fit.Column`)."""
_NEEDED = {*_NAMES, *_SIZES, "status", "latency_ms.p50"}


class Runs(pd.DataFrame):  # type: ignore[misc]
    """A row per run. Shown are the columns of the command line's table; a selection of it is plain pandas."""

    def _shown(self) -> list[Column]:
        columns = [Column(name, self._texts(name), is_name=True) for name in _NAMES if self[name].nunique() > 1]
        if not columns:
            columns = [Column("variant", self._texts("variant"), is_name=True)]
        columns += [Column(name, self._texts(name)) for name in _SIZES]
        for heading, start, value, text, rank in _MEASURED:
            columns.append(Column(heading, self._intervals(start, value, text), rank=rank))
        columns.append(Column("status", self._texts("status"), is_left=True, rank=3))
        return [column for column in columns if set(column.cells) != {"-"}]

    def _texts(self, name: str) -> list[str]:
        return ["-" if pd.isna(value) else str(value) for value in self[name]]

    def _intervals(self, start: str, value: str, text: Callable[..., str]) -> list[str]:
        """Of the columns with this value and the ends of its interval."""
        names = [f"{start}{value}".rstrip("_"), f"{start}ci95_low", f"{start}ci95_high"]
        rows = zip(*(self[name] if name in self else [None] * len(self) for name in names), strict=True)
        known = ([None if pd.isna(one) else one for one in row] for row in rows)
        return ["-" if row[0] is None else text(*row) for row in known]

    def _note(self) -> str:
        return f"{len(self)} runs, {len(self.columns)} columns: .columns lists them"

    def _is_whole(self) -> bool:
        return set(self) >= _NEEDED and len(self) > 0

    def __repr__(self) -> str:
        if not self._is_whole():
            return str(super().__repr__())
        return table.text_of(self._shown()) + self._note()

    def __rich__(self) -> Text:
        return Text(repr(self))

    def _repr_html_(self) -> Any:
        return html_table(self._shown(), [self._note()]) if self._is_whole() else super()._repr_html_()


def load(directory: str | Path) -> Runs:
    """One row per `result.json` under `directory`, at any depth, ordered by path: a pandas DataFrame.

    Columns (all of them in docs/results-format.md): the chosen option of each group, `batch`, `seq_len`, `seed`, the
    `variant` and the `setting_id` it is compared in, the configuration's values in which the records differ
    (`config.model.top_k`), the record's fields, nested ones joined by dots (`latency_ms.p50`), and `directory`. What
    the model does not read (`seq_len` for minimal) is missing.

    Raises:
        ValueError: the folder does not exist, or a record cannot be read; the message names every such file.
    """
    return Runs(loading.load(directory))
