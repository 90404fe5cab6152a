"""Who runs what at the moment, in files of the sweep's folder that `moe-lab status` reads. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_lab.records import files, store

FOLDER = ".slots"
GONE = "gone"
"""The step of a slot that is out of service."""


@dataclass
class Standing:
    """What a slot does. Times are seconds since 1970."""

    slot: str
    begun: float
    """When its sweep began."""
    updated: float
    group: int | None = None
    cell: str | None = None
    """The name of the cell's folder."""
    step: str | None = None
    note: str = ""
    """What the scheduler calls it there: the number of a job."""
    n_done: int = 0
    n_failed: int = 0


class Board:
    """Writes what each slot does; a context manager that removes it all at the end.

    The files are renamed and not flushed to the disk: after a crash of the machine they say nothing anyway.
    """

    def __init__(self, directory: Path):
        self._folder = directory / FOLDER
        self._slots: dict[str, Standing] = {}
        self._begun = time.time()

    def __enter__(self) -> Board:
        for left in _files(self._folder):  # of a driver that was killed
            left.unlink(missing_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a folder that became read-only: the sweep's own error tells
            for name in self._slots:
                self._file(name).unlink(missing_ok=True)
            store.remove_empty([self._folder])

    def at(self, slot: str, group: int | None, cell: str | None, step: str | None, note: str = "") -> None:
        """A slot comes to a step of a cell, or has nothing to do."""
        is_new, standing = slot not in self._slots, self._of(slot)
        if (group, cell, step) == (standing.group, standing.cell, standing.step) and not (note or is_new):
            return
        standing.group, standing.cell, standing.step = group, cell, step
        standing.note = note or standing.note
        self._write(standing)

    def ended(self, slot: str, *, is_failed: bool) -> None:
        """A cell has its record."""
        standing = self._of(slot)
        standing.n_done += 1
        standing.n_failed += is_failed
        self._write(standing)

    def gone(self, slot: str) -> None:
        """A slot is out of service; what it did counts."""
        if slot in self._slots:
            self.at(slot, None, None, GONE)

    def _of(self, slot: str) -> Standing:
        return self._slots.setdefault(slot, Standing(slot, self._begun, self._begun))

    def _file(self, slot: str) -> Path:
        return self._folder / f"{slot}.json"

    def _write(self, standing: Standing) -> None:
        standing.updated = time.time()
        path = self._file(standing.slot)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with suppress(OSError):  # a full disk: the record of the cell will tell
            store.own_folder(self._folder)
            temporary.write_text(json.dumps(dataclasses.asdict(standing)))
            os.replace(temporary, path)


def read(directory: Path) -> list[Standing]:
    """What each slot of a sweep does, by name; what cannot be read is left out."""
    found = []
    for path in _files(directory / FOLDER):
        with suppress(OSError, ValueError, TypeError):
            found.append(Standing(**files.read_json(path)))
    return sorted(found, key=lambda standing: standing.slot)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.json") if not path.name.startswith("."))
