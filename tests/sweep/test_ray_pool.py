"""sweep/ray_pool.py and sweep/ray_cluster.py: sweeps on a real Ray cluster of two nodes on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.sweep.nodes import Node
from moe_lab.sweep.slots import Claim, Slot, usable_cpus
from moe_lab.sweep.tasks import Setup
from tests.sweep import faulty

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)")
ON_RAY = ("sweep.engine=ray", "sweep.slots.cpu=2")
AXES = ("router=torch,sinkhorn", "batch=" + ",".join(map(str, range(1, 13))))
SLOW = ("measure.max_time_s=0.3", "measure.target_ci=1e-9")  # half a second for each group


def sweep_of(cwd: Path, *more: str, plugin: Path | None = None) -> subprocess.Popen[str]:
    command = faulty.command_of(*more, plugin=plugin)
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines_until(process: subprocess.Popen[str], begin: str) -> list[str]:
    """What the sweep said until a line that begins so."""
    assert process.stderr is not None
    found: list[str] = []
    for line in process.stderr:
        found.append(line)
        if line.startswith(begin):
            return found
    raise AssertionError(f"no line begins with {begin}: {''.join(found)}")


def compared(cwd: Path) -> dict[str, Any]:
    """Of each cell what is the same wherever it runs: verified, and the same routes."""
    records = faulty.records_list(cwd)
    assert len({record.cell_id for record in records}) == len(records)
    return {record.cell_id: (record.status, record.check.passed, record.routing) for record in records if record.check}


@pytest.mark.slow
@needs_ray
def test_a_small_sweep_on_a_cluster_that_is_started_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RAY_ADDRESS, which is said. Every cell is measured; slots, CPUs and nodes are in the records."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = faulty.sweep("router=torch,sinkhorn", "batch=1,2", "sweep.engine=ray", "sweep.slots.cpu=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("sweep.engine=ray: RAY_ADDRESS is not set, so a cluster of this machine is started")
    records = faulty.records_list(tmp_path)
    assert [record.status for record in records] == ["ok"] * 4
    plan = faulty.plan(tmp_path)
    assert plan["engine"] == "ray" and [len(kind["slots"]) for kind in plan["kinds"]] == [1]
    assert {record.env_id for record in records} == set(plan["kinds"][0]["env_ids"].values())


@needs_ray
@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1: no cluster answers there (", id="nobody-there"),
        pytest.param("ray://head:10001", "RAY_ADDRESS=ray://head:10001: must be HOST:PORT", id="ray-client"),
        pytest.param("head", "RAY_ADDRESS=head: must be HOST:PORT of the cluster's head", id="no-port"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, what is wrong, and the remedy."""
    from moe_lab.sweep import ray_cluster

    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UnavailableError) as raised:
        ray_cluster.connect([], print)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert str(raised.value).endswith("start one with ray start --head, or unset RAY_ADDRESS to start one here.")


