"""The worker process: `python -m moe_lab.sweep.worker FD PARENT` serves the steps of a `Bench` over a socket."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Linux ends this process when its parent dies, and then what it started; elsewhere it ends at the step after."""
    if sys.platform == "linux":
        _end_children_with_this()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        sys.exit(0)


def _end_children_with_this() -> None:
    """Leave a process that waits for the end of this one, whatever ends it, and kills the rest of its group."""
    group = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # the parent is to see the end of the conversation
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
        if os.getppid() == group:
            signal.sigwait({signal.SIGUSR1})
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def serve(connection: Connection) -> None:
    """Execute steps until the other side is gone."""
    trusted = connection.recv()
    import torch.fx.experimental.symbolic_shapes  # noqa: F401 - the first cell needs it: here, before `freeze`

    from moe_lab.sweep.bench import Bench

    bench = Bench(trusted)
    gc.freeze()  # what torch imported never goes; looking through it for garbage would take 0.2 s each time
    connection.send(("ok", None))
    while True:
        try:
            step, arguments, bench.timeout_s = connection.recv()
        except EOFError:
            return
        connection.send(_perform(bench, step, arguments))


def _perform(bench: Any, step: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    from moe_lab.config import targets
    from moe_lab.runs.unchanged import unchanged_process
    from moe_lab.sweep.engine import CellFailedError

    try:
        with unchanged_process():
            return "ok", getattr(bench, step)(*arguments)
    except CellFailedError as failed:
        return "failed", failed
    except Exception as error:
        # Not the cell's: a full disk, a mistake of ours. Others than builtin exceptions may not survive the journey.
        return "failed", error if isinstance(error, OSError) else RuntimeError(
            f"{step}: {type(error).__name__}: {error}{targets.place_of(error)}"
        )


if __name__ == "__main__":
    _die_with(int(sys.argv[2]))
    faulthandler.enable()
    serve(Connection(int(sys.argv[1])))
