"""The slots of a sweep: who takes the next group, and what the hosts tell. Imports no torch.

`HostPool` has hosts that stay, in threads of this process (`LocalPool`) or elsewhere.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_lab.errors import UnavailableError
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.host import Host
from moe_lab.sweep.kinds import Kind
from moe_lab.sweep.slots import Slot
from moe_lab.sweep.tasks import Event, Setup, Task


class Pool(Protocol):
    """Runs the groups of a sweep, several at once."""

    def names(self) -> list[str]:
        """The slots in service."""
        ...

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `kinds.HasKinds`."""
        ...

    def start(self, waiting: Sequence[Task]) -> list[Task]:
        """Start what can be started now; returns those."""
        ...

    def may_start(self, task: Task) -> bool:
        """Whether a slot in service, now or when it is free, can run the task."""
        ...

    def events(self, timeout_s: float) -> list[Event]:
        """What happened; waits for something until the time is over."""
        ...

    def drain(self) -> None:
        """Start nothing more of what was given; each task that did not begin is told of as `stopped`."""
        ...

    def stop(self) -> None:
        """End all tasks at the end of their present step; each is told of as `stopped`."""
        ...

    def close(self) -> None:
        """End the workers and give the slots free."""
        ...


class AnyHost(Protocol):
    """A `Host`, here or elsewhere."""

    def ask(self, step: str, *arguments: Any) -> Any: ...
    def start(self, task: Task) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Seat:
    """A slot in service."""

    slot: Slot
    host: AnyHost
    env_ids: set[str | None] = field(default_factory=set)
    task: Task | None = None

    def can_run(self, task: Task) -> bool:
        """Whether it can, now or later."""
        return self.slot.node not in task.not_on and task.runs_on(self.env_ids)


class HostPool:
    """A pool of hosts that stay for the whole sweep; see `Pool`. Who derives from it says how events come."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self._given_up: list[Event] = []  # of slots that nobody told of yet

    def receive(self, timeout_s: float) -> list[Event]:
        """What the hosts told since, and who was lost; waits for something until the time is over."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """See `Pool.names`."""
        return list(self.seats)

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `kinds.HasKinds`. All slots are asked at once, as each starts a worker first; who cannot is given up."""

        def look(seat: Seat) -> Any:
            try:
                return seat.host.ask("look", configs, False)
            except WorkerLostError as lost:
                return lost

        names = [config["device"]["name"] for config in configs]
        with _for_each(self.seats) as asking:
            answers = list(asking.map(look, self.seats.values()))
        found: dict[tuple[str | None, ...], Kind] = {}
        for seat, seen in zip(list(self.seats.values()), answers, strict=True):
            if isinstance(seen, WorkerLostError):
                self.give_up(seat, f"no worker could start: {seen}")
                continue
            env_ids = tuple(one["env_id"] for one in seen)
            seat.env_ids = set(env_ids)
            kind = found.setdefault(env_ids, Kind(dict(zip(names, env_ids, strict=True)), [], self._ask(set(env_ids))))
            kind.slots.append(seat.slot.name)
        if not found:
            raise UnavailableError("; ".join(f"{event.slot}: {event.text}" for event in self._given_up))
        return list(found.values())

    def give_up(self, seat: Seat, reason: str) -> None:
        """Take a slot out of service."""
        self.seats.pop(seat.slot.name, None)
        self._given_up.append(Event("broken", seat.slot.name, seat.slot.node, text=reason))
        with suppress(Exception):  # it may be gone
            seat.host.close()

    def _ask(self, env_ids: set[str | None]) -> Callable[..., Any]:
        """The answer of a slot of a kind, whichever is there."""

        def ask(step: str, *arguments: Any) -> Any:
            seat = next((seat for seat in self.seats.values() if seat.env_ids == env_ids), None)
            if seat is None:
                raise WorkerLostError("no slot of its kind is left")
            return seat.host.ask(step, *arguments)

        return ask

    def start(self, waiting: Sequence[Task]) -> list[Task]:
        """See `Pool.start`. In the order given, but a task waits for a slot like that of the rest of its setting."""
        started: list[Task] = []
        wanted = {env_id for seat in self.seats.values() for env_id in seat.env_ids}
        for seat in self.seats.values():
            if seat.task is not None:
                continue
            fitting = (task for task in waiting if task not in started and seat.can_run(task))
            own = (task for task in fitting if task.wanted not in wanted or task.wanted in seat.env_ids)
            if (task := next(own, None)) is not None:
                seat.task = task
                seat.host.start(task)
                started.append(task)
        return started

    def may_start(self, task: Task) -> bool:
        """See `Pool.may_start`."""
        return any(seat.can_run(task) for seat in self.seats.values())

    def events(self, timeout_s: float) -> list[Event]:
        """See `Pool.events`."""
        found, self._given_up = self._given_up, []
        for event in self.receive(0 if found else timeout_s):
            if (seat := self.seats.get(event.slot)) is None:
                continue  # of one that was given up
            if event.kind == "lost" and event.task is None and seat.task is not None:
                event = event._replace(task=seat.task.number)
            if event.kind in ("end", "stopped", "refused"):
                seat.task = None
            if event.kind in ("broken", "lost"):
                del self.seats[event.slot]
                with suppress(Exception):  # it is gone anyway
                    seat.host.close()
            found.append(event)
        return found

    def drain(self) -> None:
        """See `Pool.drain`: a host begins at once."""

    def stop(self) -> None:
        """See `Pool.stop`."""
        for seat in self.seats.values():
            if seat.task is not None:
                seat.host.stop()

    def close(self) -> None:
        """See `Pool.close`. All at once: each waits for the end of a process."""
        with _for_each(self.seats) as closing:
            list(closing.map(lambda seat: seat.host.close(), self.seats.values()))
        self.seats = {}


class LocalPool(HostPool):
    """Slots of this machine, each a thread of this process."""

    def __init__(self, slots: Sequence[Slot], setup: Setup):
        """Start them, without waiting for their workers. Raises `UnavailableError` if a slot is not free."""
        super().__init__()
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            for slot in slots:
                self.seats[slot.name] = Seat(slot, Host(slot, setup, self._told.put))
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float) -> list[Event]:
        """See `HostPool.receive`."""
        return taken(self._told, timeout_s)


def _for_each(seats: Mapping[str, Seat]) -> ThreadPoolExecutor:
    """A thread for each."""
    return ThreadPoolExecutor(max(1, len(seats)))


def taken(told: queue.SimpleQueue[Event], timeout_s: float) -> list[Event]:
    """What is in the queue; waits for something until the time is over."""
    found = []
    with suppress(queue.Empty):
        found.append(told.get(timeout=timeout_s))
        while True:
            found.append(told.get_nowait())
    return found