@needs_ray
def test_what_is_missing_on_this_machine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster that is started here, without a process of Ray."""
    from moe_lab.sweep import parcel, ray_cluster

    monkeypatch.setattr(parcel, "requirements", lambda: ["no-such-package>=1", "pytest<1"])
    lacks = r"no-such-package \(missing\), pytest \S+ \(needs <1\); install it there"
    with pytest.raises(UnavailableError, match=f"^sweep.engine=ray: here lacks what moe-lab needs: {lacks}.$"):
        ray_cluster.fit_nodes([Node("1", "here", 2, 0)], print, are_here=True)


@needs_ray
@pytest.mark.slow
def test_two_nodes_measure_what_one_worker_does(tmp_path: Path, ray_cluster: Any) -> None:
    """24 cells: the same identities, verified, the same routes; both nodes had work; a plug-in travels; resume."""
    plugin = faulty.plugin(tmp_path / "mine")
    words = ("router=torch,late_raise", AXES[1], "measure.max_time_s=0.01")
    for folder, more in (("here", ()), ("ray", ON_RAY)):
        (tmp_path / folder).mkdir()
        done = faulty.sweep(*words, *more, cwd=tmp_path / folder, plugin=plugin)
        assert done.returncode == 0, done.stderr
    assert len(compared(tmp_path / "ray")) == 24
    assert compared(tmp_path / "ray") == compared(tmp_path / "here")
    records = faulty.records_list(tmp_path / "ray")
    assert len({record.environment["cpu_set"] for record in records}) == 2
    again = faulty.sweep(*words, *ON_RAY, cwd=tmp_path / "ray", plugin=plugin)
    assert "24 cells, 24 done; 0 to run" in again.stderr


def kill_worker(cluster: Any, process: subprocess.Popen[str]) -> None:
    """A process that measures: beside each is a small one of the same name, which waits for its end."""
    workers = cluster.running("moe_lab.sweep.worker")
    os.kill(max(workers, key=memory_of), signal.SIGKILL)


def memory_of(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1])


def kill_actor(cluster: Any, process: subprocess.Popen[str]) -> None:
    os.kill(cluster.running("ray::SlotActor")[0], signal.SIGKILL)


def kill_node(cluster: Any, process: subprocess.Popen[str]) -> None:
    cluster.kill("node")


def kill_driver(cluster: Any, process: subprocess.Popen[str]) -> None:
    process.kill()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param("true", id="shared"), pytest.param("false", id="not-shared")])
@pytest.mark.parametrize(
    ("kill", "code"),
    [
        pytest.param(kill_worker, 1, id="worker"),
        pytest.param(kill_actor, 0, id="actor"),
        pytest.param(kill_node, 0, id="node"),
        pytest.param(kill_driver, -9, id="driver"),
    ],
)
def test_what_is_killed_in_the_middle_is_resumed(
    kill: Callable[[Any, subprocess.Popen[str]], None], code: int, shared: str, tmp_path: Path, ray_cluster: Any
) -> None:
    """Every cell exactly once: 24 records that are ok, and none beside them that was set aside."""
    words = (*AXES, *SLOW, *ON_RAY, f"sweep.shared={shared}")
    process = sweep_of(tmp_path, *words)
    lines_until(process, "[5/24]")
    time.sleep(0.2)  # the next cell has begun
    kill(ray_cluster, process)
    try:
        _, error = process.communicate(timeout=200)
    finally:
        if kill is kill_node:
            ray_cluster.start("node")
            wait_for_two_nodes(ray_cluster)
    records = faulty.records_list(tmp_path)
    if kill is kill_worker:
        failed = [record for record in records if record.status == "failed"]
        code = len(failed)  # 0 where it was between two cells after all
        assert all(str(record.reason).startswith("crash: SIGKILL") for record in failed)
    assert process.returncode == code, error
    if kill is kill_driver:
        assert 5 <= len(records) < 24
    if kill is kill_node:  # the cluster finds out within seconds, perhaps after the actor's end is told
        assert re.search("was lost: its (node is gone|process ended)", error), error
    if code:
        again = faulty.sweep(*words, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    records = faulty.records_list(tmp_path)
    assert [record.status for record in records] == ["ok"] * 24
    assert len({record.cell_id for record in records}) == 24
    assert not list(tmp_path.rglob("stale-*"))


def wait_for_two_nodes(cluster: Any) -> None:
    """Until the cluster counts the node that came back."""
    code = "import ray; ray.init(log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    for _ in range(20):
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        if told.stdout.split()[-1:] == ["2"]:
            return
        time.sleep(1)
    raise AssertionError(told.stderr)


@needs_ray
@pytest.mark.slow
def test_a_folder_that_the_nodes_do_not_see_is_one_line(tmp_path: Path, ray_cluster: Any) -> None:
    """A node whose file system lacks it, for which the actor's own look stands; nothing is left behind."""
    from moe_lab.sweep.ray_pool import SlotActor

    mistake = SlotActor().open(Slot("n-cpu0", "n", "cpu", 1, ""), Setup(str(tmp_path / "no"), True, "/", (), {}))
    assert mistake is not None and mistake.startswith(f"sweep.shared=true: n does not see {tmp_path / 'no'}; set")


@needs_ray
@pytest.mark.slow
def test_more_slots_than_the_cluster_has_is_one_line(tmp_path: Path, ray_cluster: Any) -> None:
    """Before anything is composed; the folder is not left behind."""
    done = faulty.sweep(*AXES, "sweep.engine=ray", "sweep.slots.cpu=3", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["moe-lab: sweep.slots: 2 nodes with 2 CPUs are too few for 3 slots of 1 CPUs each; use fewer slots."],
    )
    assert not (tmp_path / "outputs").exists()


