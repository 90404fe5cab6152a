"""One group of a sweep: cells that differ only in what is compared, timed in interleaved rounds.

Each is built, verified and its peak memory taken alone first. Then those that fit together are timed in rounds of short
blocks in shuffled order, so that drift and neighbours fall on all alike, and ratios are formed within a round. With
`measure.replicates` this repeats in fresh processes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_lab.measure import energy, statistics
from moe_lab.measure.blocks import Blocks, Seen
from moe_lab.measure.contention import Watch
from moe_lab.measure.device_lock import DeviceLock
from moe_lab.measure.energy import Meter
from moe_lab.records import store
from moe_lab.records.schema import Ratio
from moe_lab.sweep.engine import CellFailedError, Engine, WorkerLostError
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.scratch import Scratch

_SPARE = 0.8  # the share of the memory that a group may take
_LEAST_ROUNDS = 10  # for the interval of the ratios
_BLOCK_S, _SHORT_BLOCK_S = 0.1, 0.05  # of a cell alone, of one among others
_GRACE_S = 10.0  # how long an interrupted block may take to end

TimedBlock = tuple[int, int, int, np.ndarray, np.ndarray, Seen]  # replicate, round, order, ms, stamp_s, ...


@dataclass(eq=False)
class Member:
    """A cell while its group is timed."""

    cell: Cell
    folder: Path
    is_recorded: bool = True
    """False for an anchor that is done already and runs along."""
    built_in: int = -1
    """The engine's life in which it was built."""
    is_parked: bool = False
    is_finished: bool = False
    peak_bytes: int | None = None
    parameter_bytes: int = 0
    blocks: list[TimedBlock] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.cell.cell_id


class _MemberFailedError(Exception):
    """A member failed, and its record says so."""

    def __init__(self, member: Member):
        super().__init__(member.id)
        self.member = member


