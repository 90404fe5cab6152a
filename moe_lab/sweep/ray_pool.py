"""Slots on the nodes of a Ray cluster: an actor for each, with a host as on this machine.

Only this file imports ray.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_lab.errors import UnavailableError
from moe_lab.sweep import parcel
from moe_lab.sweep.engine import START_S, WorkerLostError
from moe_lab.sweep.pool import HostPool, Seat
from moe_lab.sweep.slots import Slot, cpus_each, usable_cpus
from moe_lab.sweep.tasks import Event, Setup, Task

_NAMESPACE = "moe-lab"
_POLL_S = 30.0  # how long an actor waits for something to tell
_CLOSE_S = 10.0
_LEFT_S = 60.0  # how long the actors of a driver that was killed may take to end
_CONNECT_S = 5.0
_MOST_RESTARTS = 3  # of one slot whose node is there


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    name: str
    n_cpus: int
    n_gpus: int


class SlotActor:
    """On the node: a host, and what it tells until the driver asks for it."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._host: Any = None

    def open(self, slot: Slot, setup: Setup) -> str | None:
        """Start the host; why that cannot be."""
        from moe_lab.sweep.host import Host

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
        found = []
        with suppress(queue.Empty):
            found.append(self._told.get(timeout=timeout_s))
            while True:
                found.append(self._told.get_nowait())
        return found

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

    def ask(self, step: str, *arguments: Any) -> Any:
        try:
            is_answer, answer = ray.get(self.actor.ask.remote(step, arguments), timeout=START_S)
        except RayActorError as error:
            raise WorkerLostError(f"the slot is gone: {_line(error)}") from error
        if not is_answer:
            raise WorkerLostError(answer)
        return answer

    def start(self, task: Task) -> None:
        self.actor.start.remote(task)

    def stop(self) -> None:
        self.actor.stop.remote()

    def close(self) -> None:
        with suppress(RayError):
            ray.get(self.actor.close.remote(), timeout=_CLOSE_S)
        ray.kill(self.actor)


class RayPool(HostPool):
    """The slots of a cluster."""

    def __init__(self, wanted: Mapping[str, Any], setup: Setup, say: Callable[[str], None]):
        """Connect to the cluster of `RAY_ADDRESS`, or start one here, and open the slots.

        Raises:
            UnavailableError: there is no such cluster, or it has not what is asked for.
            ValueError: the sweep's folder cannot be seen by a node.
        """
        super().__init__()
        self._setup, self._polls, self._opening = setup, {}, {}  # type: ignore[var-annotated]
        self._n_restarts: dict[str, int] = {}
        self._parcel = Path(tempfile.mkdtemp(prefix="moe-lab-parcel-"))
        try:
            _connect([str(path) for path in parcel.pack(self._parcel, setup.trusted)], say)
            nodes = _fit_nodes(_nodes(), say)
            self._places = slots_of(nodes, wanted)
            self._open_all()
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        actors = {slot: self._actor(slot) for slot in self._places}
        opened = {actors[slot].open.remote(slot, self._setup): slot for slot in actors}
        ready, late = ray.wait(list(opened), num_returns=len(opened), timeout=START_S)
        if late:
            names = ", ".join(opened[ref].name for ref in late)
            raise UnavailableError(
                f"sweep.engine=ray: {names}: other work on the cluster has these CPUs or GPUs; wait for it, or ask for "
                "fewer with sweep.slots."
            )
        for ref in ready:
            if (mistake := ray.get(ref)) is not None:
                raise UnavailableError(mistake)
            self._seat(opened[ref], actors[opened[ref]])

    def _actor(self, slot: Slot) -> Any:
        name = f"moe-lab:{self._setup.directory}:{slot.name}"
        _wait_until_free(name)
        options: dict[str, Any] = {
            "num_cpus": slot.n_cpus,
            "num_gpus": 1 if slot.device == "cuda" else 0,
            "scheduling_strategy": _on(self._places[slot]),
            "name": name,
            "namespace": _NAMESPACE,
            "max_concurrency": 8,  # to be stopped, asked and listened to while it waits
        }
        return ray.remote(SlotActor).options(**options).remote()

    def _seat(self, slot: Slot, actor: Any, env_ids: set[str | None] | None = None) -> None:
        self.seats[slot.name] = Seat(slot, _RayHost(actor), env_ids or set())
        self._polls[actor.events.remote(_POLL_S)] = slot.name

    def may_start(self, task: Task) -> bool:
        """See `Pool.may_start`; a slot that starts again counts."""
        return super().may_start(task) or any(seat.can_run(task) for seat in self._opening.values())

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
        return found

    def _told(self, ref: Any, seat: Seat) -> list[Event]:
        try:
            events: list[Event] = ray.get(ref)
        except RayActorError as error:
            is_there = self._places[seat.slot].id in {node.id for node in _nodes()}
            text = "its process ended" if is_there else "its node is gone"
            if is_there:
                self._open_again(seat)
            return [Event("lost", seat.slot.name, seat.slot.node, text=f"{text} ({_line(error)})")]
        assert isinstance(seat.host, _RayHost)
        self._polls[seat.host.actor.events.remote(_POLL_S)] = seat.slot.name
        return events

    def _open_again(self, seat: Seat) -> None:
        name = seat.slot.name
        self._n_restarts[name] = self._n_restarts.get(name, 0) + 1
        if self._n_restarts[name] <= _MOST_RESTARTS:
            actor = self._actor(seat.slot)
            again = Seat(seat.slot, _RayHost(actor), seat.env_ids)
            self._opening[actor.open.remote(seat.slot, self._setup)] = again

    def _is_open(self, ref: Any) -> None:
        seat = self._opening.pop(ref)
        assert isinstance(seat.host, _RayHost)
        with suppress(RayError):  # the node went in the meantime
            if ray.get(ref) is None:
                self._seat(seat.slot, seat.host.actor, seat.env_ids)

    def close(self) -> None:
        """See `Pool.close`; a cluster that was started here ends."""
        super().close()
        ray.shutdown()
        shutil.rmtree(self._parcel, ignore_errors=True)