_TAKEN = """
import os, sys, time, ray
from moe_lab.sweep import ray_pool
from moe_lab.sweep.tasks import Setup

ray_pool._OPEN_S = 2.0
pool = ray_pool.RayPool({"cpu": 2, "cuda": None, "cpus_each": None}, Setup(sys.argv[1], True, "/", (), {}), print)
pool._seat_first(60.0)
first = next(iter(pool.seats.values()))
ray.kill(first.host.actor)
other = ray.remote(num_cpus=1)(type("Other", (), {"is_there": lambda self: True})).remote()
ray.get(other.is_there.remote())
found = []
while not found:
    found = [event.kind for event in pool.events(0.2)]
assert found == ["lost"] and pool._opening, found
ends_at = time.monotonic() + 20
found = []
while not found and time.monotonic() < ends_at:
    found = pool.events(0.2)
print(*(f"{event.kind}: {event.text}" for event in found), len(pool._opening), len(pool.names()), flush=True)
os._exit(0)
"""


@needs_ray
@pytest.mark.slow
def test_a_slot_whose_place_was_taken_is_given_up(tmp_path: Path, ray_cluster: Any) -> None:
    """Its process was killed, and other work got its CPU before it could start again: nobody waits for ever."""
    done = subprocess.run(
        [sys.executable, "-c", _TAKEN, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    line = "broken: it did not start again within 2 s; is other work in its place? 0 1"
    assert done.stdout.splitlines()[-1:] == [line], done.stdout + done.stderr


_CANNOT_OPEN = """
import os, sys, shutil, ray
from moe_lab.sweep import ray_pool
from moe_lab.sweep.tasks import Setup

pool = ray_pool.RayPool({"cpu": 1, "cuda": None, "cpus_each": None}, Setup(sys.argv[1], True, "/", (), {}), print)
pool._seat_first(60.0)
(seat,) = pool.seats.values()
shutil.rmtree(sys.argv[1])
ray.kill(seat.host.actor)
found = []
while len(found) < 2:
    found += pool.events(0.2)
print(*(f"{event.kind}: {event.text}" for event in found), sep="\\n", flush=True)
os._exit(0)
"""


@needs_ray
@pytest.mark.slow
def test_why_a_slot_cannot_start_again_is_told(tmp_path: Path, ray_cluster: Any) -> None:
    """The node does not see the folder any more, as when its file system went with the process."""
    folder = tmp_path / "s"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _CANNOT_OPEN, str(folder)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    lost, broken = done.stdout.splitlines()[-2:]
    assert lost.startswith("lost: its process ended"), done.stdout + done.stderr
    assert broken.startswith("broken: sweep.shared=true: ") and f"does not see {folder}" in broken


@needs_ray
@pytest.mark.slow
def test_a_slot_that_cannot_be_opened_is_left_out(tmp_path: Path, ray_cluster: Any) -> None:
    """Somebody has all CPUs but one: the other slot does the work, and a line says why."""
    taken = Claim(Slot("other", "n", "cpu", len(usable_cpus()) - 1, ""))
    try:
        done = faulty.sweep("router=torch,sinkhorn", "batch=1,2", *ON_RAY, cwd=tmp_path)
    finally:
        taken.release()
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "is out of service" in line)
    assert "needs 1 free CPUs, and other slots on" in line
    assert {record.status for record in faulty.records_list(tmp_path)} == {"ok"}
    (kind,) = faulty.plan(tmp_path)["kinds"]
    assert len(kind["slots"]) == 1


_TELLS = """
import os
import re
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Tells(SoftmaxTopK):
    def __init__(self, n_experts, top_k):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)

    def select(self, logits_TE, ctx=None):
        raise RuntimeError("sees GPU " + os.environ["CUDA_VISIBLE_DEVICES"])
"""


@needs_ray
@pytest.mark.slow
def test_every_gpu_of_the_cluster_is_a_slot_that_sees_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs in name only, as Ray is told by hand; the cells themselves need none. Both slots had work."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
    plugin = tmp_path / "mine"
    (plugin / "router").mkdir(parents=True)
    (plugin / "tells.py").write_text(_TELLS)
    (plugin / "router" / "tells.yaml").write_text("_target_: tells.Tells\nname: tells\n")
    done = faulty.sweep("router=tells", "batch=1,2,3,4", "sweep.engine=ray", cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    (kind,) = faulty.plan(tmp_path)["kinds"]
    assert [slot.rpartition("-")[2] for slot in kind["slots"]] == ["gpu0", "gpu1"]
    reasons = {str(record.reason).partition(" (")[0] for record in faulty.records_list(tmp_path)}
    assert reasons == {"error: RuntimeError: sees GPU 0", "error: RuntimeError: sees GPU 1"}
