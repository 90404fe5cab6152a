"""What runs in a job of Slurm: a host that times one group, or answers the questions of the plan. Imports no torch.

A job tells the driver by lines in a file beside submitit's (`Mailbox`), so the driver may be killed and started again.
A job that is started again (put back into the queue after its time limit, a preemption or the loss of its node) does
what is left of its group.
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
SUFFIX = ".jsonl"
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


@dataclass(frozen=True)
class GroupJob:
    """What `run_group` is called with; pickled."""

    task: Task
    setup: Setup
    limit_s: int
    stood: Mapping[str, tuple[int, int] | None]
    """The `store.mark` of each cell's record when the job was submitted."""

    @classmethod
    def of(cls, task: Task, setup: Setup, limit_s: int) -> GroupJob:
        """Of a task that is submitted now."""
        return cls(task, setup, limit_s, {cell.cell_id: store.mark(cell.directory) for cell in task.cells})

    def left(self) -> tuple[Cell, ...]:
        """The cells that did not end since then; one that was interrupted did not."""
        return tuple(cell for cell in self.task.cells if not self._has_ended(cell))

    def _has_ended(self, cell: Cell) -> bool:
        record = store.find_record(cell.directory)
        is_new = store.mark(cell.directory) != self.stood[cell.cell_id]
        return record is not None and is_new and record.cell_id == cell.cell_id and record.reason != "interrupted"


def run_group(job: GroupJob) -> None:
    """The whole life of a job that times a group."""
    signals, started = _Signals(), time.monotonic()
    number = job_number()
    mailbox = Mailbox(Path(job.setup.directory), number)
    left = job.left()
    for cell in job.task.cells:
        if cell not in left:  # it ended before the job was put back
            mailbox.put(Line("cell", cell.cell_id))
    if not left:
        mailbox.put(Line("end"))
        return
    ends: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def tell(event: Event) -> None:
        if event.kind in ENDS:
            ends.put(event)
        elif event.kind != "cell" or signals.are_from_driver or event.cell_id not in {c.cell_id for c in job.left()}:
            mailbox.put(Line(event.kind, event.cell_id, event.text, event.node))

    slot = slot_here(number)
    try:
        with signals.blocked():
            host = _open(slot, job.setup, tell)
    except (OSError, UnavailableError, ValueError) as error:
        mailbox.put(Line("broken", text=str(error), content=slot.node))
        return
    signals.stop(host)
    try:
        event = _run(host, replace(job.task, cells=left), ends)
    finally:
        host.close()
    if event.kind == "stopped" and signals.first == signal.SIGTERM:
        return  # Slurm knows why: cancelled, or it makes place for another and is put back
    if event.kind == "stopped" and signals.first == signal.SIGUSR2:
        early = slurm.warning_s(job.limit_s) + _EARLY_S
        _go_on_later(mailbox, job, has_met_limit=time.monotonic() - started > job.limit_s - early)
    else:
        mailbox.put(Line(event.kind, text=event.text, content=event.node))


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
                cell, "failed", f"timeout: {_TRIES} jobs met sweep.slurm.time and no cell ended; set a longer one"
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
