"""scripts/cluster.py: real daemons start, lose a node, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import cluster
from tests.waiting import becomes_true


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_slurm_has_two_nodes_and_what_runs_on_one_ends_with_it(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """A job, and what it started in a session of its own; the other node's goes on. The node comes back."""
    started = {node: tmp_path / node for node in slurm_cluster.nodes}
    for node, file in started.items():
        script = f"setsid sleep 600 & echo $! > {file}.new; mv {file}.new {file}; wait"
        run("sbatch", "--no-requeue", f"--nodelist={node}", "--output=/dev/null", f"--wrap={script}")
    becomes_true(lambda: all(file.exists() for file in started.values()))
    first, second = (int(file.read_text()) for file in started.values())
    slurm_cluster.kill("node1")
    assert not is_alive(first) and is_alive(second)
    run("scontrol", "update", "nodename=node1", "state=down", "reason=killed")  # or wait for SlurmdTimeout
    slurm_cluster.start("node1")
    run("scancel", "--user", run("id", "-un").strip())
    becomes_true(lambda: run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle", "idle"])
    assert not is_alive(second)


@pytest.mark.slow
def test_ray_has_two_nodes_and_goes_on_without_one(ray_cluster: cluster.Cluster) -> None:
    """Each with one CPU; the one that was killed is started again."""
    assert _ray_nodes() == 2
    ray_cluster.kill("node")
    becomes_true(lambda: _ray_nodes() == 1)
    ray_cluster.start("node")
    becomes_true(lambda: _ray_nodes() == 2)


_NODES = """
import os, ray
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
print([node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"]])
"""


def _ray_nodes() -> int:
    """In a process of its own: Ray asks once in a process whether it needs a token."""
    alive = json.loads(run(sys.executable, "-c", _NODES).splitlines()[-1])
    assert set(alive) == {1.0}
    return len(alive)


def test_what_is_lacking_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each package by the name under which it is installed. Nothing is started, nothing is made."""
    monkeypatch.setattr(cluster, "_PATH", "")
    monkeypatch.setattr(cluster, "FOLDER", tmp_path / "cluster")
    monkeypatch.setattr("sys.argv", ["cluster.py", "up", "slurm"])
    assert cluster.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and not (tmp_path / "cluster").exists()
    assert err == (
        "cluster.py: Slurm lacks Debian's munge slurmctld slurmd slurm-client; `make cluster-packages` installs it\n"
    )


def test_down_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process and no file; a second `up` before it is refused and leaves the first alone."""
    if (reason := cluster.Slurm.lacking()) is not None:
        pytest.skip(reason)
    slurm = cluster.Slurm(Path("/tmp") / f"cluster-{os.getpid()}")
    slurm.up()
    configured = (slurm.folder / "slurm.conf").read_text()
    with pytest.raises(cluster.ClusterError, match="has a cluster already"):
        slurm.up()
    assert (slurm.folder / "slurm.conf").read_text() == configured
    processes = [int(line) for line in run("pgrep", "-f", str(slurm.folder)).split()]
    assert processes
    slurm.down()
    assert not slurm.folder.exists()
    assert not any(map(is_alive, processes))
