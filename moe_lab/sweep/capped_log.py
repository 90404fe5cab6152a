"""What a worker prints, in a file of bounded size: a router that prints for ever does not fill the disk."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from moe_lab.records import files, store

MOST_BYTES = 1 << 24
_FULL = f"\nmoe-lab: more than {MOST_BYTES >> 20} MiB were printed; the rest is left out\n".encode()


class CappedLog:
    """A context manager around the start of a process that gets `fileno` as its output; ends when nobody has it open.

    What was in the file before stays, and counts.
    """

    def __init__(self, path: Path):
        if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
            files.set_aside(path)  # a pipe would block, a folder cannot be written
        self._file = open(store.open_to_append(path), "ab", buffering=0)  # noqa: SIM115 - the thread closes it
        self._left = MOST_BYTES - os.fstat(self._file.fileno()).st_size
        self._read, self._write = os.pipe()
        # It sleeps unless something is printed, so it does not disturb what is timed.
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def fileno(self) -> int:
        """The end that is written to."""
        return self._write

    def __enter__(self) -> CappedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._write)
        self._thread.start()

    def join(self) -> None:
        """Wait until all that was printed is in the file; not for ever, for a child may have it open still."""
        self._thread.join(timeout=5)

    def _copy(self) -> None:
        with open(self._read, "rb", buffering=0) as pipe, self._file as file:
            while chunk := pipe.read(1 << 16):
                if self._left <= 0:
                    continue  # read all the same: else the process would wait
                last = len(chunk) >= self._left
                chunk, self._left = chunk[: self._left], self._left - len(chunk)
                if last:
                    chunk += _FULL
                try:
                    file.write(chunk)
                except OSError:  # a full disk or a read-only folder is no fault of the run
                    self._left = 0


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"
    return "it wrote no log"
