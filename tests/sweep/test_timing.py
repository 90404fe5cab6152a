"""sweep/timing.py: one group, in this process."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.config.compose import composing_multirun
from moe_lab.measure import energy
from moe_lab.measure.device_lock import DeviceLock
from moe_lab.records.schema import BUSY, Record
from moe_lab.records.store import read_record
from moe_lab.sweep import multirun, timing
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.timing import Group, Member
from tests import quick
from tests.sweep import faulty


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test's own: other tests time at the same moment."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faulty.plugin(tmp_path_factory.mktemp("timing"))


def cells(directory: Path, *more: str, plugin: Path | None = None) -> list[Cell]:
    """The cells of a sweep of `moe_layer` that differ only in what is compared."""
    overrides = [*quick.overrides("moe_layer", *more), f"hydra.sweep.dir={directory}"]
    with composing_multirun(overrides, plugin and str(plugin)) as (loader, config):
        jobs = multirun.JobComposer(loader, config).jobs(multirun.expand(loader, config))
        made = planning.make(jobs, directory, InProcess(), ["moe-lab"])
    assert len({cell.setting_id for cell in made.cells}) == 1
    return made.cells


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Four variants; with time for ten rounds on a busy machine, after which any interval is narrow enough."""
    enough = ("measure.max_time_s=30", "measure.target_ci=100")
    return cells(tmp_path_factory.mktemp("planned"), "router=torch,sinkhorn", "experts=grouped,loop", *enough)


@pytest.fixture
def four(planned: list[Cell], tmp_path: Path) -> list[Cell]:
    """The four with folders of this test's own."""
    return [dataclasses.replace(cell, directory=tmp_path / cell.directory.name) for cell in planned]


def time(group: Sequence[Cell], anchor: Cell | None) -> tuple[list[Record], list[tuple[str, str]]]:
    """The records of a group after it was timed, and its steps; the cells that ended are those of the group."""
    steps, ended = [], []
    Group(
        group,
        anchor,
        InProcess(),
        timeout_s=60,
        on_step=lambda cell, step: steps.append((cell.cell_id, step)),
        on_end=lambda cell: ended.append(cell.cell_id),
    ).run()
    assert sorted(ended) == sorted(cell.cell_id for cell in group)
    return [read_record(cell.directory) for cell in group], steps


def rounds(record: Record) -> dict[int, int]:
    """At which place in each round a cell's block was timed."""
    with np.load(Path(str(record.directory)) / "samples.npz") as samples:
        pairs = set(zip(samples["round"].tolist(), samples["order"].tolist(), strict=True))
    assert len(dict(pairs)) == len(pairs), "two blocks of one cell in a round"
    return dict(pairs)


def test_a_group_is_timed_in_rounds_that_cover_every_member(four: list[Cell]) -> None:
    """Four variants: every round has a block of each, in orders that change; each names the three others."""
    records, steps = time(four, four[0])
    ids = [cell.cell_id for cell in four]
    places = [rounds(record) for record in records]
    assert len(places[0]) >= 10
    for number in places[0]:
        assert sorted(place[number] for place in places) == [0, 1, 2, 3]
    assert all(place.keys() == places[0].keys() for place in places)
    assert len({tuple(place[number] for place in places) for number in places[0]}) > 1
    for record in records:
        assert record.status == "ok"
        assert set(record.interleaved_with) == set(ids) - {record.cell_id}
        assert (record.ratio_to_anchor and record.ratio_to_anchor.anchor) == (None if record is records[0] else ids[0])
    alone = [steps.index((cell_id, "verify")) for cell_id in ids]
    assert max(alone) < min(steps.index((cell_id, "time")) for cell_id in ids)


@pytest.mark.slow
def test_all_of_a_group_know_what_else_the_machine_did(four: list[Cell]) -> None:
    """Another run on the same CPUs is counted, of another device it is not; own processes are no others."""
    assert four[0].device_id is not None
    for device_id, others in ((four[0].device_id, 1), ("GPU-elsewhere", 0)):
        with DeviceLock(device_id):
            records, _ = time(four[:2], four[0])
        seen = [record.contention for record in records]
        assert seen[0] == seen[1] and seen[0] is not None and seen[0]["other_runs"] == others
        busy = [text for record in records for text in record.warnings if text.startswith(BUSY)]
        assert sum("1 other run on this device" in text for text in busy) == 2 * others


