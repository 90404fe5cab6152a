"""What a group of a sweep costs on a cluster beside its cells, and what a second slot gains.

    python -m benchmarks.cluster_overhead --engine slurm --groups 20

It starts the test cluster of `make cluster-up` for itself: two nodes with a CPU each. Every group is one tiny cell. The
cost of a group is the slope between a sweep of a few groups and one of many, in seconds of a slot, without the time of
the cells (`elapsed_s`). With Slurm as many jobs that do nothing are submitted as an array before each sweep, so the
scheduler's own latency is seen beside it. `--engine worker` compares one slot of this machine with two, on cells that
are timed for a fixed time on one core each.
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
_TINY = ["model=minimal", "model.hidden=64", "device=cpu", "measure.warmup_s=0", "sweep.report=false"]
_NO_OP = """
import sys
from pathlib import Path
from moe_lab.sweep import slurm
options = dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "mem", "python"))
options |= {"time": "00:05:00", "setup": [], "options": {}}
jobs = slurm.submit(Path(sys.argv[1]), "no-op", options, print, [0] * int(sys.argv[2]))
while any(not state.is_over for state in (slurm.states("no-op") or {}).values()):
    pass
"""


def sweep(n_groups: int, words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall seconds, seconds of its cells)."""
    batches = ",".join(str(1 + number) for number in range(n_groups))
    command = [sys.executable, "-m", "moe_lab", "-m", *_TINY, *words, f"batch={batches}", "sweep.name=s"]
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
        raise SystemExit(f"{done.stderr}\ncluster_overhead: {command} ended with {done.returncode}")
    return time.perf_counter() - start


def of_groups(engine: str, n_groups: int, rounds: int, environment: dict[str, str]) -> None:
    """Print the cost of a group."""
    words = [f"sweep.engine={engine}", "measure.max_time_s=0.02"]
    print("| round | sweep, s a group | its cells, s | jobs that do nothing, s each | cost of a group, s |")
    print("|---|---|---|---|---|")
    costs, latencies = [], []
    for round_ in range(rounds):
        few, many = (sweep(number, words, environment) for number in (_FEW, n_groups))
        group_s, cells_s = (_NODES * (many[0] - few[0]) / (n_groups - _FEW), (many[1] - few[1]) / (n_groups - _FEW))
        latency_s = 0.0
        if engine == "slurm":
            few_s, many_s = (no_op(number, environment) for number in (_FEW, n_groups))
            latency_s = _NODES * (many_s - few_s) / (n_groups - _FEW)
        costs.append(group_s - cells_s)
        latencies.append(latency_s)
        print(f"| {round_} | {group_s:.2f} | {cells_s:.2f} | {latency_s:.2f} | {costs[-1]:.2f} |", flush=True)
    print(f"\nmedian seconds of a slot for a group beside its cells: {statistics.median(costs):.2f}")
    if engine == "slurm":
        own = statistics.median(cost - latency for cost, latency in zip(costs, latencies, strict=True))
        print(f"median of it beyond a job that does nothing: {own:.2f}")


def of_slots(n_groups: int, rounds: int) -> None:
    """Print what two slots take of the time of one."""
    fixed = ["measure.max_time_s=3", "measure.target_ci=1e-9", "model=moe_layer"]
    print("| round | one slot, s | two slots, s | two / one |")
    print("|---|---|---|---|")
    ratios = []
    for round_ in range(rounds):
        one_s, two_s = (sweep(n_groups, [*fixed, f"sweep.slots.cpu={slots}"], _ONE_THREAD)[0] for slots in (1, 2))
        ratios.append(two_s / one_s)
        print(f"| {round_} | {one_s:.1f} | {two_s:.1f} | {ratios[-1]:.2f} |", flush=True)
    print(f"\nmedian two slots / one: {statistics.median(ratios):.2f}")


_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["worker", *cluster.CLUSTERS], required=True)
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.groups <= _FEW:
        parser.error(f"--groups must be more than {_FEW}")
    if given.engine == "worker":
        of_slots(given.groups, given.rounds)
        return
    make = cluster.CLUSTERS[given.engine]
    if (reason := make.lacking()) is not None:
        parser.error(reason)
    started = make(Path(tempfile.mkdtemp(prefix="cluster-")))
    started.up()
    try:
        of_groups(given.engine, given.groups, given.rounds, {**_ONE_THREAD, **started.environment()})
    finally:
        started.down()


if __name__ == "__main__":
    main()
