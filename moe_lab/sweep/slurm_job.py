"""What runs in a job of Slurm: a host that times groups, or answers the questions of the plan. Imports no torch.

A job times its own group, and then those of its array that no other job has taken: a worker's imports take longer than
many a group. What happens is told to the driver by lines in a file of the group beside submitit's (`Mailbox`), so the
driver may be killed and started again. A job that is started again (put back into the queue after its time limit, a
preemption or the loss of its node) does what is left of the group that it had.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.errors import UnavailableError
from moe_lab.records import files, identity, store
from moe_lab.sweep import slurm, timing
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.host import Host
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.slots import VISIBLE, Slot, usable_cpus
from moe_lab.sweep.tasks import Event, Setup, Task

FOLDER = ".slurm"
"""In the sweep's folder: what submitit writes, and the mailboxes."""
SUFFIX, PICKLE, TAKEN = ".jsonl", "_submitted.pkl", ".taken"
"""Of a group's mailbox, of what submitit pickled, and of the link that says which job has the group."""
CELLS = "_cells"
"""Of the file in which the driver says which cells a group has."""
DRIVER = "driver"
"""Has a group that no job is to take any more."""
ENDS = ("end", "stopped", "refused", "broken", "lost")
"""The kinds of events after which a job has nothing more to tell."""
_TICK_S = 0.2
_IDLE_S = 300.0  # how long a job that answers waits for a question, if nobody ends it
_EARLY_S = 65.0  # Slurm may warn of the limit a minute too early
_CLAIM_S = 60.0
_TRIES = 2  # of a group of which no cell ends in the time of a job


class Line(NamedTuple):
    """Of a mailbox: an `Event`'s kind or another, and what belongs to it."""

    kind: str
    cell_id: str | None = None
    text: str = ""
    content: Any = None


