"""A folder of a sweep with records, as it is when a group has ended."""

from __future__ import annotations

from pathlib import Path

from benchmarks import synthetic
from moe_lab.records import store
from moe_lab.trackers.outbox import Outbox
from tests.trackers import readers


class Sweep:
    """Some cells in `folder`/outputs/s; trackers keep their things in `folder`."""

    def __init__(self, folder: Path, n_cells: int = 2):
        self.folder, self.said = folder, list[str]()
        self.directory = folder / "outputs" / "s"
        self.cells = synthetic.sweep(self.directory, n_cells)

    def outbox(self, tracker: str, **settings: object) -> Outbox:
        """As a sweep that begins has it."""
        return Outbox(readers.settings_of(tracker, self.folder, **settings), self.directory, is_sweep=True)

    def say(self, text: str) -> None:
        """What a person at the terminal sees."""
        self.said.append(text)

    def cell_ids(self) -> list[str]:
        """Of all cells, sorted."""
        return sorted(store.read_record(folder).cell_id for folder in self.cells)

    def warnings(self) -> list[list[str]]:
        """Of each cell, about trackers."""
        return [
            [text for text in store.read_record(folder).warnings if text.startswith("not sent")]
            for folder in self.cells
        ]
