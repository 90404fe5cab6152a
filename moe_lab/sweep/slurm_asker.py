"""A job that answers the questions of the plan, as its driver sees it, and how a job ended. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab.errors import UnavailableError
from moe_lab.records import identity
from moe_lab.sweep import slurm, standing
from moe_lab.sweep.capped_log import last_line
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.slurm_job import FOLDER, Line, Mailbox

N_LOOKS = 3  # after which a job that is over and has not said so is lost: a shared disk may be late
GONE = slurm.State("GONE", "", "Slurm does not know it any more")
_TICK_S, _LOOK_S = 0.2, 1.0
_SAY_S = 5.0  # a wait that is longer is told


class Asker:
    """A job on one node that answers the questions of the plan."""

    def __init__(self, directory: Path, name: str, number: str, say: Callable[[str], None], *, are_logs_kept: bool):
        """`name` is that of the sweep's jobs, `number` the job's; `say` shows a line."""
        self._are_logs_kept = are_logs_kept
        self._directory, self._name, self._number, self._say = directory, name, number, say
        self.node = ""
        self._questions, self._answers = Mailbox(directory, f"{number}_questions"), Mailbox(directory, number)
        self._questions.make()
        self._answers.make()
        self._lines: list[Line] = []

    def ask(self, step: str, *arguments: Any) -> Any:
        """The answer of the node's worker.

        Raises:
            UnavailableError: the job ended, or moe-lab does not run on its node.
            WorkerLostError: the question ended the worker.
        """
        is_first = not self.node
        if is_first:
            begun = self._next()
            self.node = begun.text
            if begun.content != identity.code_id(()):
                raise UnavailableError(
                    f"sweep.engine=slurm: {self.node} has another version of moe-lab than this machine; "
                    "install the same, or set sweep.slurm.python."
                )
        self._questions.put(Line("ask", content=[step, *arguments]))
        line = self._next()
        if line.kind == "answer":
            return line.content
        if line.kind == "lost" and not is_first:
            raise WorkerLostError(line.text)
        log = self._directory / standing.FOLDER / f"slurm-{self._number}.log"
        see = f"; see {log}" if line.kind == "lost" and self._are_logs_kept else ""
        raise UnavailableError(f"sweep.engine=slurm: no worker could start on {self.node}: {line.text}{see}")

    def _next(self) -> Line:
        """The next line of the job; if it waits in the queue, that is said."""
        started = looked_at = time.monotonic()
        is_said, n_looks_over = False, 0
        while not self._lines:
            time.sleep(_TICK_S)
            self._lines = self._answers.new()
            if self._lines or time.monotonic() - looked_at < _LOOK_S:
                continue
            looked_at = time.monotonic()
            state = slurm.states(self._name).get(self._number, GONE)
            n_looks_over += state.is_over
            if n_looks_over >= N_LOOKS:
                how = described(self._directory, self._number, state, see_log=self._are_logs_kept)
                raise UnavailableError(f"sweep.engine=slurm: {how}")
            if state.name in slurm.WAITS and not is_said and looked_at - started > _SAY_S:
                self._say(f"job {self._number}, which asks what kind of node there is, waits ({state.reason})")
                is_said = True
        return self._lines.pop(0)

    def close(self) -> None:
        """End the job, whether or not it has begun."""
        self._questions.put(Line("close"))
        if not self.node:
            slurm.cancel([self._number])


def described(directory: Path, number: str, state: slurm.State, *, see_log: bool = True) -> str:
    """How a job ended, and where its log is."""
    log = directory / FOLDER / slurm.LOG.format(job=number)
    what = f"job {number}" + (f" on {state.node}" if state.node else "")
    if state.node and not log.exists():
        return (
            f"{what}: {state.name}; it wrote no log, so {state.node} does not see {directory}; set "
            "hydra.sweep.dir to a folder that all nodes share"
        )
    see = f"; see {log}" if see_log else ""
    return f"{what}: {state.name} ({state.reason}; {last_line(log)}){see}"
