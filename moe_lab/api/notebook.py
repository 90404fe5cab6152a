"""The progress of a sweep in a notebook: a bar, in place of a line for each cell."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from moe_lab.cli.progress import Terminal
from moe_lab.cli.reporter import Reporter
from moe_lab.records.schema import Record


def progress() -> Terminal:
    """What shows where a sweep is, in a notebook or elsewhere."""
    return Notebook() if in_notebook() else Terminal()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class Notebook(Terminal):
    """As `Terminal`, but for the bar."""

    def reporter(self, n_cells: int, slots: Sequence[str] = ()) -> Reporter:
        """A bar for this many cells; with several slots lines."""
        return super().reporter(n_cells, slots) if slots else NotebookReporter(n_cells)


class NotebookReporter(Reporter):
    """Draws one bar over and over; a failure is a line."""

    _shown: Any = None

    def __enter__(self) -> Self:
        from IPython.display import display

        if self.n_cells:
            self._shown = display({"text/plain": ""}, raw=True, display_id=True)
            self.draw("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.draw("" if error is None else "stopped")

    def draw(self, state: str) -> None:
        """Draw the bar anew."""
        if self._shown is None:
            return
        text = f"{self.n_done}/{self.n_cells} {self._times()}  {state}".rstrip()
        bar = f'<progress value="{self.n_done}" max="{self.n_cells}"></progress> <code>{html.escape(text)}</code>'
        self._shown.update({"text/plain": text, "text/html": bar}, raw=True)

    def end(self, name: str, record: Record, slot: str | None = None) -> None:
        """A cell ended, one way or another."""
        self.n_done += 1
        self.n_failed += record.status == "failed"
        if record.status == "failed":
            self.say(f"{name}: failed: {record.reason} ({record.directory})")
        self.draw("")
