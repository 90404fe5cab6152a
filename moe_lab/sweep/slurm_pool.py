"""Slots that Slurm gives: each group is a job of an array. Imports no torch."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from moe_lab.config.slurm_options import seconds_of
from moe_lab.errors import UnavailableError
from moe_lab.records import identity, store
from moe_lab.sweep import slurm, slurm_job, standing
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.kinds import Kind, Unkept, kept
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.slurm_job import ENDS, FOLDER, SUFFIX, GroupJob, Line, Mailbox
from moe_lab.sweep.tasks import Event, Setup, Task

_TICK_S = 0.2
_BUSY_LOOK_S, _CALM_LOOK_S = 1.0, 5.0  # between two looks into the queue
_CALM_AFTER_S = 10.0  # since something changed there
_N_LOOKS = 3  # after which a job that is over and has not said so is lost: a shared disk may be late
_MOST_FAILED = 2
_SAY_S = 5.0  # a wait that is longer is told
_ASKING = "00:10:00"  # the time limit of the job that answers the plan's questions
_CELLS = "_cells"  # of a job, in a file that the driver writes
_SUBMITTED = slurm.State("PENDING", "", "")
_GONE = slurm.State("GONE", "", "Slurm does not know it any more")


@dataclass
class _Job:
    """A group that was submitted."""

    number: str
    task: Task
    mailbox: Mailbox
    slot: str = ""
    """What it is called while it runs: its node, and if others of ours are there, which."""
    node: str = ""
    state: slurm.State = _SUBMITTED
    n_looks_over: int = 0
    is_cancelled: bool = False
    """By this driver."""
    told: set[str | None] = field(default_factory=set)
    """The cells that the driver knows to be over."""


class SlurmPool:
    """See `pool.Pool`. All groups are submitted at once, and Slurm starts them as it has place."""

    def __init__(self, setup: Setup, options: Mapping[str, Any], wanted: Mapping[str, Any], say: Callable[[str], None]):
        """`options` are `sweep.slurm`, `wanted` is `sweep.slots`; `say` shows a line.

        Raises:
            UnavailableError: nothing can be submitted from here.
        """
        slurm.require_commands()
        self._only_asks = not setup.shared  # `moe-lab plan`, which leaves nothing behind
        self.setup, self.options, self.say = replace(setup, shared=True), options, say
        self._wanted = wanted
        self._at_once = (wanted["cpu"] or 0) + (wanted["cuda"] or 0) or None
        self._cpus: int | None = wanted["cpus_each"]
        self.directory = Path(setup.directory)
        self.name = slurm.job_name(self.directory)
        self._asker: _Asker | None = None
        self._askers: set[str] = set()
        self._jobs: dict[str, _Job] = {}
        self._news: list[Event] = []
        self._looked_at = self._changed_at = 0.0
        self._is_silent = False  # Slurm does not answer
        self._has_adopted = False
        self._n_failed: Counter[str] = Counter()  # jobs in a row that did not even begin, by node
        self._out: set[str] = set()  # the nodes that get no more jobs
        self._is_out = False  # no node takes a job
        self._folder = store.own_folder(self.directory / FOLDER)
        self._remove_what_is_over()

    def _remove_what_is_over(self) -> None:
        """All but the logs of jobs that are over: when a cluster is made anew, the numbers of its jobs begin anew.

        Nor may a job find a pickle that came with the folder.
        """
        alive = self._alive()
        for path in self._folder.iterdir():
            number = path.name.removesuffix(SUFFIX).removesuffix(_CELLS).removesuffix("_submitted.pkl")
            if path.name.endswith(slurm.LOG.format(job="")) or number in alive:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def names(self) -> list[str]:
        """See `Pool.names`: those of the jobs that run; before the first, the nodes."""
        return sorted({job.slot for job in self._jobs.values() if job.slot}) or self._nodes()

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `HasKinds`. One node is asked, in a job; one of another kind refuses its jobs.

        While jobs of an earlier start go on, what it was told holds: another would wait for them.
        """
        names = [config["device"]["name"] for config in configs]
        for kind in kept(self.directory, "slurm", self._wanted) if self._alive() else ():
            if kind.env_ids.keys() >= set(names):
                return [Kind(kind.env_ids, kind.slots, partial(self._ask_if, kind.ask), kind.answers)]
        seen = self._ask("look", configs, False)
        slots = [f"slurm-{number}" for number in range(self._at_once or len(self._nodes()))]
        return [Kind(dict(zip(names, (one["env_id"] for one in seen), strict=True)), slots, self._ask)]

    def _ask_if(self, kept_ask: Callable[..., Any], step: str, *arguments: Any) -> Any:
        try:
            return kept_ask(step, *arguments)
        except Unkept:
            return self._ask(step, *arguments)

    def _ask(self, step: str, *arguments: Any) -> Any:
        if self._asker is None:
            options = {**self.options, "time": min(self.options["time"], _ASKING, key=seconds_of)}
            (number,) = self._submit(slurm_job.answer, [self.setup], options)
            self._asker = _Asker(self, number)
            self._askers.add(number)
        return self._asker.ask(step, *arguments)

    def start(self, waiting: Sequence[Task]) -> list[Task]:
        """See `Pool.start`."""
        nodes = self._nodes() if waiting else []
        can = [task for task in waiting if any(node not in task.not_on for node in nodes)]
        if not can:
            return []
        self._end_asking()
        left = list(can)
        if not self._has_adopted:
            self._has_adopted = True
            left = self._without_done(self._adopt(left))
        not_on: dict[frozenset[str], list[Task]] = {}
        for task in left:
            not_on.setdefault(frozenset(self._out | task.not_on.keys()), []).append(task)
        for excluded, tasks in not_on.items():
            self._submit_groups(tasks, excluded)
        return can

    def _submit_groups(self, tasks: Sequence[Task], excluded: Iterable[str]) -> None:
        options = dict(self.options["options"])
        if nodes := ",".join(sorted(excluded)):
            options["exclude"] = f"{options['exclude']},{nodes}" if "exclude" in options else nodes
        calls = [GroupJob.of(task, self.setup, seconds_of(self.options["time"])) for task in tasks]
        numbers = self._submit(slurm_job.run_group, calls, {**self.options, "options": options})
        for number, task in zip(numbers, tasks, strict=True):
            self._add(_Job(number, task, Mailbox(self.directory, number)))
            self._jobs[number].mailbox.make()
            Mailbox(self.directory, number + _CELLS).put(Line("cells", content=_digests(task.cells)))

    def may_start(self, task: Task) -> bool:
        """See `Pool.may_start`."""
        return any(node not in task.not_on for node in self._nodes())

    def _nodes(self) -> list[str]:
        """Those on which jobs may begin."""
        nodes = () if self._is_out else slurm.nodes(self.options["partition"])
        return [node for node in nodes if node not in self._out]

    def events(self, timeout_s: float) -> list[Event]:
        """See `Pool.events`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._look()
            found, self._news = self._news, []
            found += [event for job in list(self._jobs.values()) for event in self._news_of(job)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(_TICK_S)

    def drain(self) -> None:
        """See `Pool.drain`."""
        waiting = [job for job in self._jobs.values() if job.state.name in slurm.WAITS]
        for job in waiting:
            job.is_cancelled = True
        slurm.cancel([job.number for job in waiting], only_waiting=True)

    def stop(self) -> None:
        """See `Pool.stop`."""
        self.drain()
        slurm.signal([job.number for job in self._jobs.values() if job.state.name in slurm.RUNS], slurm.STOP)

    def close(self) -> None:
        """See `Pool.close`: what has not ended is cancelled."""
        try:
            self._end_asking()
            slurm.cancel(self._jobs)
            while self._only_asks and self._askers & self._alive().keys():
                time.sleep(_TICK_S)
        except UnavailableError as error:  # what went before is of more interest
            self.say(str(error))
        self._jobs = {}
        if self._only_asks:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _submit(self, function: Callable[..., Any], calls: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
        return slurm.submit(self._folder, self.name, options, function, calls, at_once=self._at_once, cpus=self._cpus)

    def _add(self, job: _Job) -> None:
        self._jobs[job.number] = job
        self._changed_at = time.monotonic()

    def _end_asking(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None  # it ends soon

    # ---- jobs of a driver that was killed

    def _adopt(self, tasks: list[Task]) -> list[Task]:
        """Go on with jobs that have the same cells, cancel the others, and return what no job has."""
        left, others = list(tasks), set()
        for number, state in self._alive().items():
            if number in self._askers:
                continue  # it ends by itself
            lines = Mailbox(self.directory, number + _CELLS).new()
            has: dict[str, str] = lines[0].content if lines else {}
            task = next((task for task in left if _digests(task.cells).items() <= has.items()), None)
            if task is None:
                others.add(number)
                continue
            left.remove(task)
            self._add(_Job(number, task, Mailbox(self.directory, number), state=state))
        slurm.cancel(others)
        while others & self._alive().keys():
            time.sleep(_TICK_S)
        if self._jobs:
            self.say(f"{len(self._jobs)} groups are in jobs of an earlier start; these go on")
        return left

    def _alive(self) -> dict[str, slurm.State]:
        return {number: state for number, state in slurm.states(self.name).items() if not state.is_over}

    def _without_done(self, tasks: list[Task]) -> list[Task]:
        """What is left of tasks after jobs ended since the plan was made."""
        left = []
        for task in tasks:
            done = [cell for cell in task.cells if _is_done(cell)]
            self._news += [Event("cell", "slurm", "", task.number, cell.cell_id) for cell in done]
            if len(done) == len(task.cells):
                self._news.append(Event("end", "slurm", "", task.number))
            else:
                left.append(replace(task, cells=tuple(cell for cell in task.cells if cell not in done)))
        return left

    # ---- what happens to the jobs

    def _look(self) -> None:
        """Ask Slurm now and then: often while something happens."""
        now = time.monotonic()
        pause = _BUSY_LOOK_S if now - self._changed_at < _CALM_AFTER_S else _CALM_LOOK_S
        if now - self._looked_at < pause:
            return
        self._looked_at = now
        try:
            states = slurm.states(self.name)
        except UnavailableError as error:  # it may be started again just now; the jobs go on
            if not self._is_silent:
                self.say(f"{error}; waiting")
            self._is_silent = True
            return
        self._is_silent = False
        for number, job in self._jobs.items():
            state = states.get(number, _GONE)
            if state.name != job.state.name:
                self._changed_at = now
            job.state = state
            job.n_looks_over = job.n_looks_over + 1 if state.is_over else 0

    def _news_of(self, job: _Job) -> list[Event]:
        """The events of a job; the last one ends it."""
        found: list[Event] = []
        for line in job.mailbox.new() if job.state.name not in slurm.WAITS else ():
            if (event := self._event(job, line)) is not None:
                found.append(event)
                if event.kind == "broken":
                    self._leave_out(job.node)
                if event.kind in ENDS:
                    break
        else:
            if job.n_looks_over < _N_LOOKS:
                return found
            found.append(self._over(job))
        del self._jobs[job.number]
        return found

    def _event(self, job: _Job, line: Line) -> Event | None:
        """What a line means to the driver; None if nothing."""
        if line.kind == "begun":
            job.node, job.slot = line.content, ""
            job.slot = self._free_slot(job.node)
            self._n_failed[job.node] = 0
            line = line._replace(text=f"job {job.number}")
        elif line.kind in ("cell", "step"):
            known = {cell.cell_id for cell in job.task.all_cells}
            if line.cell_id not in known or (line.kind == "cell" and line.cell_id in job.told):
                return None  # of an earlier driver's plan, or told before the job was put back
            if line.kind == "cell":
                job.told.add(line.cell_id)
        elif line.kind not in ENDS:
            return None
        elif line.kind in ("refused", "broken"):
            job.node = line.content
        return Event(line.kind, job.slot or job.node, job.node, job.task.number, line.cell_id, line.text)  # type: ignore[arg-type]

    def _free_slot(self, node: str) -> str:
        used = {job.slot for job in self._jobs.values()}
        return next(slot for n in count(1) if (slot := node if n == 1 else f"{node}-{n}") not in used)

    def _over(self, job: _Job) -> Event:
        """The end of a job that did not say so itself."""
        never_began = not job.node and job.state == _GONE  # of a part of an array that waited no trace is left
        if job.state.name == "CANCELLED" or never_began:
            kind, text = "stopped", "" if job.is_cancelled else f"job {job.number} was cancelled"
        else:
            kind, text = "lost", self.described(job.number, job.state)
            self._is_out = self._is_out or not job.state.node
            if not job.node:
                self._n_failed[job.state.node] += 1
                if self._n_failed[job.state.node] == _MOST_FAILED:
                    self._leave_out(job.state.node)
        node = job.node or job.state.node
        return Event(kind, job.slot or node or "slurm", node, job.task.number, None, text)  # type: ignore[arg-type]

    def _leave_out(self, node: str) -> None:
        """Give a node no more jobs: it would end one after the other, faster than others run theirs."""
        self._out.add(node)
        given = str(self.options["options"].get("exclude", "")).split(",")
        waiting = [number for number, job in self._jobs.items() if job.state.name in slurm.WAITS]
        slurm.exclude(waiting, {*self._out, *filter(None, given)})

    def described(self, number: str, state: slurm.State) -> str:
        """How a job ended, and where its log is."""
        log = self.directory / FOLDER / slurm.LOG.format(job=number)
        what = f"job {number}" + (f" on {state.node}" if state.node else "")
        if state.node and not log.exists():
            return (
                f"{what}: {state.name}; it wrote no log, so {state.node} does not see {self.directory}; set "
                "hydra.sweep.dir to a folder that all nodes share"
            )
        return f"{what}: {state.name} ({state.reason}; {_last_line(log)}); see {log}"


class _Asker:
    """A job on one node that answers the questions of the plan."""

    def __init__(self, pool: SlurmPool, number: str):
        self._pool, self._number, self.node = pool, number, ""
        directory = pool.directory
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
        log = self._pool.directory / standing.FOLDER / f"slurm-{self._number}.log"
        why = f"{line.text}; {_last_line(log)}; see {log}" if line.kind == "lost" else line.text
        raise UnavailableError(f"sweep.engine=slurm: no worker could start on {self.node}: {why}")

    def _next(self) -> Line:
        """The next line of the job; if it waits in the queue, that is said."""
        started = looked_at = time.monotonic()
        is_said, n_looks_over = False, 0
        while not self._lines:
            time.sleep(_TICK_S)
            self._lines = self._answers.new()
            if self._lines or time.monotonic() - looked_at < _BUSY_LOOK_S:
                continue
            looked_at = time.monotonic()
            state = slurm.states(self._pool.name).get(self._number, _GONE)
            n_looks_over += state.is_over
            if n_looks_over >= _N_LOOKS:
                raise UnavailableError(f"sweep.engine=slurm: {self._pool.described(self._number, state)}")
            if state.name in slurm.WAITS and not is_said and looked_at - started > _SAY_S:
                self._pool.say(f"job {self._number}, which asks what kind of node there is, waits ({state.reason})")
                is_said = True
        return self._lines.pop(0)

    def close(self) -> None:
        """End the job, whether or not it has begun."""
        self._questions.put(Line("close"))
        if not self.node:
            slurm.cancel([self._number])


def _digests(cells: Iterable[Cell]) -> dict[str, str]:
    """Of each cell all that its job does."""
    return {cell.cell_id: identity.digest([cell.config, cell.code_id]) for cell in cells}


def _is_done(cell: Cell) -> bool:
    record = store.find_record(cell.directory)
    if record is None:
        return False
    ids = (record.cell_id, record.code_id) == (cell.cell_id, cell.code_id)
    return ids and record.env_id in cell.env_ids and record.status == "ok"


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"
    return "it wrote no log"
