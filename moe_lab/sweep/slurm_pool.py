"""Slots that Slurm gives: jobs of arrays, which take the groups of the sweep. Imports no torch.

An array has a job for each of its groups. A job that runs takes others' groups too (`slurm_job`); then those jobs find
none, and are cancelled while they wait. So there are always enough jobs for the groups that nobody has taken.
"""

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
from moe_lab.sweep import slurm, slurm_job
from moe_lab.sweep.kinds import Kind, Unkept, kept
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.slurm_asker import GONE, N_LOOKS, Asker, described
from moe_lab.sweep.slurm_job import CELLS, DRIVER, ENDS, FOLDER, PICKLE, SUFFIX, TAKEN, GroupJob, Line, Mailbox
from moe_lab.sweep.tasks import Event, Setup, Task

_TICK_S = 0.2
_BUSY_LOOK_S, _CALM_LOOK_S = 1.0, 5.0  # between two looks into the queue
_CALM_AFTER_S = 10.0  # since something changed there
_MOST_FAILED = 2
_MANY = 1_000_000  # more than any array has
_ASKING = "00:10:00"  # the time limit of the job that answers the plan's questions
_SUBMITTED = slurm.State("PENDING", "", "")


@dataclass
class _Group:
    """A group that was submitted."""

    number: str
    """Of the job that was submitted for it."""
    task: Task
    mailbox: Mailbox
    holder: str = ""
    """The job that took it."""
    slot: str = ""
    """What it is called while it runs: its node, and if others of ours are there, which."""
    node: str = ""
    state: slurm.State = _SUBMITTED
    """Of the job that took it, or that was submitted for it."""
    n_looks_over: int = 0
    is_cancelled: bool = False
    """By this driver."""
    told: set[str | None] = field(default_factory=set)
    """The cells that the driver knows to be over."""

    @property
    def job(self) -> str:
        """The job that will tell of it."""
        return self.holder or self.number


