"""Benchmarks that share a machine in turns: each prepares beside the others, and stops them while it times.

Each is a process group with a file in a common folder, named by the group's id, which the kernel keeps locked while the
process lives. A stopped process keeps its memory, and what it had launched on a GPU goes on for a moment: whoever times
waits until the GPU is quiet.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO


class Turns:
    """The turns of this process, which leads a process group from here on. Without a folder it is alone."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        with _locked(folder / "turn"):  # who comes in another's turn would disturb it
            self._own = _locked(folder / str(os.getpid()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the others are stopped; one that wants a turn too waits for its own."""
        if self.folder is None:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(_locked(self.folder / "turn"))
            if groups := self._others():
                stack.enter_context(_waking(groups))
                stack.callback(self._note_since, time.perf_counter())
                for group in groups:
                    _stop(group)
            yield

    def clock(self) -> float:
        """Seconds, without those of the turns that have ended; a turn whose process was killed counts."""
        turns = self.folder / "seconds" if self.folder is not None else None
        noted = turns.read_text().split() if turns is not None and turns.exists() else []
        return time.perf_counter() - sum(map(float, noted))

    def _note_since(self, begun: float) -> None:
        """Before the others go on: they may look at the clock at once."""
        assert self.folder is not None
        with open(self.folder / "seconds", "a") as file:
            print(time.perf_counter() - begun, file=file)

    def _others(self) -> list[int]:
        """The groups of the processes that live; the file of one that has ended is removed."""
        assert self.folder is not None
        groups = []
        for path in self.folder.glob("[0-9]*"):
            if int(path.name) == os.getpid():
                continue
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    groups.append(int(path.name))
        return groups


def _locked(path: Path) -> IO[str]:
    """The open file, locked as soon as nobody else has it locked."""
    file = open(path, "w")  # noqa: SIM115 its lock lasts until it is closed
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


@contextmanager
def _waking(groups: list[int]) -> Iterator[None]:
    """The groups go on afterwards, however this process ends: a shell sees to it, which reads until we let go."""
    names = " ".join(f"-{group}" for group in groups)
    shell = subprocess.Popen(
        ["sh", "-c", f"read line; kill -s CONT -- {names}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # one of them may have ended
        start_new_session=True,
    )
    try:
        yield
    finally:
        shell.communicate()


def _stop(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGSTOP)
