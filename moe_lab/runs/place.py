"""The folder of a single run from its begin to its end: a run that is killed leaves a record, a mistake leaves none."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from moe_lab.records import store
from moe_lab.records.held import held
from moe_lab.records.schema import Record


class Place(ExitStack):
    """Keeps an earlier result while a run is under way. A context manager: inside, no other run uses the folder.

    Raises:
        ValueError: on entering, if another run does.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder
        self._is_new = False
        self._earlier: Record | None = None
        self._stale = ""
        self.unreadable: Path | None = None
        """The new name of an earlier result that could not be read."""

    def __enter__(self) -> Place:
        super().__enter__()
        self._is_new = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.enter_context(held(self._folder))
        self.unreadable = store.set_aside_unreadable(self._folder)
        with suppress(FileNotFoundError):
            self._earlier = store.read_record(self._folder)
            self._stale = store.set_aside(self._folder, self._earlier)
        return self

    def begin(self, record: Record) -> None:
        """Write the record that stands if the run is killed."""
        store.remove(self._folder)  # what a run left that has no record
        store.write_record(self._folder, record)

    def withdraw(self) -> None:
        """All as before: a mistake is not a run."""
        store.remove(self._folder)
        if self._earlier is not None:
            store.put_back(self._folder, self._stale)
        elif self.unreadable is not None:
            self.unreadable.rename(self._folder / store.RESULT)
        elif self._is_new:
            with suppress(OSError):  # Hydra's own files are in it
                self._folder.rmdir()

    def end(self, record: Record) -> None:
        """The record was written: an earlier one of the same identity goes, unless it is better."""
        earlier = self._earlier
        if earlier is None or (earlier.status == "ok" and record.status != "ok"):
            return
        identities = [(one.cell_id, one.code_id, one.env_id or record.env_id) for one in (earlier, record)]
        lost = earlier.agreement is not None and record.agreement is None  # the comparison with another router
        for name in (store.TRACE, store.TIMELINE):
            lost |= (self._folder / f"{self._stale}{name}").exists() and not (self._folder / name).exists()
        if identities[0] == identities[1] and not lost:
            store.remove(self._folder, self._stale)
