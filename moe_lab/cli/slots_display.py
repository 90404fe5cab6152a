"""How a sweep on several slots tells where it is: a line for each slot below the bar, or plain lines.

As for one worker (`cli.reporter`) it draws when it is told something.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from moe_lab.cli.reporter import Reporter
from moe_lab.records.schema import Record
from moe_lab.terminal import Console

_LINES_OF_OTHERS = 4  # the bar, the line of what is left out, and room to breathe


@dataclass
class _Row:
    doing: str = "starts"
    group: str = ""
    n_done: int = 0
    n_failed: int = 0


class SlotsReporter(Reporter):
    """Counts cells done and failed, by slot too; a context manager."""

    def __init__(self, n_cells: int, slots: Sequence[str], console: Console | None = None):
        self.rows = defaultdict(_Row, {slot: _Row() for slot in slots})
        super().__init__(n_cells, console)

    def make_bar(self, *columns: object, **options: object) -> Progress:
        """See `Reporter.make_bar`: the bar, and a table below it."""
        reporter = self

        class Bar(Progress):
            def get_renderables(self) -> Iterable[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                yield reporter.table()

        return Bar(*columns, **options)  # type: ignore[arg-type]

    def step(self, name: str, step: str, slot: str | None = None, group: int | None = None) -> None:
        """A cell comes to a step."""
        if slot is not None:
            row = self.rows[slot]
            row.doing, row.group = f"{step} {name}", f"group {group}" if group is not None else ""
        self.draw("")

    def end(self, name: str, record: Record, slot: str | None = None) -> None:
        """A cell ended, one way or another."""
        if slot is not None:
            row = self.rows[slot]
            row.n_done += 1
            row.n_failed += record.status == "failed"
        super().end(name, record, slot)

    def idle(self, slot: str) -> None:
        """A slot has nothing to do."""
        self.rows[slot].doing, self.rows[slot].group = "waits", ""

    def gone(self, slot: str) -> None:
        """A slot is out of service."""
        self.rows[slot].doing, self.rows[slot].group = "out of service", ""

    def table(self) -> Table:
        """A line for each slot, as many as the terminal has room for."""
        columns = (Column(no_wrap=True), Column(no_wrap=True), Column(no_wrap=True, ratio=1), Column(no_wrap=True))
        table = Table.grid(*columns, padding=(0, 2))
        most = max(self.console.height - _LINES_OF_OTHERS, 1)
        minutes = max(time.monotonic() - self.begun, 1e-9) / 60
        for slot, row in list(self.rows.items())[:most]:
            failed = f", {row.n_failed} failed" if row.n_failed else ""
            rate = f"{row.n_done} done{failed}, {row.n_done / minutes:.3g}/min"
            table.add_row(*(Text(text) for text in (slot, row.group, row.doing, rate)))
        if (n_more := len(self.rows) - most) > 0:
            table.add_row(Text(f"{n_more} more slots (moe-lab status shows them)"))
        return table
