"""Measures what a group of a sweep costs on Slurm beside its cells, and beside a job that does nothing.

    python -m benchmarks.slurm_overhead --groups 20

It starts the test cluster of `make cluster-up` for itself: two nodes with a CPU each. Every group is one tiny cell. The
cost of a group is the slope between a sweep of a few groups and one of many, in seconds of a node, without the time of
the cells (`elapsed_s`). Beside each sweep as many jobs that do nothing are submitted by the same functions, so the
latency of the scheduler, and of a Python that starts, is known.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts import cluster

_FEW = 2
_NODES = 2
_TINY = ["model=minimal", "model.hidden=64", "device=cpu", "measure.warmup_s=0", "measure.max_time_s=0.02"]
_TINY += ["sweep.report=false", "sweep.engine=slurm"]
_NO_OP = """
import sys
import time
from pathlib import Path
from moe_lab.sweep import slurm
options = dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "mem", "python"))
options |= {"time": "00:05:00", "setup": [], "options": {}}
jobs = slurm.submit(Path(sys.argv[1]), "no-op", options, print, [0] * int(sys.argv[2]))
while any(not state.is_over for state in slurm.states("no-op").values()):
    time.sleep(0.1)
"""


def sweep(n_groups: int, environment: dict[str, str]) -> tuple[float, float]:
    """(wall seconds, seconds of its cells)."""
    batches = ",".join(str(1 + number) for number in range(n_groups))
    command = [sys.executable, "-m", "moe_lab", "-m", *_TINY, f"batch={batches}", "sweep.name=s"]
    with tempfile.TemporaryDirectory() as folder:
        wall_s = _seconds(command, folder, environment)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("outputs/s/*/result.json")]
    assert len(results) == n_groups
    assert all(result["status"] == "ok" for result in results)
    return wall_s, sum(result["elapsed_s"] for result in results)


def no_op(n_jobs: int, environment: dict[str, str]) -> float:
    """Seconds of an array of jobs that do nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return _seconds([sys.executable, "-c", _NO_OP, folder, str(n_jobs)], folder, environment)


def _seconds(command: list[str], folder: str, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nslurm_overhead: {command} ended with {done.returncode}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.groups <= _FEW:
        parser.error(f"--groups must be more than {_FEW}")
    if (reason := cluster.Slurm.lacking()) is not None:
        parser.error(reason)
    started = cluster.Slurm(Path(tempfile.mkdtemp(prefix="cluster-")))
    started.up()
    environment = {"OMP_NUM_THREADS": "1", **started.environment()}
    print("| round | a group, s | its cells, s | a job that does nothing, s | the group beside both, s |")
    print("|---|---|---|---|---|")
    beyond = []
    try:
        for round_ in range(given.rounds):
            few, many = (sweep(number, environment) for number in (_FEW, given.groups))
            idle = [no_op(number, environment) for number in (_FEW, given.groups)]
            per_group = _NODES / (given.groups - _FEW)
            group_s, cells_s = per_group * (many[0] - few[0]), per_group * (many[1] - few[1]) / _NODES
            latency_s = per_group * (idle[1] - idle[0])
            beyond.append(group_s - cells_s - latency_s)
            print(f"| {round_} | {group_s:.2f} | {cells_s:.2f} | {latency_s:.2f} | {beyond[-1]:.2f} |", flush=True)
    finally:
        started.down()
    print(f"\nmedian seconds of a group beside its cells and a job that does nothing: {statistics.median(beyond):.2f}")


if __name__ == "__main__":
    main()