class Mailbox:
    """Lines in one file, from a job to the driver or back. Other machines see each at once, as the file is closed."""

    def __init__(self, directory: Path, name: str):
        self.path = directory / FOLDER / f"{name}{SUFFIX}"
        self._lock = threading.Lock()
        self._n_read = 0

    def put(self, line: Line) -> None:
        """Append a line."""
        with self._lock, open(store.open_to_append(self.path), "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def make(self) -> None:
        """Make the empty file: a network file system may remember for a minute that there was none."""
        os.close(store.open_to_append(self.path))

    def new(self) -> list[Line]:
        """The lines that came since the last call."""
        try:
            files.require_plain(self.path, None)
            with open(self.path, "rb") as file:
                file.seek(self._n_read)
                content = file.read()
        except OSError:
            return []  # nothing was said yet
        whole = content[: content.rfind(b"\n") + 1]
        self._n_read += len(whole)
        return [Line(*json.loads(line)) for line in whole.splitlines()]


def take(directory: Path, group: str, by: str) -> bool:
    """Take a group, unless it is taken. A link is made in one step, on a network file system too."""
    try:
        os.symlink(by, directory / FOLDER / f"{group}{TAKEN}")
    except FileExistsError:
        return False
    return True


def taken_by(directory: Path, group: str) -> str | None:
    """The job that has a group; None if it waits."""
    try:
        return os.readlink(directory / FOLDER / f"{group}{TAKEN}")
    except OSError:
        return None


def has_ended(directory: Path, group: str) -> bool:
    """Whether nothing more will be told of a group."""
    return any(line.kind in ENDS for line in Mailbox(directory, group).new())


@dataclass(frozen=True)
class GroupJob:
    """What `run_groups` is called with; pickled."""

    task: Task
    setup: Setup
    limit_s: int
    n_in_array: int
    stood: Mapping[str, tuple[int, int] | None]
    """The `store.mark` of each cell's record when the job was submitted."""

    @classmethod
    def of(cls, task: Task, setup: Setup, limit_s: int, n_in_array: int) -> GroupJob:
        """Of a task that is submitted now."""
        return cls(task, setup, limit_s, n_in_array, {cell.cell_id: store.mark(cell.directory) for cell in task.cells})

    def left(self) -> tuple[Cell, ...]:
        """The cells that did not end since then; one that was interrupted did not."""
        return tuple(cell for cell in self.task.cells if not self._has_ended(cell))

    def _has_ended(self, cell: Cell) -> bool:
        record = store.find_record(cell.directory)
        is_new = store.mark(cell.directory) != self.stood[cell.cell_id]
        return record is not None and is_new and record.cell_id == cell.cell_id and record.reason != "interrupted"


def run_groups(job: GroupJob) -> None:
    """The whole life of a job that times groups.

    It takes another while half of its time is left: so a group that needs less than half never meets the limit.
    """
    running = _Running(job)
    try:
        for group, of_array in _taken(job):
            if not running.run(group, of_array) or time.monotonic() - running.started > job.limit_s / 2:
                return
    finally:
        running.close()


def _taken(job: GroupJob) -> Iterator[tuple[str, GroupJob]]:
    """The group that this job had when it was put back, its own, and those of its array that are not taken."""
    number, directory = job_number(), Path(job.setup.directory)
    array = number.partition("_")[0]
    others = (f"{array}_{place}" for place in range(job.n_in_array if job.n_in_array > 1 else 0))
    groups = [number, *(other for other in others if other != number)]
    for group in groups:
        if taken_by(directory, group) == number and not has_ended(directory, group):
            yield group, _pickled(directory, group)
    for group in groups:
        if (directory / FOLDER / f"{group}{PICKLE}").exists() and take(directory, group, number):
            yield group, _pickled(directory, group)


def _pickled(directory: Path, group: str) -> GroupJob:
    from submitit.core.utils import DelayedSubmission

    (found,) = DelayedSubmission.load(directory / FOLDER / f"{group}{PICKLE}").args
    assert isinstance(found, GroupJob)
    return found


class _Running:
    """A job that runs: its host, and the group that it times."""

    def __init__(self, job: GroupJob):
        self.signals, self.started = _Signals(), time.monotonic()
        self._slot = slot_here(job_number())
        self._host: Host | None = None
        self._ends: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._job = job
        self._mailbox = Mailbox(Path(job.setup.directory), job_number())

    def close(self) -> None:
        """End the worker."""
        if self._host is not None:
            self._host.close()

    def run(self, group: str, job: GroupJob) -> bool:
        """Time a group, or what is left of it. Returns whether this job may take another."""
        self._job, self._mailbox = job, Mailbox(Path(job.setup.directory), group)
        left = job.left()
        for cell in job.task.cells:
            if cell not in left:  # it ended before the job was put back
                self._mailbox.put(Line("cell", cell.cell_id))
        if not left:
            self._mailbox.put(Line("end"))
            return True
        if self._host is None:
            try:
                with self.signals.blocked():
                    self._host = _open(self._slot, job.setup, self._tell)
            except (OSError, UnavailableError, ValueError) as error:
                self._mailbox.put(Line("broken", text=str(error), content=self._slot.node))
                return False
            self.signals.stop(self._host)
        event = _run(self._host, replace(job.task, cells=left), self._ends)
        if event.kind == "stopped" and self.signals.first == signal.SIGTERM:
            return False  # Slurm knows why: cancelled, or it makes place for another and is put back
        if event.kind == "stopped" and self.signals.first == signal.SIGUSR2:
            early = slurm.warning_s(job.limit_s) + _EARLY_S
            _go_on_later(self._mailbox, job, has_met_limit=time.monotonic() - self.started > job.limit_s - early)
            return False
        self._mailbox.put(Line(event.kind, text=event.text, content=event.node))
        return event.kind == "end" and self.signals.first is None

    def _tell(self, event: Event) -> None:
        if event.kind in ENDS:
            self._ends.put(event)
        elif event.kind == "begun":
            self._mailbox.put(Line("begun", None, job_number(), event.node))
        elif event.kind != "cell" or self.signals.are_from_driver or self._is_over(event.cell_id):
            self._mailbox.put(Line(event.kind, event.cell_id, event.text, event.node))

    def _is_over(self, cell_id: str | None) -> bool:
        return cell_id not in {cell.cell_id for cell in self._job.left()}


def _run(host: Host, task: Task, ends: queue.SimpleQueue[Event]) -> Event:
    """The event with which the task ends."""
    slot = host.slot
    try:
        try:
            reason = _other_kind(host, task.cells)
        except WorkerLostError:  # somebody may have killed it; another is started
            reason = _other_kind(host, task.cells)
    except KeyboardInterrupt:  # it was stopped before it began
        return Event("stopped", slot.name, slot.node)
    except WorkerLostError as lost:
        return Event("broken", slot.name, slot.node, text=f"no worker could start: {lost}")
    if reason is not None:
        return Event("refused", slot.name, slot.node, text=reason)
    host.start(task)
    while True:
        with suppress(queue.Empty):
            return ends.get(timeout=_TICK_S)  # signals are seen between two waits


def _open(slot: Slot, setup: Setup, tell: Callable[[Event], None]) -> Host:
    """The host of this job; its CPUs may be taken for a moment by what runs here without Slurm."""
    deadline = time.monotonic() + _CLAIM_S
    while True:
        try:
            return Host(slot, setup, tell)
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_TICK_S)


