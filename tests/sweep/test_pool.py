"""sweep/pool.py: which slot takes which group. Real hosts are in test_host.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.pool import HostPool, Seat
from moe_lab.sweep.slots import Slot
from moe_lab.sweep.tasks import Event, Task

Act = Callable[[Slot, Task], list[Event]]


class ActedHost:
    """Tells what a test says, in place of a worker."""

    def __init__(self, slot: Slot, act: Act, told: list[Event]):
        self.slot, self.act, self.told = slot, act, told
        self.tasks: list[Task] = []
        self.is_stopped = self.is_closed = False

    def ask(self, step: str, *arguments: Any) -> Any:
        """One kind for each letter that a slot's name begins with."""
        return [{"env_id": self.slot.name[0]} for _ in arguments[0]]

    def start(self, task: Task) -> None:
        """What comes of it is known at once."""
        self.tasks.append(task)
        self.told += self.act(self.slot, task)

    def stop(self) -> None:
        """As if the step had ended."""
        self.is_stopped = True
        self.told.append(Event("stopped", self.slot.name, self.slot.node, self.tasks[-1].number))

    def close(self) -> None:
        """Nothing more is told."""
        self.is_closed = True


class ActedPool(HostPool):
    """Slots with the names given; the node is all before the last letter."""

    def __init__(self, names: list[str], act: Act):
        super().__init__()
        self.told: list[Event] = []
        for name in names:
            slot = Slot(name, name[:-1], "cpu", 1, "")
            self.seats[name] = Seat(slot, ActedHost(slot, act, self.told), {name[0]})

    def receive(self, timeout_s: float) -> list[Event]:
        """All that was told."""
        found = list(self.told)
        self.told.clear()
        return found


def cell(cell_id: str, env_ids: list[str | None]) -> Cell:
    return Cell(cell_id, Path(cell_id), {}, {}, {}, "code", "setting", env_ids=env_ids)


def task(number: int, env_ids: str = "ab", **more: Any) -> Task:
    return Task(number, (cell(f"c{number}", list(env_ids)),), None, 600, False, **more)


def nothing(slot: Slot, task: Task) -> list[Event]:
    """It runs and runs."""
    return []


def started(pool: ActedPool, waiting: list[Task]) -> dict[str, int]:
    pool.start(waiting)
    return {name: seat.task.number for name, seat in pool.seats.items() if seat.task is not None}


def test_slots_are_told_apart_by_what_they_measure_as() -> None:
    """One of each kind is asked for the rest."""
    kinds = ActedPool(["a1", "a2", "b1"], nothing).kinds([{"device": {"name": "auto"}}])
    assert [(kind.env_ids, kind.slots) for kind in kinds] == [
        ({"auto": "a"}, ["a1", "a2"]),
        ({"auto": "b"}, ["b1"]),
    ]


class BrokenHost(ActedHost):
    """Its node has no torch."""

    def ask(self, step: str, *arguments: Any) -> Any:
        """The worker ends at once."""
        raise WorkerLostError("crash: exit code 1 (No module named 'torch')")


def test_a_slot_whose_worker_cannot_start_is_given_up() -> None:
    """The others go on. If there is none, it is an error with the reason of each."""
    pool = ActedPool(["a1", "a2"], nothing)
    pool.seats["a1"].host = host = BrokenHost(pool.seats["a1"].slot, nothing, [])
    (kind,) = pool.kinds([{"device": {"name": "auto"}}])
    assert (kind.slots, pool.names(), host.is_closed) == (["a2"], ["a2"], True)
    (event,) = pool.events(0)
    text = "no worker could start: crash: exit code 1 (No module named 'torch')"
    assert (event.kind, event.slot, event.text) == ("broken", "a1", text)
    assert pool.events(0) == []
    pool.seats["a2"].host = BrokenHost(pool.seats["a2"].slot, nothing, [])
    with pytest.raises(UnavailableError, match=r"^a2: no worker could start: crash: exit code 1 \(No module named"):
        pool.kinds([{"device": {"name": "auto"}}])


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        pytest.param([task(1), task(2), task(3)], {"a1": 1, "a2": 2, "b1": 3}, id="in-order"),
        pytest.param([task(1, "b"), task(2)], {"b1": 1, "a1": 2}, id="where-it-can-run"),
        pytest.param([task(1, wanted="b"), task(2)], {"b1": 1, "a1": 2}, id="where-its-setting-ran"),
        pytest.param([task(1, wanted="gone")], {"a1": 1}, id="its-kind-is-gone"),
        pytest.param([task(1, not_on={"a": "no checkpoint"})], {"b1": 1}, id="not-on-a-node-that-refused"),
        pytest.param([task(1, "c")], {}, id="nowhere"),
    ],
)
def test_a_free_slot_takes_the_first_that_it_can_run(waiting: list[Task], expected: dict[str, int]) -> None:
    """In the order of the sweep."""
    assert started(ActedPool(["a1", "a2", "b1"], nothing), waiting) == expected


def test_another_slot_of_a_kind_answers_when_one_is_lost() -> None:
    """Until there is none."""
    pool = ActedPool(["a1", "a2"], nothing)
    (kind,) = pool.kinds([{"device": {"name": "auto"}}])
    for name in ("a1", "a2"):
        assert kind.ask("look", [{}]) == [{"env_id": "a"}]
        pool.told.append(Event("lost", name, "a", text="gone"))
        pool.events(0)
    with pytest.raises(WorkerLostError, match="no slot of its kind is left"):
        kind.ask("look", [{}])


def test_a_slot_has_one_group_at_a_time() -> None:
    """The next when that has ended, was refused or stopped; who is lost gets none, and its task is named."""
    pool = ActedPool(["a1", "a2"], nothing)
    waiting = [task(number) for number in range(1, 6)]
    assert [one.number for one in pool.start(waiting)] == [1, 2]
    assert pool.start(waiting[2:]) == []
    pool.told += [Event("end", "a1", "a", 1), Event("lost", "a2", "a", text="its node is gone")]
    assert [(event.kind, event.task) for event in pool.events(0)] == [("end", 1), ("lost", 2)]
    assert pool.names() == ["a1"]
    assert [one.number for one in pool.start(waiting[2:])] == [3]
    assert pool.may_start(waiting[3]) and not pool.may_start(task(9, "b"))


def test_all_that_run_are_stopped_and_all_are_closed() -> None:
    """One that has nothing to do is not told to stop."""
    pool = ActedPool(["a1", "a2"], nothing)
    hosts = [seat.host for seat in pool.seats.values()]
    pool.start([task(1)])
    pool.stop()
    pool.close()
    assert [(host.is_stopped, host.is_closed) for host in hosts if isinstance(host, ActedHost)] == [
        (True, True),
        (False, True),
    ]