class SlurmPool:
    """See `pool.Pool`. All groups are submitted at once, and Slurm starts jobs as it has place."""

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
        self._asker: Asker | None = None
        self._askers: set[str] = set()
        self._groups: dict[str, _Group] = {}
        self._slots: dict[str, tuple[str, str]] = {}  # of each job that runs: its node and its slot
        self._n_alive = 0  # jobs that run or wait
        self._news: list[Event] = []
        self._looked_at = self._changed_at = 0.0
        self._is_silent = False  # Slurm does not answer
        self._has_adopted = False
        self._n_failed: Counter[str] = Counter()  # jobs in a row that did not even begin, by node
        self._out: set[str] = set()  # the nodes that get no more jobs
        self._is_out = False  # no node takes a job
        alive = {slurm.array_of(number) for number in self._alive()}
        self._is_new = not (self.directory / FOLDER).exists()
        self._folder = store.own_folder(self.directory / FOLDER)
        self._remove_what_is_over(alive)

    def _remove_what_is_over(self, alive: set[str]) -> None:
        """All but the logs of jobs that are over: when a cluster is made anew, the numbers of its jobs begin anew.

        Nor may a job find a pickle that came with the folder.
        """
        for path in self._folder.iterdir():
            number = path.name.removesuffix(SUFFIX).removesuffix(CELLS).removesuffix(PICKLE).removesuffix(TAKEN)
            if path.name.endswith(slurm.LOG.format(job="")) or slurm.array_of(number) in alive:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def names(self) -> list[str]:
        """See `Pool.names`: those of the jobs that run; before the first, the nodes."""
        return sorted({slot for _, slot in self._slots.values()}) or self._nodes()

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
            self._asker = Asker(self.directory, self.name, number, self.say, are_logs_kept=not self._only_asks)
            self._askers.add(number)
        return self._asker.ask(step, *arguments)

    def start(self, waiting: Sequence[Task]) -> list[Task]:
        """See `Pool.start`. If only so many jobs may run at once, what needs more has to wait for the end of one."""
        if not waiting or (self._has_adopted and not self._room()):
            return []
        nodes = self._nodes()
        can = [task for task in waiting if any(node not in task.not_on for node in nodes)]
        if not can:
            return []
        self._end_asking()
        left = can
        if not self._has_adopted:
            self._has_adopted = True
            left = self._adopt(can)
        not_on: dict[frozenset[str], list[Task]] = {}
        for task in left:
            not_on.setdefault(frozenset(self._out | task.not_on.keys()), []).append(task)
        waits = {task.number for task in left}
        started = [task for task in can if task.number not in waits]
        most = slurm.largest_array()
        for excluded, tasks in not_on.items():
            for first in range(0, len(tasks), most):
                if self._room():
                    some = tasks[first : first + most]
                    started += some
                    self._submit_groups(self._without_done(some), excluded)
        return started

    def _room(self) -> int:
        """How many more jobs may run at once."""
        return _MANY if self._at_once is None else max(0, self._at_once - self._n_alive)

    def _submit_groups(self, tasks: Sequence[Task], excluded: Iterable[str]) -> None:
        if not tasks:
            return
        options = dict(self.options["options"])
        if nodes := ",".join(sorted(excluded)):
            options["exclude"] = f"{options['exclude']},{nodes}" if "exclude" in options else nodes
        limit_s = seconds_of(self.options["time"])
        calls = [GroupJob.of(task, self.setup, limit_s, len(tasks)) for task in tasks]
        numbers = self._submit(slurm_job.run_groups, calls, {**self.options, "options": options}, self._room())
        self._n_alive += len(numbers)
        for number, task in zip(numbers, tasks, strict=True):
            self._add(_Group(number, task, Mailbox(self.directory, number)))
            self._groups[number].mailbox.make()
            Mailbox(self.directory, number + CELLS).put(Line("cells", content=_digests(task.cells)))

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
            found += [event for group in list(self._groups.values()) for event in self._news_of(group)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(_TICK_S)

    def drain(self) -> None:
        """See `Pool.drain`. What was put back into the queue ends too."""
        for group in list(self._groups.values()):
            if group.holder:
                group.is_cancelled = group.state.name in slurm.WAITS
            elif group.state.name not in slurm.RUNS and slurm_job.take(self.directory, group.number, DRIVER):
                del self._groups[group.number]
                self._news.append(Event("stopped", "", "", group.task.number))
        slurm.cancel_waiting(self.name)

    def stop(self) -> None:
        """See `Pool.stop`. Every job is told: one may have taken a group that is not known to be taken yet."""
        self.drain()
        slurm.signal_running(self.name, slurm.STOP)

    def close(self) -> None:
        """See `Pool.close`: what has not ended is cancelled."""
        try:
            self._end_asking()
            self.drain()
            slurm.cancel({group.job for group in self._groups.values()})
            while self._only_asks and self._askers & self._alive().keys():
                time.sleep(_TICK_S)
        except UnavailableError as error:  # what went before is of more interest
            self.say(str(error))
        self._groups = {}
        if self._only_asks:
            shutil.rmtree(self.directory, ignore_errors=True)
        elif self._is_new:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _submit(
        self, function: Callable[..., Any], calls: Sequence[Any], options: Mapping[str, Any], at_once: int = 1
    ) -> list[str]:
        most = min(at_once, len(calls))
        jobs = slurm.submit(self._folder, self.name, options, function, calls, at_once=most, cpus=self._cpus)
        self._is_new = False
        return jobs

    def _add(self, group: _Group) -> None:
        self._groups[group.number] = group
        self._changed_at = time.monotonic()

    def _end_asking(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None  # it ends soon

    # ---- jobs of a driver that was killed

    def _adopt(self, tasks: list[Task]) -> list[Task]:
        """Go on with groups of jobs that have the same cells, end the others, and return what no job has."""
        left, alive = list(tasks), self._alive()
        others: set[str | None] = set()
        groups = [path.name.removesuffix(CELLS + SUFFIX) for path in self._folder.glob(f"*{CELLS}{SUFFIX}")]
        for number in sorted(groups):
            if slurm_job.has_ended(self.directory, number):
                continue
            (line,) = Mailbox(self.directory, number + CELLS).new() or [Line("cells", content={})]
            task = next((task for task in left if _digests(task.cells).items() <= line.content.items()), None)
            holder = slurm_job.taken_by(self.directory, number) or ""
            if task is not None and (holder or number) in alive:
                left.remove(task)
                state = alive[holder or number]
                self._add(_Group(number, task, Mailbox(self.directory, number), holder, state=state))
            elif not slurm_job.take(self.directory, number, DRIVER):  # else no job takes it any more
                others.add(slurm_job.taken_by(self.directory, number))
        others |= {number for number in alive if number not in groups} - self._askers  # these end by themselves
        slurm.cancel(alive.keys() & others)
        while others & self._alive().keys():
            time.sleep(_TICK_S)
        self._n_alive = len(self._alive().keys() - self._askers)
        if self._groups:
            self.say(f"{len(self._groups)} groups are in jobs of an earlier start; these go on")
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
        taken = {path.name for path in self._folder.iterdir() if path.name.endswith(TAKEN)}
        alive = {number: state for number, state in states.items() if not state.is_over and number not in self._askers}
        arrays = {slurm.array_of(number) for number in alive}
        for number, group in self._groups.items():
            if not group.holder and number + TAKEN in taken:
                group.holder = slurm_job.taken_by(self.directory, number) or ""
            state = states.get(group.job, GONE)
            if state.name != group.state.name:
                self._changed_at = now
            group.state = state
            is_left_to_others = _was_cancelled_early(group) and slurm.array_of(number) in arrays
            group.n_looks_over = group.n_looks_over + 1 if state.is_over and not is_left_to_others else 0
        self._n_alive = len(alive)
        self._slots = {number: slot for number, slot in self._slots.items() if number in alive}
        self._cancel_idle(alive)

    def _cancel_idle(self, alive: Mapping[str, slurm.State]) -> None:
        """Cancel jobs that wait and would find no group of their array."""
        needed = {slurm.array_of(number) for number, group in self._groups.items() if not group.holder}
        holders = {group.holder for group in self._groups.values()}
        waiting = (number for number, state in alive.items() if state.name in slurm.WAITS and number not in holders)
        with suppress(UnavailableError):  # they find none, if Slurm does not answer just now
            slurm.cancel((number for number in waiting if slurm.array_of(number) not in needed), only_waiting=True)

    def _news_of(self, group: _Group) -> list[Event]:
        """The events of a group; the last one ends it."""
        found: list[Event] = []
        for line in group.mailbox.new() if group.state.name not in slurm.WAITS else ():
            if (event := self._event(group, line)) is not None:
                found.append(event)
                if event.kind == "broken":
                    self._leave_out(group.node)
                if event.kind in ENDS:
                    break
        else:
            if group.n_looks_over < N_LOOKS:
                return found
            if not group.holder and not slurm_job.take(self.directory, group.number, DRIVER):
                group.holder = slurm_job.taken_by(self.directory, group.number) or ""
                group.n_looks_over = 0  # a job took it, and the folder's list is late
                return found
            found.append(self._over(group))
        del self._groups[group.number]
        return found

    def _event(self, group: _Group, line: Line) -> Event | None:
        """What a line means to the driver; None if nothing."""
        if line.kind == "begun":
            group.holder, group.node = line.text, line.content
            group.slot = self._slot_of(group.holder, group.node)
            self._n_failed[group.node] = 0
            line = line._replace(text=f"job {group.holder}")
        elif line.kind in ("cell", "step"):
            known = {cell.cell_id for cell in group.task.all_cells}
            if line.cell_id not in known or (line.kind == "cell" and line.cell_id in group.told):
                return None  # of an earlier driver's plan, or told before the job was put back
            if line.kind == "cell":
                group.told.add(line.cell_id)
        elif line.kind not in ENDS:
            return None
        elif line.kind in ("refused", "broken"):
            group.node = line.content
        return Event(line.kind, group.slot or group.node, group.node, group.task.number, line.cell_id, line.text)  # type: ignore[arg-type]

    def _slot_of(self, job: str, node: str) -> str:
        if self._slots.get(job, ("", ""))[0] != node:  # it is new there
            used = {slot for _, slot in self._slots.values()}
            slot = next(slot for n in count(1) if (slot := node if n == 1 else f"{node}-{n}") not in used)
            self._slots[job] = node, slot
        return self._slots[job][1]

    def _over(self, group: _Group) -> Event:
        """The end of a job that did not say so itself."""
        if group.state.name == "CANCELLED" or _was_cancelled_early(group):
            kind, text = "stopped", "" if group.is_cancelled else f"job {group.job} was cancelled"
        else:
            kind, text = "lost", described(self.directory, group.job, group.state)
            if not group.node:
                self._is_out = self._is_out or not (group.holder or group.state.node)
                self._n_failed[group.state.node] += 1
                if self._n_failed[group.state.node] == _MOST_FAILED:
                    self._leave_out(group.state.node)
        node = group.node or group.state.node
        slot = group.slot or node or ("slurm" if kind == "lost" else "")
        return Event(kind, slot, node, group.task.number, None, text)  # type: ignore[arg-type]

    def _leave_out(self, node: str) -> None:
        """Give a node no more jobs: it would end one after the other, faster than others run theirs."""
        self._out.add(node)
        given = str(self.options["options"].get("exclude", "")).split(",")
        waiting = [group.job for group in self._groups.values() if group.state.name in slurm.WAITS]
        slurm.exclude(waiting, {*self._out, *filter(None, given)})


def _was_cancelled_early(group: _Group) -> bool:
    """Whether its job was cancelled before any took it. Of a part of an array that waited no trace is left."""
    return not group.holder and (group.state.name == "CANCELLED" or group.state == GONE)


def _digests(cells: Iterable[Cell]) -> dict[str, str]:
    """Of each cell all that its job does."""
    return {cell.cell_id: identity.digest([cell.config, cell.code_id]) for cell in cells}


def _is_done(cell: Cell) -> bool:
    record = store.find_record(cell.directory)
    if record is None:
        return False
    ids = (record.cell_id, record.code_id) == (cell.cell_id, cell.code_id)
    return ids and record.env_id in cell.env_ids and record.status == "ok"
