"""Results that show themselves in a REPL and in a notebook: a short table, not everything that they hold."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from moe_lab.api.html_table import html_table
from moe_lab.cli import table
from moe_lab.records import variants
from moe_lab.records.schema import Record
from moe_lab.terminal import printable

if TYPE_CHECKING:
    import pandas as pd


class Result(Record):
    """A record that shows itself: status, latency, ratio, quality, warnings and where it lies."""

    @classmethod
    def of(cls, record: Record) -> Result:
        """The same record."""
        return cls(**vars(record))

    def _lines(self) -> list[tuple[str, str]]:
        """What is known of the run, by name."""
        if {"model", "router", "batch", "seq_len"} <= self.config.keys():
            (model,) = table.lines([self])
            shown = [(key, model.settings[key]) for key in ("model", "workload", "dtype", "device")]
            run = [(column.heading, column.cells[0]) for column in table.columns_of_runs([self])]
            shown = [run[-1], *shown, *run[:-1]]
        else:
            shown = [("status", self.status)]
        known = [(name, text) for name, text in shown if text != "-"]
        known += [("reason", self.reason)] if self.reason else []
        known += [("warning", warning) for warning in self.warnings]
        known += [("directory", str(self.directory))] if self.directory else []
        return [(name, printable(text)) for name, text in known]

    def __repr__(self) -> str:
        lines = self._lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines)

    def __rich__(self) -> Text:
        return Text(repr(self))

    def _repr_html_(self) -> str:
        rows = [
            f'<tr><th style="text-align: left">{html.escape(name)}</th>'
            f'<td style="text-align: left">{html.escape(text)}</td></tr>'
            for name, text in self._lines()
        ]
        return f"<table>{''.join(rows)}</table>"


class Results:
    """The records of a sweep, in the order of the command. It is shown as the table that the command line prints.

    `records` are the cells, `directory` is their folder, `page` the report page (None with sweep.report=false).
    """

    def __init__(
        self,
        directory: Path,
        records: Sequence[Record],
        compare: Sequence[str] = variants.COMPARE,
        anchor: Mapping[str, Any] | None = None,
        page: Path | None = None,
    ):
        self.directory, self.page = directory, page
        self.records = [Result.of(record) for record in records]
        self._compare, self._anchor = compare, anchor

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.records)

    def __getitem__(self, place: int) -> Result:
        return self.records[place]

    @property
    def failed(self) -> list[Result]:
        """The cells that failed; `reason` says why."""
        return [record for record in self.records if record.status == "failed"]

    @property
    def frame(self) -> pd.DataFrame:
        """A row per record, as `moe_lab.load` gives them, of these cells only."""
        from moe_lab.api.load import load

        found = load(self.directory)
        return type(found)(found[found["cell_id"].isin([r.cell_id for r in self.records])].reset_index(drop=True))

    def __repr__(self) -> str:
        written = io.StringIO()
        table.print_sweep(self.records, self._compare, self._anchor, f"{self.directory}/runs.csv has them", written)
        return written.getvalue() + str(self.page or self.directory)

    def __rich__(self) -> Text:
        return Text(repr(self))

    def _repr_html_(self) -> str:
        lines = table.lines(
            [record for record in self.records if record.reason != "excluded"], self._compare, self._anchor
        )
        failed = [f"{record.directory}: {record.reason}" for record in self.failed]
        return html_table(table.columns(lines), [*failed, str(self.page or self.directory)])
