"""Where a sweep is, drawn: a bar on a terminal, plain lines elsewhere.

It draws when it is told something, between the steps of the worker: no thread of it runs while a block is timed.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from moe_lab.records.schema import Record
from moe_lab.terminal import Console

_STEP_S = 0.2  # the bar is drawn again no more often


class Reporter:
    """Counts cells done and failed; a context manager."""

    def __init__(self, n_cells: int, console: Console | None = None):
        self.n_cells, self.n_done, self.n_failed = n_cells, 0, 0
        self.console = console or Console(stderr=True, soft_wrap=True)
        self.begun, self._drawn = time.monotonic(), 0.0
        self._bar = self.make_bar(
            BarColumn(bar_width=20, table_column=Column(min_width=20)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{n_cells}/{n_cells}"))),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            expand=True,
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal or not n_cells,
        )
        self._task = self._bar.add_task("cells", total=n_cells, state="")

    def make_bar(self, *columns: Any, **options: Any) -> Progress:
        """What is drawn."""
        return Progress(*columns, **options)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """A line above the bar."""
        self.console.print(escape(text), style=style, highlight=False)

    def step(self, name: str, step: str, slot: str | None = None, group: int | None = None) -> None:
        """A cell comes to a step."""
        now = time.monotonic()
        if now - self._drawn < _STEP_S and step == "time":
            return
        self._drawn = now
        self.draw(f"{step} {name}")

    def draw(self, state: str) -> None:
        """Draw the bar anew."""
        self._bar.update(self._task, completed=self.n_done, state=f"{self._times()}  {state}", refresh=True)

    def idle(self, slot: str) -> None:
        """A slot has nothing to do."""

    def gone(self, slot: str) -> None:
        """A slot is out of service."""

    def end(self, name: str, record: Record, slot: str | None = None) -> None:
        """A cell ended, one way or another."""
        self.n_done += 1
        self.n_failed += record.status == "failed"
        result = f"{record.latency_ms.p50:.4g} ms" if record.latency_ms else ""
        line = f"[{self.n_done}/{self.n_cells}] {name}: {record.status}"
        if record.status == "failed":
            self.say(f"{line}: {record.reason} ({record.directory})", "red")
        elif not self.console.is_terminal:
            self.say(f"{line} {result} ({self._times()})" + (f" on {slot}" if slot else ""))

    def _times(self) -> str:
        elapsed = time.monotonic() - self.begun
        failed = f"{self.n_failed} failed, " if self.n_failed else ""
        left = f", about {clock(elapsed / self.n_done * (self.n_cells - self.n_done))} left" if self.n_done else ""
        return f"{failed}{clock(elapsed)}{left}"


def clock(seconds: float) -> str:
    """Minutes and seconds, 0:07."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