def test_with_wait_a_group_begins_when_the_device_is_free(four: list[Cell]) -> None:
    """It says that it waits, and nothing is built before."""
    steps: list[str] = []
    lock = DeviceLock(str(four[0].device_id))

    def on_step(cell: Cell, step: str) -> None:
        steps.append(step)
        if step == "wait":
            threading.Timer(0.2, lock.__exit__, (None, None, None)).start()

    with lock:
        options = {"timeout_s": 60, "on_step": on_step, "on_end": lambda cell: None, "wait": True}
        Group(four[:1], None, InProcess(), **options).run()  # type: ignore[arg-type]
    assert steps[:2] == ["wait", "build"] and steps.count("wait") == 1
    contention = read_record(four[0].directory).contention
    assert contention is not None and contention["other_runs"] == 0


class Ticking:
    """A counter that grows by a joule with every reading."""

    name, counts, read = "ticking", "readings", 0

    def joules(self) -> float:
        self.read += 1
        return float(self.read)

    def state(self) -> energy.State:
        return energy.State(power_w=7.0)


def test_blocks_between_those_of_others_count_for_their_own_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reading between two blocks, so a joule for each of them, whatever the other cell did."""
    monkeypatch.setattr(energy, "source_of", lambda device_id: Ticking())
    group = cells(tmp_path, "router=torch,sinkhorn", "measure.energy=true", "measure.max_time_s=0.2")
    records, _ = time(group, group[0])
    for record in records:
        found = record.energy
        assert found is not None and found["source"] == "ticking"
        assert found["block_joules"] == [1.0] * len(rounds(record)) and found["joules"] == len(rounds(record))
        assert found["block_power_w"] == [7.0] * len(rounds(record))
        assert found["resolution_share"] == pytest.approx(found["resolution_s"] / np.median(found["block_seconds"]))


@pytest.mark.slow
def test_launches_are_not_timed_in_a_process_that_has_profiled(four: list[Cell]) -> None:
    """An eager cell on a GPU is built in a fresh one; a graph is launched once, and a CPU has no CUPTI."""

    class Profiled(InProcess):
        asked = 0

        def call(self, step: str, *arguments: Any, **more: Any) -> Any:
            if step == "has_used_cupti":
                self.asked += 1
                return self.life == 0
            return super().call(step, *arguments, **more)

    def run(device_id: str, execution: str) -> tuple[int, int]:
        engine = Profiled()
        config = {**four[0].config, "execution": {"name": execution}}
        cell = dataclasses.replace(four[0], device_id=device_id, config=config)
        options = {"timeout_s": 60, "on_step": lambda *_: None, "on_end": lambda _: None}
        group = Group([cell], None, engine, **options)  # type: ignore[arg-type]
        if execution == "eager":
            group.run()
            assert read_record(cell.directory).status == "ok"
        else:
            group._leave_cupti(group.members)
        return engine.life, engine.asked

    assert run("GPU-elsewhere", "eager") == (1, 2)
    assert run("GPU-elsewhere", "cuda_graph") == (0, 0)
    assert run(str(four[0].device_id), "eager") == (0, 0)


def test_a_cell_alone_has_neither_peers_nor_a_ratio(four: list[Cell]) -> None:
    """And needs no ten rounds."""
    (record,), _ = time(four[:1], four[0])
    assert (record.status, record.interleaved_with, record.ratio_to_anchor) == ("ok", [], None)


@pytest.mark.slow
def test_a_slow_router_has_a_large_ratio(plugin: Path, tmp_path: Path) -> None:
    """It waits for 20 ms in a layer that takes far less; against it, the other has a small one."""
    group = cells(tmp_path, "router=torch,slow", "measure.max_time_s=3", "measure.target_ci=100", plugin=plugin)
    (quick_, slow), _ = time(group, group[0])
    assert quick_.ratio_to_anchor is None
    assert slow.ratio_to_anchor is not None
    assert slow.ratio_to_anchor.p50 > 2
    assert slow.ratio_to_anchor.rounds >= 10
    (quick_, slow), _ = time(group, group[1])
    assert slow.ratio_to_anchor is None
    assert quick_.ratio_to_anchor is not None
    assert quick_.ratio_to_anchor.p50 < 0.5


@pytest.mark.slow
def test_an_anchor_that_is_done_runs_along_and_keeps_its_files(four: list[Cell]) -> None:
    """What is added later has a ratio to it, and nothing of it is left elsewhere."""
    anchor, added = four[:2]
    time([anchor], anchor)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in anchor.directory.iterdir()}
    assert {"result.json", "samples.npz"} <= {path.name for path in before}
    (record,), steps = time([added], anchor)
    assert (anchor.cell_id, "time") in steps
    assert record.interleaved_with == [anchor.cell_id]
    assert record.ratio_to_anchor is not None and record.ratio_to_anchor.anchor == anchor.cell_id
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in anchor.directory.iterdir()} == before
    assert sorted(path.name for path in anchor.directory.parent.iterdir()) == sorted(
        c.directory.name for c in (anchor, added)
    )


@pytest.mark.parametrize(
    "first", [pytest.param(0, id="anchor-first", marks=pytest.mark.slow), pytest.param(2, id="anchor-third")]
)
@pytest.mark.slow
def test_what_does_not_fit_together_is_timed_in_subgroups_with_the_anchor(first: int, four: list[Cell]) -> None:
    """Memory for two of four: three pairs, each with the anchor, which is recorded once."""
    anchor = four[first]
    engine = InProcess()
    engine.call("build", anchor.config, str(anchor.directory))
    peak_bytes = engine.call("verify", anchor.cell_id)["peak_bytes"]
    if peak_bytes is None:
        pytest.skip("this kernel does not reset the resident high-water mark")
    for cell in four:
        cell.available_bytes = 3 * peak_bytes  # of which four fifths are taken: 2.4 of these processes
    records, _ = time(four, anchor)
    for record in records:
        if record.cell_id == anchor.cell_id:
            assert len(record.interleaved_with) == 1 and record.ratio_to_anchor is None
        else:
            assert record.interleaved_with == [anchor.cell_id]
            assert record.ratio_to_anchor is not None and record.ratio_to_anchor.rounds >= 10


@pytest.mark.gpu
def test_a_group_is_split_by_the_peaks_on_the_device(tmp_path: Path) -> None:
    """Parameters count once: three pairs of executions and experts fit where four members would not."""
    sizes = ("model.shape.d_model=512", "model.shape.mlp_hidden_dim=512", "batch=64", "seq_len=128")
    group = cells(tmp_path, "device=cuda", "experts=grouped,loop", "router=torch,sinkhorn", *sizes)
    assert all(cell.available_bytes is not None and cell.available_bytes > 2**30 for cell in group)
    records, _ = time(group, group[0])
    assert all(len(record.interleaved_with) == 3 for record in records)
    peaks = [record.memory["peak_mb"] for record in records if record.memory]
    parameters = [record.memory["parameters_mb"] for record in records if record.memory]
    assert min(parameters) == max(parameters) > 0
    two = max(parameters) + sum(sorted(peak - max(parameters) for peak in peaks)[-2:])
    for cell in group:
        cell.available_bytes = int(two * 1e6 / 0.8) + 1
    records, _ = time(group, group[0])
    assert all(record.status == "ok" and 1 <= len(record.interleaved_with) < 3 for record in records)


@pytest.mark.slow
def test_what_fits_only_alone_is_timed_alone(four: list[Cell]) -> None:
    """Then there is no ratio, and no peer is named."""
    for cell in four[:2]:
        cell.available_bytes = 0
    records, _ = time(four[:2], four[0])
    assert [(r.status, r.interleaved_with, r.ratio_to_anchor) for r in records] == [("ok", [], None)] * 2


@settings(max_examples=60, deadline=None)
@given(data=st.data(), anchor=st.integers(0, 3), is_done=st.booleans())
def test_subgroups_fit_hold_everyone_once_and_have_the_anchor_if_they_can(
    data: st.DataObject, planned: list[Cell], anchor: int, is_done: bool
) -> None:
    """Whatever the peaks, wherever the anchor stands, and whether it is recorded or only runs along."""
    peaks = data.draw(st.lists(st.integers(10, 100), min_size=4, max_size=4))
    available = data.draw(st.integers(1, 500))
    group = Group(
        [cell for cell in planned if not (is_done and cell is planned[anchor])],
        planned[anchor],
        InProcess(),
        timeout_s=1,
        on_step=lambda cell, step: None,
        on_end=lambda cell: None,
    )
    group._scratch.close()
    peak_of = {cell.cell_id: peak for cell, peak in zip(planned, peaks, strict=True)}
    for cell in planned:
        cell.available_bytes = available
    for member in group.members:
        member.peak_bytes, member.parameter_bytes = peak_of[member.id], 10

    def fits(members: Sequence[Member]) -> bool:
        return 10 + sum(peak_of[member.id] - 10 for member in members) <= 0.8 * available

    subgroups = group._fitting(group.members)
    recorded = [member.id for subgroup in subgroups for member in subgroup if member.is_recorded]
    assert sorted(recorded) == sorted(member.id for member in group.members if member.is_recorded)
    for subgroup in subgroups:
        ids = [member.id for member in subgroup]
        assert len(set(ids)) == len(ids)
        assert len(ids) == 1 or fits(subgroup)
        assert any(member.is_recorded for member in subgroup)
        if planned[anchor].cell_id not in ids:
            assert group.anchor is not None
            assert not fits([group.anchor, subgroup[0]])


class _Lost(InProcess):
    """The worker is lost after a step is done, before it says so."""

    def __init__(self, step: str):
        super().__init__()
        self.step = step

    def call(self, step: str, *arguments: Any, timeout_s: float = 600.0) -> Any:
        reply = super().call(step, *arguments)
        if step == self.step:
            self.renew()
            raise WorkerLostError("crash: SIGKILL")
        return reply


@pytest.mark.parametrize(
    "step", [pytest.param("observe", id="observe"), pytest.param("release", id="release", marks=pytest.mark.slow)]
)
def test_a_finished_record_stays_though_the_worker_is_lost(step: str, four: list[Cell]) -> None:
    """The record and its arrays; every cell ends once."""
    ended: list[str] = []
    group = Group(
        four[:2],
        four[0],
        _Lost(step),
        timeout_s=60,
        on_step=lambda *_: None,
        on_end=lambda cell: ended.append(cell.cell_id),
    )
    group.run()
    assert ended == [cell.cell_id for cell in four[:2]]
    for cell in four[:2]:
        assert (read_record(cell.directory).status, read_record(cell.directory).reason) == ("ok", None)
        assert (cell.directory / "samples.npz").exists() and (cell.directory / "routing.npz").exists()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=step, marks=() if step == "block" else pytest.mark.slow)
        for step in ("build", "verify", "block")
    ],
)
def test_a_worker_lost_before_is_a_failure(step: str, four: list[Cell]) -> None:
    """Though the folder had a result that is ok, of other code: that is set aside."""
    time(four[:1], None)
    cell = dataclasses.replace(four[0], code_id="1" * 12)
    Group([cell], None, _Lost(step), timeout_s=60, on_step=lambda *_: None, on_end=lambda _: None).run()
    assert (read_record(cell.directory).status, read_record(cell.directory).reason) == ("failed", "crash: SIGKILL")
    assert len(list(cell.directory.glob("stale-*.result.json"))) == len(
        list(cell.directory.glob("stale-*.samples.npz"))
    )
    assert len(list(cell.directory.glob("stale-*.result.json"))) == 1


def test_a_record_from_outside_replaces_what_was_left(four: list[Cell]) -> None:
    """Of a cell whose worker was lost: no samples of an earlier run beside it, and a broken record is kept."""
    cell = four[0]
    time([cell], cell)
    assert (cell.directory / "samples.npz").exists() and (cell.directory / "routing.npz").exists()
    (cell.directory / "result.json").write_text("{")
    timing.write(cell, "failed", "crash: SIGSEGV")
    record = read_record(cell.directory)
    assert (record.status, record.reason, record.cell_id) == ("failed", "crash: SIGSEGV", cell.cell_id)
    assert (cell.directory / "result.unreadable.json").read_text() == "{"
    assert not list(cell.directory.glob("*.npz"))
