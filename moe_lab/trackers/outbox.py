"""Sends the records of a sweep, or of a single run, to its trackers when it times nothing. Imports no torch.

A tracker never costs a result: a record is written first, and then sent by a process of its own (`sender`) with a time
limit. What a tracker did not get has a warning in its row; it is tried once more at the end, and whenever the command
of the sweep runs again. A tracker that failed is left alone until the end, so one that hangs costs its time limit twice
at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.records import store
from moe_lab.records.identity import digest
from moe_lab.records.schema import NOT_ENDED, NOT_SENT, Record
from moe_lab.trackers import message, notes
from moe_lab.trackers.message import Cell, Files, Sweep
from moe_lab.trackers.sender import Job, LostError, Sender
from moe_lab.trackers.tracker import Tracker, make, require_installed

_FILES = ("report.html", "plotly.min.js", "runs.csv", "summary.csv", "plots/*")
Say = Callable[[str], None]


@dataclass
class _Recipient:
    """A tracker, and why it is left alone."""

    name: str
    settings: dict[str, Any]
    tracker: Tracker
    was_there: bool
    """Whether what it keeps on this disk was there at the start: else earlier notes are of what is gone."""
    noted: set[Path] = field(default_factory=set)
    """The folders of what was sent since."""
    failed: str | None = None

    def is_sent(self, folder: Path, content: str) -> bool:
        """Whether it has this content of the folder."""
        is_noted = notes.is_sent(folder, self.name, self.tracker.destination, content)
        return is_noted and (self.was_there or folder in self.noted)

    def note(self, folder: Path, content: str) -> None:
        """It has it now. Raises `OSError`."""
        notes.add(folder, self.name, self.tracker.destination, content)
        self.noted.add(folder)


class Outbox:
    """All trackers of a sweep, or of a single run."""

    def __init__(self, settings: Mapping[str, Any] | None, folder: Path, *, is_sweep: bool):
        """`settings` is the configuration's `tracker`, `folder` that of the sweep or of the run.

        Raises:
            UnavailableError: the package of a tracker is not installed.
        """
        self.folder, self.is_sweep = folder, is_sweep
        self._recipients = []
        for name, node in (settings or {}).items():
            tracker = make(name, node, folder)
            was_there = tracker.keeps is None or tracker.keeps.exists()
            self._recipients.append(_Recipient(name, dict(node), tracker, was_there))
        for recipient in self._recipients:
            require_installed(recipient.name, recipient.tracker)
        self.names = [recipient.name for recipient in self._recipients]
        self._has_begun = False

    def begin(self, say: Say) -> None:
        """Reach every tracker, to `say` now if one is down. Only once: each batch of a search calls it."""
        if self._has_begun:
            return
        self._has_begun = True
        for recipient in self._recipients:
            self._talk(recipient, {}, say)

    def send(self, folders: Iterable[Path], say: Say, *, is_last: bool = False) -> None:
        """Send the records in these folders that were not sent. The sweep may time nothing meanwhile.

        With `is_last` trackers that failed are tried once more.
        """
        if not self._recipients:
            return
        records = _records(folders)
        for recipient in self._recipients:
            cells = {folder: _cell(record, folder) for folder, record in records.items()}
            left = {folder: cell for folder, cell in cells.items() if not recipient.is_sent(folder, cell.content)}
            if left and (recipient.failed is None or is_last):
                self._talk(recipient, left, say, is_last=is_last)
            for folder in left:  # what has no answer
                self._set_warning(folder, recipient.name, recipient.failed)

    def end(self, say: Say, *, is_complete: bool) -> None:
        """Send the files of the sweep. `is_complete`: every cell of the plan has its result."""
        for recipient in self._recipients:
            files = Files(self._files(), is_complete)
            if recipient.failed is None and not recipient.is_sent(self.folder, files.content):
                self._talk(recipient, {}, say, files, is_last=True)

    def _files(self) -> list[Path]:
        """What lies in the folder, and not elsewhere behind a link."""
        paths = [path for pattern in _FILES for path in sorted(self.folder.glob(pattern)) if path.is_file()]
        return [path for path in paths if path.resolve().is_relative_to(self.folder.resolve())]

    def _talk(
        self,
        recipient: _Recipient,
        left: dict[Path, Cell],
        say: Say,
        files: Files | None = None,
        *,
        is_last: bool = False,
    ) -> None:
        """Send it in one process. What the tracker answered for is noted, or has its warning, and leaves `left`."""
        recipient.failed = None
        try:
            key = notes.key_of(self.folder)
            for cell in left.values():
                cell.id = f"{cell.id}-{key}"
            sweep = Sweep(key, self.folder.absolute().name) if self.is_sweep else None
            job = Job(recipient.name, recipient.settings, self.folder, sweep, list(left.values()), files)
            with Sender(job, self.folder / store.TRACKERS_LOG, recipient.settings["timeout_s"]) as sender:
                for folder, cell in list(left.items()):
                    if (refused := sender.reply()) is None:
                        recipient.note(folder, cell.content)
                    else:
                        say(f"{NOT_SENT}{recipient.name}: {cell.name}: {refused}")
                    self._set_warning(folder, recipient.name, refused)
                    del left[folder]
                if files is not None:
                    if (refused := sender.reply()) is not None:
                        raise LostError(f"the files of the sweep: {refused}")
                    recipient.note(self.folder, files.content)
        except (LostError, OSError) as error:
            recipient.failed = str(error)
            say(f"{NOT_SENT}{recipient.name}: {error}; {self._remedy if is_last else 'tried again at the end'}")

    @property
    def _remedy(self) -> str:
        if self.is_sweep:
            return "run the same command again to send what is missing"
        return "the same command measures again, and sends the new record"

    def _set_warning(self, folder: Path, tracker: str, why: str | None) -> None:
        """Let the row say that this tracker has not got it; with None, no longer."""
        record = store.read_record(folder)
        start = f"{NOT_SENT}{tracker}: "
        texts = [text for text in record.warnings if not text.startswith(start)]
        if why is not None:
            texts.append(f"{start}{why}; {self._remedy}.")
        if texts != record.warnings:
            record.warnings = texts
            store.write_record(folder, record)


def _records(folders: Iterable[Path]) -> dict[Path, Record]:
    """The rows of the table, but for those that the sweep leaves out or runs again."""
    found = {folder: store.find_record(folder) for folder in folders}
    return {
        folder: record
        for folder, record in found.items()
        if record is not None and record.reason != "excluded" and not (record.reason or "").startswith(NOT_ENDED)
    }


def _cell(record: Record, folder: Path) -> Cell:
    content = message.of_record(record.to_dict())
    name = folder.absolute().name.removesuffix(f"-{record.cell_id}")
    is_ours = re.fullmatch("[0-9a-f]{12}", record.cell_id) is not None  # else it may mean something to a tracker
    return Cell(record.cell_id if is_ours else digest(record.cell_id), name, message.hash_of(content), content)