class Group:
    """Times the cells of one group; `run` leaves a record of each."""

    def __init__(
        self,
        cells: Sequence[Cell],
        anchor: Cell | None,
        engine: Engine,
        *,
        timeout_s: float,
        on_step: Callable[[Cell, str], None],
        on_end: Callable[[Cell], None],
        wait: bool = False,
    ):
        self.engine, self.timeout_s, self.on_step, self.on_end = engine, timeout_s, on_step, on_end
        self.members = [Member(cell, cell.directory) for cell in cells]
        self.anchor = next((member for member in self.members if member.cell is anchor), None)
        self._scratch = Scratch()  # for what runs along and is not recorded
        if anchor is not None and self.anchor is None:
            self.anchor = Member(anchor, self._scratch.path, is_recorded=False)
            self.members.insert(0, self.anchor)
        self.timed: list[Member] = []
        self._probe_ms: list[list[float]] = []  # by replicate
        assert cells[0].device_id is not None, "looked at before it is timed"
        self._lock = DeviceLock(cells[0].device_id, wait=wait, on_wait=lambda: on_step(cells[0], "wait"))
        self._watch = Watch(self._lock)
        self._measure: dict[str, Any] = cells[0].config["measure"]
        self._meter: Meter | None = None
        self.random = random.Random(cells[0].setting_id)

    def run(self) -> None:
        """Time the group.

        Raises:
            OSError: a record cannot be written.
            KeyboardInterrupt: Ctrl-C; `interrupted` then writes what is there.
        """
        try:
            with self._lock:
                if any(member.cell.config["measure"]["energy"] for member in self.members):
                    self._meter = Meter.of(self._lock.device_id, self._measure["cache"])
                self._leave_cupti(self.members)
                members = [member for member in self.members if self._alone(member)]
                for together in self._fitting(members):
                    self._time(together)
        finally:
            self._scratch.close()

    def _call(self, member: Member, step: str, *arguments: Any) -> Any:
        """A step of a member. Raises `_MemberFailedError`."""
        try:
            return self.engine.call(step, *arguments, timeout_s=self.timeout_s)
        except (CellFailedError, WorkerLostError) as error:
            if member.is_recorded and not self._is_recorded_ok(member):
                if isinstance(error, WorkerLostError):  # it could not write the record itself
                    write(member.cell, "failed", str(error))
                self.on_end(member.cell)
            raise _MemberFailedError(member) from error

    def _is_recorded_ok(self, member: Member) -> bool:
        """Whether this run's record is there and ok: from then on nothing touches it, however the worker ends."""
        record = store.find_record(member.folder) if member.is_finished else None
        return record is not None and record.status == "ok"  # an earlier one was set aside before the run

    def _leave_cupti(self, members: Sequence[Member]) -> None:
        """Go on in a fresh process after a profile, but for graphs: what it leaves behind may slow launches down."""
        launches = any(member.cell.config["execution"]["name"] != "cuda_graph" for member in members)
        if launches and self._lock.device_id.startswith("GPU-") and self.engine.call("has_used_cupti"):
            self.engine.renew()

    def _alone(self, member: Member) -> bool:
        """Build and verify one member with none beside it. False if that failed."""
        if member.is_recorded:
            store.set_aside_stale(member.folder, member.id, member.cell.code_id, member.cell.env_id)
        try:
            self._build(member)
            if len(self.members) > 1:
                self._call(member, "park", member.id)
                member.is_parked = True
        except _MemberFailedError:
            return False
        return True

    def _build(self, member: Member) -> None:
        self.on_step(member.cell, "build")
        self._call(member, "build", member.cell.config, str(member.folder))
        member.built_in, member.is_parked = self.engine.life, False
        self.on_step(member.cell, "verify")
        seen = self._call(member, "verify", member.id)
        if member.peak_bytes is None:  # the first time, alone
            member.peak_bytes, member.parameter_bytes = seen["peak_bytes"], seen["parameter_bytes"]

    def _ready(self, member: Member) -> None:
        """Built and verified in the engine's present life."""
        if member.built_in != self.engine.life:
            self._build(member)
        elif member.is_parked:
            self._call(member, "unpark", member.id)
            member.is_parked = False

    def _fitting(self, members: Sequence[Member]) -> list[list[Member]]:
        """The members in subgroups whose measured peaks fit into the memory; each has the anchor if that fits too.

        Parameters are shared: together they take them once, and beside them each what it takes alone.
        """
        subgroups: list[list[Member]] = []
        for member in sorted(members, key=lambda member: member is not self.anchor):  # the anchor finds its place first
            for subgroup in subgroups:
                if self._fits([*subgroup, member]):
                    subgroup.append(member)
                    break
            else:
                first = subgroups[0][0] if subgroups else None
                anchor = self.anchor if self.anchor in members and self.anchor is not member else None
                if first is not None and anchor is not None and self._fits([anchor, member]):
                    again = Member(anchor.cell, self._scratch.path, is_recorded=False, peak_bytes=anchor.peak_bytes)
                    again.parameter_bytes = anchor.parameter_bytes
                    subgroups.append([again, member])
                else:
                    subgroups.append([member])
        return [subgroup for subgroup in subgroups if any(member.is_recorded for member in subgroup)]

    def _fits(self, members: Sequence[Member]) -> bool:
        available = members[0].cell.available_bytes
        if available is None or any(member.peak_bytes is None for member in members):
            return True  # the system does not tell
        shared = max(member.parameter_bytes for member in members)
        own = sum((member.peak_bytes or 0) - member.parameter_bytes for member in members)
        return shared + own <= _SPARE * available

    def _time(self, together: list[Member]) -> None:
        """Time a subgroup in every replicate; who fails is recorded and removed, and the others start again."""
        while any(member.is_recorded for member in together):
            self._leave_cupti(together)
            self.timed, self._probe_ms, self._watch = together, [], Watch(self._lock)
            for member in together:
                member.blocks = []
            try:
                self._replicates(together)
                break
            except _MemberFailedError as failed:
                together.remove(failed.member)
        for member in list(together):
            with suppress(_MemberFailedError):
                self._finish(member, together)
        self.timed = []

    def _replicates(self, together: Sequence[Member]) -> None:
        """Every replicate, each in a fresh process but the first."""
        blocks = Blocks(self._watch, self._meter, repeats=self._measure["throttled"] == "repeat")
        for replicate in range(self._measure["replicates"]):
            if replicate:
                self.engine.renew()
            iterations: list[int] = []
            block_s, max_time_s = _SHORT_BLOCK_S if len(together) > 1 else _BLOCK_S, self._measure["max_time_s"]
            if self._meter and self._meter.reads:
                block_s = energy.BLOCK_S
            block_s = min(block_s, max_time_s / (2 * _LEAST_ROUNDS if len(together) > 1 else 1))  # time for some rounds
            for member in together:
                self._ready(member)
                self.on_step(member.cell, "time")
                iterations.append(self._call(member, "warm_up", member.id, block_s))
            self._watch.start([os.getpid()] if self.engine.pid is None else [os.getpid(), self.engine.pid])
            self._rounds(together, iterations, replicate, blocks)
            self._watch.stop()

    def _rounds(self, together: Sequence[Member], iterations: Sequence[int], replicate: int, blocks: Blocks) -> None:
        """Rounds of one block each in shuffled order, until every median is known well enough or the time is spent."""
        measure = self._measure
        alone = energy.LEAST_BLOCKS if self._meter and self._meter.reads else 1
        least_rounds = _LEAST_ROUNDS if len(together) > 1 else alone
        budget_ms = 1e3 * measure["max_time_s"] * len(together)
        if measure["cache"] == "hot":
            budget_ms /= statistics.HOT_CALLS
        spent_ms, round_ = 0.0, 0
        self._probe_ms.append([])
        blocks.begin()
        while True:
            order = list(range(len(together)))
            self.random.shuffle(order)
            for place, index in enumerate(order):
                member = together[index]
                (ms, stamp_s), seen = blocks.timed(partial(self._call, member, "block", member.id, iterations[index]))
                member.blocks.append((replicate, round_, place, ms, stamp_s, seen))
                spent_ms += float(ms.sum())
            if measure["replicates"] > 1:  # with one, `compare` has no use for it
                probe_ms = self._call(together[0], "probe", together[0].id)
                if probe_ms is not None:
                    self._probe_ms[-1].append(probe_ms)
                blocks.begin()
            self.on_step(together[0].cell, "time")
            round_ += 1
            if spent_ms >= budget_ms:
                return
            if round_ >= least_rounds and all(self._is_known(member, replicate) for member in together):
                return

    def _is_known(self, member: Member, replicate: int) -> bool:
        samples = np.concatenate([block[3] for block in member.blocks if block[0] == replicate])
        return statistics.is_known(samples, float(member.cell.config["measure"]["target_ci"]))

    def _finish(self, member: Member, together: Sequence[Member]) -> None:
        """Observe, record and let go of one member."""
        if member.is_recorded:
            self._ready(member)
            self.on_step(member.cell, "observe")
            member.is_finished = True
            try:
                self._call(member, "observe", member.id, *self._timed(member, together), None, *self._seen())
            except _MemberFailedError:
                if not self._is_recorded_ok(member):
                    raise
            self.on_end(member.cell)
        with suppress(CellFailedError, WorkerLostError):  # the next call starts another worker
            self.engine.call("release", member.id, timeout_s=self.timeout_s)

    def _timed(self, member: Member, together: Sequence[Member]) -> tuple[Any, ...]:
        """What the timing tells of a member, for its record."""
        peers = [other.id for other in together if other is not member]
        probe_ms = [float(np.median(rounds)) for rounds in self._probe_ms if rounds]
        return member.blocks, peers, self._ratio(member), member.peak_bytes, probe_ms

    def _seen(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the machine did meanwhile, and the counter of energy."""
        return self._watch.seen(), None if self._meter is None else self._meter.described()

    def _ratio(self, member: Member) -> Ratio | None:
        """The ratio to the anchor, if that was timed in the same rounds."""
        anchor = next((other for other in self.timed if self.anchor and other.id == self.anchor.id), None)
        if anchor is None or anchor.id == member.id:
            return None
        base = {block[:2]: float(np.median(block[3])) for block in anchor.blocks}
        ratios = [
            (block[0], float(np.median(block[3])) / base[block[:2]]) for block in member.blocks if block[:2] in base
        ]
        return statistics.ratio(ratios, anchor.id)

    def interrupted(self) -> None:
        """After Ctrl-C: let the block end that is being timed, and write what is there."""
        present = [member for member in self.timed if member.built_in == self.engine.life]
        partial = [member for member in present if member.is_recorded and member.blocks and not member.is_finished]
        if not partial:
            return
        with suppress(CellFailedError, WorkerLostError):  # then nothing is there, and the cell will run again
            self.engine.settle(min(_GRACE_S, self.timeout_s))
            for member in partial:
                timed = self._timed(member, self.timed)
                failure = "failed", "interrupted"
                self.engine.call("observe", member.id, *timed, failure, *self._seen(), timeout_s=self.timeout_s)


def write(cell: Cell, status: Literal["failed", "skipped"], reason: str) -> None:
    """Write the record of a cell that a worker cannot write: excluded, or lost."""
    store.own_folder(cell.directory)
    store.set_aside_unreadable(cell.directory)
    for left in (store.SAMPLES, store.ROUTING, store.TRACE, store.TIMELINE):
        (cell.directory / left).unlink(missing_ok=True)
    store.write_record(cell.directory, cell.record(status, reason))
