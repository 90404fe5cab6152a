"""Where the steps of runs are executed: a worker process, or this one.

An engine is all that a sweep knows of the place. One on another machine (Ray, Slurm) is a class with these methods.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from moe_lab.config import targets
from moe_lab.sweep.capped_log import CappedLog

_TICK_S = 1.0  # how often a waiting parent looks whether it or the worker was stopped
START_S = 600.0  # importing torch and initialising a device from a cold disk


class CellFailedError(Exception):
    """A step of a cell failed; its record, written by then, says so."""

    def __init__(self, status: str, reason: str, lost_device: bool = False):
        super().__init__(status, reason, lost_device)
        self.status, self.reason, self.lost_device = status, reason, lost_device


class WorkerLostError(Exception):
    """The process ended or was ended in the middle of a step: `crash: SIGSEGV`, `timeout: verify`."""


class Engine(Protocol):
    """Executes the steps of a `Bench`, one at a time."""

    life: int
    """Grows whenever what was built before is gone."""

    @property
    def pid(self) -> int | None:
        """The process that executes the steps; None if there is none now, or if it is on another machine."""
        ...

    def call(self, step: str, *arguments: Any, timeout_s: float = START_S) -> Any:
        """The result of the `Bench`'s method `step`.

        Raises:
            CellFailedError: the cell's record was written.
            WorkerLostError: the process is gone; the next call starts another.
        """
        ...

    def settle(self, timeout_s: float) -> None:
        """After an interrupted call: wait for its step to end. Raises `WorkerLostError` if it does not."""
        ...

    def renew(self) -> None:
        """Go on in a fresh process."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


class Worker:
    """One worker process, started when first needed and replaced when lost. It dies with this process."""

    def __init__(self, log: Path | None = None, environment: Mapping[str, str] | None = None):
        self.life = 0
        self.log = log  # where its standard output and error go
        self.environment = environment  # of the process, if not this one's
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._output: CappedLog | None = None
        self._pending: str | None = None  # the step whose reply has not been read

    @property
    def pid(self) -> int | None:
        """See `Engine.pid`."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process without waiting for it."""
        parent_end, worker_end = socket.socketpair()
        self._output = CappedLog(self.log) if self.log is not None else None
        with worker_end, self._output or open(os.devnull, "wb") as output:
            log = output.fileno()
            # -P: the current directory is not a place to import from. -u: what was printed is in the log before a kill.
            # A session of its own: Ctrl-C is for the parent.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "moe_lab.sweep.worker", str(worker_end.fileno()), str(os.getpid())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self._connection = Connection(parent_end.detach())
        self._connection.send(targets.trusted())
        self._pending = "start"

    def call(self, step: str, *arguments: Any, timeout_s: float = START_S) -> Any:
        """See `Engine.call`."""
        if self._process is None:
            self.start()
        assert self._connection is not None
        if self._pending == "start":
            self._receive(START_S)  # not the step's time
        self._pending = step
        try:
            self._connection.send((step, arguments, timeout_s))
        except OSError as error:
            raise WorkerLostError(self._end()) from error
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        """The reply to the pending step."""
        assert self._connection is not None
        try:
            if not self._comes(timeout_s):
                lost = WorkerLostError(f"timeout: {self._pending}")
                self.close()
                raise lost
            with _without_interrupts():  # half a message would be the end of the conversation
                kind, reply = self._connection.recv()
                self._pending = None
        except (EOFError, OSError) as error:
            raise WorkerLostError(self._end()) from error
        if kind == "ok":
            return reply
        if isinstance(reply, CellFailedError) and reply.lost_device:
            self.close()
        raise reply

    def _comes(self, timeout_s: float) -> bool:
        """Whether a reply comes within this time; that in which this process or the worker was stopped is not counted.

        A tick counts as one however long it took: SIGSTOP, Ctrl-Z or a suspended machine make it long.
        """
        assert self._connection is not None and self._process is not None
        left = timeout_s
        while left > 0:
            tick = min(_TICK_S, left)
            if self._connection.poll(tick):
                return True
            if not _is_stopped(self._process.pid):
                left -= tick
        return self._connection.poll(0)  # it may have come while this process was stopped

    def settle(self, timeout_s: float) -> None:
        """See `Engine.settle`."""
        if self._pending is not None:
            with suppress(CellFailedError):
                self._receive(timeout_s)

    def _end(self) -> str:
        """Why the process ended by itself."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.close()
        return _crash(code)

    def renew(self) -> None:
        """See `Engine.renew`."""
        self.close()
        self.start()

    def close(self) -> None:
        """See `Engine.close`."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session: what a router or a compiler started too
        self._process.wait()
        if self._output is not None:
            self._output.join()
        self._process = self._connection = self._pending = None
        self.life += 1


def _crash(code: int) -> str:
    """The reason of a record whose worker ended with this code."""
    if code == -signal.SIGKILL:
        return "crash: SIGKILL (killed by signal 9; out of memory?)"
    return f"crash: {signal.Signals(-code).name}" if code < 0 else f"crash: exit code {code}"


def _is_stopped(process: int) -> bool:
    """Whether a signal or a debugger stopped the process; False where there is no /proc."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
