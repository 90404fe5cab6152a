"""Slots on the nodes of a Ray cluster: an actor for each, with a host as on this machine.

Only this file and `ray_cluster` import ray.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.util
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from moe_lab.errors import UnavailableError
from moe_lab.sweep import parcel
from moe_lab.sweep.engine import START_S, WorkerLostError
from moe_lab.sweep.host import Host
from moe_lab.sweep.kinds import Kind
from moe_lab.sweep.nodes import slots_of
from moe_lab.sweep.pool import HostPool, Seat, taken
from moe_lab.sweep.ray_cluster import NAMESPACE, connect, fit_nodes, line_of, nodes_of_cluster, on
from moe_lab.sweep.scratch import Scratch
from moe_lab.sweep.slots import Slot
from moe_lab.sweep.tasks import Event, Setup, Task

_POLL_S = 30.0  # how long an actor waits for something to tell
_CLOSE_S = 10.0
_SAY_S = 15.0  # a wait for slots that is longer is told
_LEFT_S = 60.0  # how long the actors of a driver that was killed may take to end
_AGAIN_S = 0.5
_MOST_RESTARTS = 3  # of one slot whose node is there
_OPEN_S = 120.0  # how long a slot that starts again may take: its node may go meanwhile, or be taken by other work


class SlotActor:
    """On the node: a host, and what it tells until the driver asks for it."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._host: Any = None

    def open(self, slot: Slot, setup: Setup) -> str | None:
        """Start the host. Returns None, or why the slot cannot be opened."""
        with suppress(OSError):  # Ray starts it at 15, so that others go first; only some users may change that
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        with suppress(OSError):  # a folder that is not there: what has a relative path is missing, and said to be
            os.chdir(setup.cwd)
        trusted = parcel.plugins_here(len(setup.trusted))
        try:
            self._host = Host(slot, replace(setup, trusted=trusted), self._told.put)
        except (UnavailableError, ValueError, OSError) as error:
            return str(error)
        return None

    def events(self, timeout_s: float) -> list[Event]:
        """What was told since; waits for something until the time is over."""
        return taken(self._told, timeout_s)

    def ask(self, step: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """See `Host.ask`; (whether it is the answer, or else why the worker was lost)."""
        try:
            return True, self._host.ask(step, *arguments)
        except WorkerLostError as lost:
            return False, str(lost)

    def start(self, task: Task) -> None:
        """See `Host.start`."""
        self._host.start(task)

    def stop(self) -> None:
        """See `Host.stop`."""
        self._host.stop()

    def close(self) -> None:
        """See `Host.close`."""
        if self._host is not None:
            self._host.close()


class _RayHost:
    """The driver's handle of a `SlotActor`; see `pool.AnyHost`."""

    def __init__(self, actor: Any):
        self.actor = actor
        self.is_open = False

    def ask(self, step: str, *arguments: Any) -> Any:
        try:
            is_answer, answer = ray.get(self.actor.ask.remote(step, arguments), timeout=START_S)
        except RayActorError as error:
            raise WorkerLostError(f"the slot is gone: {line_of(error)}") from error
        except GetTimeoutError as error:
            raise WorkerLostError(f"timeout: {step}") from error
        if not is_answer:
            raise WorkerLostError(answer)
        return answer

    def start(self, task: Task) -> None:
        self.actor.start.remote(task)

    def stop(self) -> None:
        self.actor.stop.remote()

    def close(self) -> None:
        if self.is_open:  # one that never was does not answer
            with suppress(RayError):
                ray.get(self.actor.close.remote(), timeout=_CLOSE_S)
        ray.kill(self.actor)


class RayPool(HostPool):
    """The slots of a cluster."""

    def __init__(self, wanted: Mapping[str, Any], setup: Setup, say: Callable[[str], None]):
        """Connect to the cluster of `RAY_ADDRESS`, or start one here, and begin to open the slots.

        `kinds` waits for them: until then a sweep can be composed.

        Raises:
            UnavailableError: no cluster answers, or it has too few CPUs or GPUs.
        """
        super().__init__()
        self._setup, self._say = setup, say
        self._polls: dict[Any, str] = {}
        self._first: dict[Any, tuple[Slot, Any]] = {}  # the slots that are opened for the first time, and their actors
        self._opening: dict[Any, tuple[Seat, float]] = {}  # those that start again, and until when
        self._n_restarts: dict[str, int] = {}
        self._parcel = Scratch()
        try:
            is_own = connect([str(path) for path in parcel.pack(self._parcel.path, setup.trusted)], say)
            nodes = fit_nodes(nodes_of_cluster(), say, are_here=is_own)
            self._places = slots_of(nodes, wanted)
            _wait_until_free(self._name(""))
            actors = {slot: self._actor(slot) for slot in self._places}
            self._first = {actor.open.remote(slot, setup): (slot, actor) for slot, actor in actors.items()}
        except BaseException:
            self.close()
            raise

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `kinds.HasKinds`. A slot that cannot be opened is given up."""
        self._seat_first(_SAY_S)
        if self._first:
            names = ", ".join(slot.name for slot, _ in self._first.values())
            self._say(f"waiting for {names}: other work on the cluster may have the CPUs or GPUs")
        self._seat_first(START_S)
        for slot, actor in self._first.values():
            self.give_up(Seat(slot, _RayHost(actor)), f"it did not open within {_SAY_S + START_S:.0f} s")
        self._first = {}
        return super().kinds(configs)

    def _seat_first(self, timeout_s: float) -> None:
        """Take into service what is open by then."""
        if not self._first:
            return
        ready, _ = ray.wait(list(self._first), num_returns=len(self._first), timeout=timeout_s)
        for ref in ready:
            slot, actor = self._first.pop(ref)
            try:
                mistake = ray.get(ref)
            except RayError as error:
                mistake = line_of(error)
            if mistake is None:
                self._seat(slot, actor)
            else:
                self.give_up(Seat(slot, _RayHost(actor)), mistake)

    def _name(self, of: str) -> str:
        """Of the actor of a slot: by this a later driver knows that an earlier one's is still there."""
        return f"moe-lab:{self._setup.directory}:{of}"

    def _actor(self, slot: Slot) -> Any:
        options: dict[str, Any] = {
            "num_cpus": slot.n_cpus,
            "num_gpus": 1 if slot.device == "cuda" else 0,
            "scheduling_strategy": on(self._places[slot]),
            "name": self._name(f"{slot.name}:{self._n_restarts.get(slot.name, 0)}"),
            "namespace": NAMESPACE,
            "max_concurrency": 8,  # to be stopped, asked and listened to while it waits
        }
        return ray.remote(SlotActor).options(**options).remote()

    def _seat(self, slot: Slot, actor: Any, env_ids: set[str | None] | None = None) -> None:
        host = _RayHost(actor)
        host.is_open = True
        self.seats[slot.name] = Seat(slot, host, env_ids or set())
        self._polls[actor.events.remote(_POLL_S)] = slot.name

    def may_start(self, task: Task) -> bool:
        """See `Pool.may_start`; a slot that starts again counts."""
        return super().may_start(task) or any(seat.can_run(task) for seat, _ in self._opening.values())

    def receive(self, timeout_s: float) -> list[Event]:
        """See `HostPool.receive`."""
        found: list[Event] = []
        waited_for = [*self._polls, *self._opening]
        ready, _ = ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
        if not ready and waited_for:
            ready, _ = ray.wait(waited_for, num_returns=1, timeout=timeout_s)
        for ref in ready:
            if ref in self._opening:
                self._is_open(ref)
            elif (name := self._polls.pop(ref)) in self.seats:
                found += self._told(ref, self.seats[name])
        for ref, (seat, ends_at) in list(self._opening.items()):
            if time.monotonic() > ends_at:
                del self._opening[ref]
                self.give_up(seat, f"it did not start again within {_OPEN_S:.0f} s; is other work in its place?")
        return found

    def _told(self, ref: Any, seat: Seat) -> list[Event]:
        assert isinstance(seat.host, _RayHost)
        events: list[Event] = []
        try:
            events = ray.get(ref)
        except ActorUnavailableError:  # it may be there still and write; the cluster finds out within seconds
            time.sleep(_AGAIN_S)
        except RayActorError as error:
            is_there = self._places[seat.slot].id in {node.id for node in nodes_of_cluster()}
            text = "its process ended" if is_there else "its node is gone"
            if is_there and not self._open_again(seat):
                text += f", for the {_MOST_RESTARTS + 1}th time, so it is not started again"
            return [Event("lost", seat.slot.name, seat.slot.node, text=f"{text} ({line_of(error)})")]
        self._polls[seat.host.actor.events.remote(_POLL_S)] = seat.slot.name
        return events

    def _open_again(self, seat: Seat) -> bool:
        """Start it again, unless it was lost too often."""
        name = seat.slot.name
        self._n_restarts[name] = self._n_restarts.get(name, 0) + 1
        if self._n_restarts[name] > _MOST_RESTARTS:
            return False
        actor = self._actor(seat.slot)
        again = Seat(seat.slot, _RayHost(actor), seat.env_ids)
        self._opening[actor.open.remote(seat.slot, self._setup)] = again, time.monotonic() + _OPEN_S
        return True

    def _is_open(self, ref: Any) -> None:
        seat, _ = self._opening.pop(ref)
        assert isinstance(seat.host, _RayHost)
        try:
            mistake = ray.get(ref)
        except RayError as error:  # its node went in the meantime
            mistake = f"it did not start again: {line_of(error)}"
        if mistake is None:
            self._seat(seat.slot, seat.host.actor, seat.env_ids)
        else:
            self.give_up(seat, mistake)

    def close(self) -> None:
        """See `Pool.close`; a cluster that was started here ends."""
        with suppress(RayError):  # nobody waited for these; one that is killed while it opens may leave files
            self._seat_first(_CLOSE_S)
        super().close()
        ray.shutdown()
        self._parcel.close()


def _wait_until_free(begins: str) -> None:
    """Until the actors of a driver that was killed have ended: two must not write into one folder."""
    ends_at = time.monotonic() + _LEFT_S
    while left := [name for name in ray.util.list_named_actors() if name.startswith(begins)]:
        if time.monotonic() > ends_at:
            raise UnavailableError(f"sweep.engine=ray: the actor {left[0]} of an earlier start has not ended; end it.")
        time.sleep(0.2)
