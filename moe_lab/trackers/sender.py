"""The process that talks to a tracker, for one sending: `python -m moe_lab.trackers.sender FD PARENT`.

Trackers have threads, retries and helpers of their own. In a process that is gone afterwards none of them runs beside a
timed block of the same sweep (another one may time its own), and one that hangs can be ended. Both sides of the
conversation are here; neither imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from moe_lab.config.addresses import without_secrets
from moe_lab.records import store
from moe_lab.trackers.message import Cell, Files, Sweep
from moe_lab.trackers.tracker import make

_START_S = 120.0  # importing the tracker's package from a cold disk
_END_S = 5.0  # what a tracker does after all was sent
_PR_SET_PDEATHSIG = 1
_ALONE = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # nobody but the tracker is told of this use


@dataclass
class Job:
    """What one sending is about."""

    tracker: str
    settings: dict[str, Any]
    folder: Path
    sweep: Sweep | None
    cells: Sequence[Cell]
    files: Files | None
    """At the end of a sweep."""


class LostError(Exception):
    """The tracker cannot be reached, or the process ended or was ended."""


class Sender:
    """The outbox's side. A context manager: afterwards the process is gone."""

    def __init__(self, job: Job, log: Path, timeout_s: float):
        self._job, self._log, self._timeout_s = job, log, timeout_s

    def __enter__(self) -> Self:
        """Start the process and wait until the tracker answers. Raises `LostError`, or `OSError`: it cannot start."""
        own = make(self._job.tracker, self._job.settings, self._job.folder).environment
        environment = {**os.environ, **_ALONE, **own}
        ours, theirs = socket.socketpair()
        with theirs, open(store.open_to_append(self._log, os.O_TRUNC), "wb") as log:
            # -P: the current directory is not a place to import from. A session of its own: Ctrl-C is for the parent.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moe_lab.trackers.sender", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in environment.items() if value is not None},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.send(self._job)
            self.reply(_START_S)
            if (refused := self.reply()) is not None:
                raise LostError(refused)
        except BaseException:
            self._end()
            raise
        return self

    def reply(self, timeout_s: float | None = None) -> str | None:
        """The next reply: None, or why a step failed. Raises `LostError`."""
        timeout_s = timeout_s or self._timeout_s
        try:
            if not self._connection.poll(timeout_s):
                raise LostError(f"no answer within {timeout_s:g} s")
            refused: str | None = self._connection.recv()
        except (EOFError, ConnectionError):
            raise LostError(f"its process ended; see {self._log}") from None
        return refused

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self._end()

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """Do the job, and tell of each step."""
    job: Job = connection.recv()
    tracker = make(job.tracker, job.settings, job.folder)
    for module in tracker.needs:
        __import__(module)  # the time of this is not the tracker's
    connection.send(None)
    refused = _tried(tracker.begin, job.sweep)
    connection.send(refused)
    if refused is not None:
        return
    for cell in job.cells:
        connection.send(_tried(tracker.send, cell))
    if job.files is not None:
        connection.send(_tried(tracker.end, job.files))


def _tried(step: Any, argument: Any) -> str | None:
    """None, or why it failed, in a line: one record that a tracker refuses does not hold up the others."""
    try:
        step(argument)
    except Exception as error:
        # No password of an address: the log is beside the records, and the line will stand in one.
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
        line = (without_secrets(str(error)).strip().splitlines() or [""])[0].rstrip(".")
        return f"{type(error).__name__}: {line[:300]}"
    return None


if __name__ == "__main__":
    if sys.platform == "linux":  # a second one, of the sweep that is started again, would send the same
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(sys.argv[2]):
        _serve(Connection(int(sys.argv[1])))