def _go_on_later(mailbox: Mailbox, job: GroupJob, *, has_met_limit: bool) -> None:
    """Put the job back into the queue, unless its time is too short for a single cell."""
    left = job.left()
    mailbox.put(Line("limit" if has_met_limit else "preempted", None, f"{len(left)} cells are left", len(left)))
    n_left = [line.content for line in mailbox.new() if line.kind == "limit"]
    if has_met_limit and len(n_left) >= _TRIES and len(set(n_left[-_TRIES:])) == 1:
        for cell in left:
            timing.write(
                cell,
                "failed",
                f"timeout: its group takes longer than sweep.slurm.time: {_TRIES} jobs met that limit and no cell "
                "ended; set a longer one, or a shorter measure.max_time_s",
            )
            mailbox.put(Line("cell", cell.cell_id))
        mailbox.put(Line("end"))
        return
    slurm.requeue(os.environ["SLURM_JOB_ID"])


def _other_kind(host: Host, cells: Sequence[Cell]) -> str | None:
    """Why these cells would be others here: the plan asked a node of another kind."""
    for cell in {cell.config["device"]["name"]: cell for cell in cells}.values():
        (seen,) = host.ask("look", [cell.config], False)
        if seen["env_id"] not in cell.env_ids:
            return (
                f"unavailable: {host.slot.node} is of another kind than the node that the plan asked "
                f"({seen['env']['device_name']}); set sweep.slurm.constraint or partition to one kind"
            )
    return None


class _Signals:
    """The driver's, the one before the time limit, and that of `scancel`: each stops the host at the end of a step.

    Slurm sends them to all processes of a job, so the host's thread and the worker are started with them blocked.
    """

    _NUMBERS = (signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM)

    def __init__(self) -> None:
        self.first: int | None = None
        self._host: Host | None = None
        for number in self._NUMBERS:
            signal.signal(number, self._on_signal)

    @property
    def are_from_driver(self) -> bool:
        """Whether it stops the sweep: cells that are interrupted are not timed again in this job."""
        return self.first == signal.SIGHUP

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While the host is made."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._NUMBERS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._NUMBERS)

    def stop(self, host: Host) -> None:
        """Stop this host when one comes, or now if one came."""
        self._host = host
        if self.first is not None:
            host.stop()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.first = self.first or number
        if self._host is not None:
            self._host.stop()


def answer(setup: Setup) -> None:
    """The whole life of a job that answers the plan's questions, each a line of the driver's mailbox."""
    number, directory = job_number(), Path(setup.directory)
    questions, answers = Mailbox(directory, f"{number}_questions"), Mailbox(directory, number)
    with _Signals().blocked():  # a signal before a limit is of no interest
        host = _open(slot_here(number), setup, lambda event: None)
    try:
        answers.put(Line("begun", None, host.slot.node, identity.code_id(())))
        last = time.monotonic()
        while time.monotonic() - last < _IDLE_S:
            for line in questions.new():
                if line.kind == "close":
                    return
                answers.put(_answered(host, line.content))
                last = time.monotonic()
            time.sleep(_TICK_S)
    finally:
        host.close()


def _answered(host: Host, question: Sequence[Any]) -> Line:
    try:
        return Line("answer", content=host.ask(*question))
    except WorkerLostError as lost:
        return Line("lost", text=str(lost))
    except Exception as error:
        return Line("error", text=f"{type(error).__name__}: {error}")


def job_number() -> str:
    """This job as `squeue --array` calls it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def slot_here(job: str) -> Slot:
    """What Slurm gave this job: as many CPUs as it says, and its GPU; without one it sees none."""
    n_cpus = min(int(os.environ.get("SLURM_CPUS_ON_NODE", "1")), len(usable_cpus()))
    has_gpu = any(os.environ.get(name) for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"))
    gpu = os.environ.get(VISIBLE, "").split(",")[0] if has_gpu else ""
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    return Slot(f"slurm-{job}", node, "cuda" if gpu else "cpu", n_cpus, gpu)