def slots_of(nodes: Sequence[Node], wanted: Mapping[str, Any]) -> dict[Slot, Node]:
    """The slots that `sweep.slots` asks for, dealt out to the nodes in turn.

    Without a number every GPU is one, or without GPUs every node.

    Raises:
        UnavailableError: the cluster has too few devices.
    """
    n_cpu, n_cuda = wanted["cpu"], wanted["cuda"]
    n_gpus = sum(node.n_gpus for node in nodes)
    if n_cpu is None and n_cuda is None:
        n_cuda, n_cpu = (n_gpus, 0) if n_gpus else (0, len(nodes))
    n_cpu, n_cuda = n_cpu or 0, n_cuda or 0
    if n_cuda > n_gpus:
        raise UnavailableError(f"sweep.slots.cuda={n_cuda}: the cluster has {n_gpus} GPUs; use fewer slots.")
    each = wanted["cpus_each"] or 1
    gpus = _dealt({node: min(node.n_gpus, node.n_cpus // each) for node in nodes}, n_cuda)
    cpus = _dealt({node: node.n_cpus // each - gpus[node] for node in nodes}, n_cpu)
    if sum(gpus.values()) < n_cuda or sum(cpus.values()) < n_cpu:
        raise UnavailableError(
            f"sweep.slots: {len(nodes)} nodes with {sum(node.n_cpus for node in nodes)} CPUs are too few for "
            f"{n_cpu + n_cuda} slots of {each} CPUs each; use fewer slots."
        )
    slots: dict[Slot, Node] = {}
    for node in nodes:
        if not (n_here := gpus[node] + cpus[node]):
            continue
        n_cpus = cpus_each(wanted["cpus_each"], node.n_cpus, n_here, node.name)
        slots |= {Slot(f"{node.name}-gpu{number}", node.name, "cuda", n_cpus): node for number in range(gpus[node])}
        slots |= {Slot(f"{node.name}-cpu{number}", node.name, "cpu", n_cpus, ""): node for number in range(cpus[node])}
    return slots


def _dealt(room: Mapping[Node, int], n: int) -> dict[Node, int]:
    """`n` dealt out in turn to those that have room; fewer if they have not."""
    dealt = dict.fromkeys(room, 0)
    while sum(dealt.values()) < n and (open_ := [node for node in room if dealt[node] < room[node]]):
        for node in open_[: n - sum(dealt.values())]:
            dealt[node] += 1
    return dealt


def _connect(modules: list[str], say: Callable[[str], None]) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    common: dict[str, Any] = {
        "namespace": _NAMESPACE,
        "runtime_env": {"py_modules": modules},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address in ("", "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        n_cpus = len(usable_cpus())
        say(f"sweep.engine=ray: RAY_ADDRESS is not set, so a cluster of this machine is started ({n_cpus} CPUs)")
        ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **common)
        return
    remedy = "start one with ray start --head, or unset RAY_ADDRESS to start one here"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UnavailableError(f"RAY_ADDRESS={address}: must be HOST:PORT of the cluster's head; {remedy}.")
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        except OSError as error:
            raise UnavailableError(f"RAY_ADDRESS={address}: no cluster answers there ({error}); {remedy}.") from error
    try:
        ray.init(address=address, **common)
    except Exception as error:  # of many kinds: no cluster, another version of ray or of Python
        raise UnavailableError(f"RAY_ADDRESS={address}: {_line(error)}; {remedy}.") from error


def _nodes() -> list[Node]:
    """The nodes that are alive; of several on one machine the names have a number."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    hosts = [str(node["NodeManagerHostname"]) for node in alive]
    found = []
    for place, (node, host) in enumerate(zip(alive, hosts, strict=True)):
        name = f"{host}-{hosts[:place].count(host)}" if hosts.count(host) > 1 else host
        resources = node["Resources"]
        found.append(Node(node["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0))))
    return found


def _fit_nodes(nodes: Sequence[Node], say: Callable[[str], None]) -> list[Node]:
    """Those with what moe-lab needs; of others a line says what they lack."""
    needed = parcel.requirements()
    lacking = ray.remote(parcel.lacking)
    asked = {
        node: lacking.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(needed)
        for node in nodes
    }
    fit, mistakes = [], []
    for node, ref in asked.items():
        try:
            lacks = ray.get(ref, timeout=START_S)
        except (RayError, GetTimeoutError) as error:
            lacks = [_line(error)]
        if lacks:
            mistakes.append(f"{node.name} lacks what moe-lab needs: {', '.join(lacks)}; install it there")
        else:
            fit.append(node)
    if not fit:
        raise UnavailableError(f"sweep.engine=ray: {'; '.join(mistakes) or 'the cluster has no node'}.")
    for line in mistakes:
        say(f"{line}; the sweep goes on without this node")
    return fit


def _on(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _wait_until_free(name: str) -> None:
    """Until the actor of a driver that was killed has ended: two must not write into one folder."""
    ends_at = time.monotonic() + _LEFT_S
    while True:
        try:
            ray.get_actor(name, namespace=_NAMESPACE)
        except ValueError:
            return
        if time.monotonic() > ends_at:
            raise UnavailableError(f"sweep.engine=ray: the actor {name} of an earlier start has not ended; end it.")
        time.sleep(0.2)


def _line(error: BaseException) -> str:
    """Ray's messages have many lines; the first that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:200]
