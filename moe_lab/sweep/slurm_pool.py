"""Slots that Slurm gives: each group is a job of an array. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab.errors import UnavailableError
from moe_lab.records import identity, store
from moe_lab.sweep import slurm, slurm_job
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.kinds import Kind
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.slurm_job import FOLDER, GroupJob, Line, Mailbox
from moe_lab.sweep.tasks import Event, Setup, Task

_TICK_S = 0.2
_BUSY_LOOK_S, _CALM_LOOK_S = 1.0, 5.0  # between two looks into the queue
_CALM_AFTER_S = 10.0  # since something changed there
_N_LOOKS = 2  # after which a job that is over and has not said so is lost: a shared disk may be late


@dataclass
class _Job:
    task: Task
    mailbox: Mailbox
    told: set[str | None]
    """The cells that the driver knows to be over; those of an earlier driver are no news."""
    state: slurm.State = slurm.State("PENDING", "", "")
    n_looks_over: int = 0
    is_cancelled: bool = False
    """By this driver."""


class SlurmPool:
    """See `pool.Pool`. All groups are submitted at once, and Slurm starts them as it has place."""

    def __init__(
        self, setup: Setup, options: Mapping[str, Any], wanted: Mapping[str, Any], say: Callable[[str], None]
    ):
        """`options` are `sweep.slurm`, `wanted` is `sweep.slots`. Raises `UnavailableError` if nothing can be submitted."""
        slurm.require_commands()
        self._setup, self._options, self._say = setup, options, say
        self._at_once = (wanted["cpu"] or 0) + (wanted["cuda"] or 0) or None
        self._cpus: int | None = wanted["cpus_each"]
        self._directory = Path(setup.directory)
        self._name = slurm.job_name(self._directory)
        self._asker: _Asker | None = None
        self._jobs: dict[str, _Job] = {}
        self._looked_at = self._changed_at = 0.0
        self._has_adopted = False

    def names(self) -> list[str]:
        """See `Pool.names`: there is no slot before a job has begun."""
        return [_slot(number) for number, job in self._jobs.items() if job.state.name in slurm.RUNS]

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `HasKinds`. One node is asked, in a job; jobs that come to a node of another kind go to another."""
        self._asker = _Asker(self._submit, self._setup, self._name, self._say)
        seen = self._asker.ask("look", configs, False)
        names = [config["device"]["name"] for config in configs]
        env_ids = dict(zip(names, (one["env_id"] for one in seen), strict=True))
        return [Kind(env_ids, ["slurm"], self._asker.ask)]

    def start(self, waiting: Sequence[Task]) -> list[Task]:
        """See `Pool.start`."""
        if not waiting:
            return []
        self._end_asking()
        left = list(waiting)
        if not self._has_adopted:
            self._has_adopted = True
            left = self._adopt(left)
        by_nodes: dict[tuple[str, ...], list[Task]] = {}
        for task in left:
            by_nodes.setdefault(tuple(task.not_on), []).append(task)
        limit_s = slurm.seconds_of(self._options["time"])
        for nodes, tasks in by_nodes.items():
            calls = [
                GroupJob(task, self._setup, limit_s, {cell.cell_id: slurm_job.mark(cell) for cell in task.cells})
                for task in tasks
            ]
            for number, task in zip(self._submit(slurm_job.run_group, calls, nodes), tasks, strict=True):
                self._jobs[number] = _Job(task, Mailbox(self._directory, number), set())
                self._jobs[number].mailbox.put(Line("submitted", content=_digests(task.cells)))
        self._changed_at = time.monotonic()
        return list(waiting)

    def may_start(self, task: Task) -> bool:
        """See `Pool.may_start`."""
        return bool(set(slurm.nodes(self._options["partition"])) - set(task.not_on))

    def events(self, timeout_s: float) -> list[Event]:
        """See `Pool.events`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._look()
            found = [event for number in list(self._jobs) for event in self._told_by(number)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(_TICK_S)

    def drain(self) -> None:
        """See `Pool.drain`."""
        waiting = [number for number, job in self._jobs.items() if job.state.name in slurm.WAITS]
        slurm.cancel(waiting, only_waiting=True)
        for number in waiting:
            self._jobs[number].is_cancelled = True

    def stop(self) -> None:
        """See `Pool.stop`."""
        self.drain()
        slurm.signal((number for number, job in self._jobs.items() if job.state.name in slurm.RUNS), slurm.STOP)

    def close(self) -> None:
        """See `Pool.close`: what has not ended is cancelled."""
        self._end_asking()
        slurm.cancel(self._jobs)
        self._jobs = {}

    def _submit(self, function: Callable[..., Any], calls: Sequence[Any], not_on: Iterable[str] = ()) -> list[str]:
        options = dict(self._options)
        if excluded := ",".join(not_on):
            options["options"] = {**options["options"], "exclude": excluded}
        folder = store.own_folder(self._directory / FOLDER)
        return slurm.submit(folder, self._name, options, function, calls, at_once=self._at_once, cpus=self._cpus)

    def _end_asking(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    # ---- jobs of a driver that was killed

    def _adopt(self, tasks: list[Task]) -> list[Task]:
        """Go on with jobs that have the same cells, cancel the others, and return what no job has."""
        alive = {number: state for number, state in (slurm.states(self._name) or {}).items() if not state.is_over}
        left, adopted = list(tasks), set()
        for number, state in alive.items():
            mailbox = Mailbox(self._directory, number)
            lines = mailbox.new()
            has = next((line.content for line in lines if line.kind == "submitted"), {})
            task = next((task for task in left if _digests(task.cells).items() <= has.items()), None)
            if task is not None:
                left.remove(task)
                adopted.add(number)
                known = {line.cell_id for line in lines if line.kind == "cell"}
                self._jobs[number] = _Job(task, Mailbox(self._directory, number), known, state)
        others = set(alive) - adopted
        slurm.cancel(others)
        while any(not state.is_over for number, state in (slurm.states(self._name) or {}).items() if number in others):
            time.sleep(_TICK_S)
        return left

    # ---- what happens to the jobs

    def _look(self) -> None:
        """Ask Slurm now and then: often while something happens."""
        now = time.monotonic()
        pause = _BUSY_LOOK_S if now - self._changed_at < _CALM_AFTER_S else _CALM_LOOK_S
        if now - self._looked_at < pause or (states := slurm.states(self._name)) is None:
            return
        self._looked_at = now
        for number, job in self._jobs.items():
            state = states.get(number, slurm.State("GONE", "", "Slurm does not know it any more"))
            if state.name != job.state.name:
                self._changed_at = now
            job.state = state
            job.n_looks_over += state.is_over

    def _told_by(self, number: str) -> list[Event]:
        """The news of a job; the last one when it is over."""
        job = self._jobs[number]
        if job.state.name in slurm.WAITS:
            return []
        slot, found = _slot(number), []
        known = {cell.cell_id for cell in job.task.cells} | ({job.task.anchor.cell_id} if job.task.anchor else set())
        for line in job.mailbox.new():
            if line.kind == "cell" and (line.cell_id in job.told or line.cell_id not in known):
                continue
            if line.kind == "step" and line.cell_id not in known:
                continue
            if line.kind == "cell":
                job.told.add(line.cell_id)
            if line.kind in ("begun", "step", "cell", "end", "stopped", "refused", "broken", "lost"):
                node = line.content if line.kind in ("refused", "broken") else ""
                found.append(Event(line.kind, slot, job.task.number, line.cell_id, line.text))  # type: ignore[arg-type]
        if any(event.kind in ("end", "stopped", "refused", "broken", "lost") for event in found):
            del self._jobs[number]
        elif job.n_looks_over >= _N_LOOKS:
            del self._jobs[number]
            found.append(self._over(number, job))
        return found

    def _over(self, number: str, job: _Job) -> Event:
        """The end of a job that did not say so itself."""
        if job.state.name == "CANCELLED":
            text = "" if job.is_cancelled else f"job {number} was cancelled"
            return Event("stopped", _slot(number), job.task.number, None, text)
        return Event("lost", _slot(number), job.task.number, None, self.described(number, job.state))

    def described(self, number: str, state: slurm.State) -> str:
        """How a job ended, and where its log is."""
        log = Path(FOLDER) / slurm.LOG.format(job=number)
        where = f" on {state.node}" if state.node else ""
        if not (self._directory / log).exists() and state.node:
            return (
                f"job {number}{where}: {state.name}, and it wrote no log, so that node does not see {self._directory}; "
                "set hydra.sweep.dir to a folder that all nodes share"
            )
        return f"job {number}{where}: {state.name} ({state.reason}); see {log}"


class _Asker:
    """A job on one node that answers the questions of the plan."""

    def __init__(self, pool: SlurmPool, number: str, setup: Setup):
        self._pool, self._number, self._setup = pool, number, setup
        directory = Path(setup.directory)
        self._questions, self._answers = Mailbox(directory, f"{number}_questions"), Mailbox(directory, number)
        self._lines: list[Line] = []
        self._node: str | None = None

    def ask(self, step: str, *arguments: Any) -> Any:
        """The answer of the node's worker. Raises `UnavailableError`; `WorkerLostError` if it was the question's fault."""
        is_first = self._node is None
        if is_first:
            begun = self._next()
            self._node = begun.text
            if begun.content != identity.code_id(self._setup.trusted):
                raise UnavailableError(
                    f"sweep.engine=slurm: {self._node} has another version of moe-lab, or of the plug-ins, than this "
                    "machine; install the same, or set sweep.slurm.python."
                )
        self._questions.put(Line("ask", content=[step, *arguments]))
        line = self._next()
        if line.kind == "answer":
            return line.content
        if line.kind == "lost" and not is_first:
            raise WorkerLostError(line.text)
        log = Path(self._setup.directory) / STANDING / f"{_slot(self._number)}.log"
        raise UnavailableError(
            f"sweep.engine=slurm: the worker on {self._node} could not start: {line.text}; {_last_line(log)}; see {log}"
        )

    def _next(self) -> Line:
        """The next line of the job; while it waits in the queue that is said."""
        started, said = time.monotonic(), False
        n_over = 0
        while not self._lines:
            self._lines = self._answers.new()
            state = self._pool.state_of(self._number)
            if state is not None and state.is_over and not self._lines and (n_over := n_over + 1) > _N_LOOKS:
                raise UnavailableError(f"sweep.engine=slurm: {self._pool.described(self._number, state)}")
            if state is not None and state.name in slurm.WAITS and not said and time.monotonic() - started > _SAY_S:
                self._pool.say(f"job {self._number} asks what kind of node there is; it waits in the queue ({state.reason})")
                said = True
            if not self._lines:
                time.sleep(_TICK_S if n_over == 0 else _BUSY_LOOK_S)
        return self._lines.pop(0)

    def close(self) -> None:
        """End the job."""
        self._questions.put(Line("close"))


def _slot(number: str) -> str:
    return f"slurm-{number}"


def _digests(cells: Iterable[Cell]) -> dict[str, str]:
    """Of each cell all that its job does."""
    return {cell.cell_id: identity.digest([cell.config, cell.code_id]) for cell in cells}


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return "it wrote no log"
