"""Kills a part of a cluster at a random moment of a sweep, again and again, and counts what is lost.

    python -m benchmarks.cluster_kills --engine slurm --times 10

It starts the test cluster of `make cluster-up` for itself. A trial is a sweep of 24 cells in 6 groups on two nodes. One
thing is killed with SIGKILL at a random moment: the worker of a group, what holds that worker (a job of Slurm, an actor
of Ray), a whole node, or the driver; or `scancel` ends a job. A node comes back two seconds later. If the command did
not end with 0, it is typed again. Then each cell must have one result, equal to that of a sweep without a cluster: the
same cell_id, verified, the same routes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any

from scripts import cluster

_MOST_COMMANDS = 5
_LONGEST_S = 600.0
_LOOK_S = 0.3
_SWEEP = [
    "model=moe_layer",
    *(f"model.shape.{size}" for size in ("n_experts=8", "top_k=2", "d_model=32", "mlp_hidden_dim=24")),
    "router=torch,switch,sinkhorn,expert_choice",
    "seed=0,1,2,3,4,5",
    "device=cpu",
    "measure.max_time_s=0.1",
    "measure.warmup_s=0",
    "sweep.report=false",
]
N_CELLS = 24
_COLUMNS = ["killed", "trials", "cells lost or other", "cells run twice", "commands typed", "seconds, median"]
NOTHING = "nothing ran"
_HOLDERS = {"slurm": "submitit.core._submit", "ray": "ray::SlotActor"}


@dataclass
class Sweep:
    """One sweep on a cluster."""

    engine: str
    cluster: cluster.Cluster
    folder: Path
    driver: subprocess.Popen[bytes] | None = None
    seen: dict[str, str] = field(default_factory=dict)
    """When each cell that is ok was started."""
    n_run_twice: int = 0
    """Cells that were run again although they were ok."""

    def start(self) -> None:
        """Type the command."""
        command = [sys.executable, "-m", "moe_lab", "-m", *_SWEEP, "sweep.name=s", f"sweep.engine={self.engine}"]
        environment = {**os.environ, **self.cluster.environment(), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "ab") as log:
            self.driver = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def ends(self) -> int:
        """The exit code of the driver; meanwhile no result that is ok may be replaced."""
        assert self.driver is not None
        deadline = time.monotonic() + _LONGEST_S
        while (code := self.driver.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the sweep in {self.folder} does not end")
            self.look()
            time.sleep(_LOOK_S)
        self.look()
        return code

    def look(self) -> None:
        """Compare the results with those of the last look."""
        for cell_id, result in self.results().items():
            if result["status"] == "ok" and self.seen.setdefault(cell_id, result["started"]) != result["started"]:
                self.n_run_twice += 1
                self.seen[cell_id] = result["started"]

    def results(self) -> dict[str, dict[str, Any]]:
        """By cell_id."""
        return results_in(self.folder)

    # ---- what is killed

    def driver_alone(self, dice: random.Random) -> str:
        """SIGKILL."""
        assert self.driver is not None
        self.driver.kill()
        return "driver"

    def worker(self, dice: random.Random) -> str:
        """One of those that run."""
        return self._one_with("moe_lab.sweep.worker", dice)

    def holder(self, dice: random.Random) -> str:
        """What holds a worker."""
        return self._one_with(_HOLDERS[self.engine], dice)

    def node(self, dice: random.Random) -> str:
        """All its processes, and it comes back; the head of a Ray cluster stays."""
        name = dice.choice(self.cluster.nodes if self.engine == "slurm" else self.cluster.nodes[1:])
        self.cluster.kill(name)
        time.sleep(2)
        self.cluster.start(name)
        return name

    def scancel(self, dice: random.Random) -> str:
        """One of the jobs that run."""
        environment = {**os.environ, **self.cluster.environment()}
        command = ["squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i"]
        jobs = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        if not jobs:
            return NOTHING
        job = dice.choice(jobs)
        subprocess.run(["scancel", job], env=environment, check=True)
        return job

    def _one_with(self, words: str, dice: random.Random) -> str:
        """A process with these words, and not one that it started: beside a worker one waits for its end."""
        parents = {}
        for process in self.cluster.running(words):
            with suppress(OSError):
                parents[process] = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        found = [process for process, parent in parents.items() if parent not in parents]
        if not found:
            return NOTHING
        with suppress(ProcessLookupError):
            os.kill(dice.choice(found), SIGKILL)
        return "killed"


KILLS: dict[str, dict[str, Callable[[Sweep, random.Random], str]]] = {
    "slurm": {
        "worker": Sweep.worker,
        "job": Sweep.holder,
        "scancel": Sweep.scancel,
        "node": Sweep.node,
        "driver": Sweep.driver_alone,
    },
    "ray": {"worker": Sweep.worker, "actor": Sweep.holder, "node": Sweep.node, "driver": Sweep.driver_alone},
}


def without_a_cluster(folder: Path) -> dict[str, dict[str, Any]]:
    """The results to compare with."""
    command = [sys.executable, "-m", "moe_lab", "-m", *_SWEEP, "sweep.name=s"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return results_in(folder)


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """By cell_id, those of the sweep that was started in a folder."""
    found = [json.loads(path.read_text()) for path in folder.glob("outputs/s/*/result.json")]
    return {result["cell_id"]: result for result in found}


def complaints(results: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """What is missing or other than it was without a cluster."""
    found = [f"missing: {cell_id}" for cell_id in expected.keys() - results.keys()]
    found += [f"not in the sweep: {cell_id}" for cell_id in results.keys() - expected.keys()]
    for cell_id in expected.keys() & results.keys():
        result = results[cell_id]
        if result["status"] != "ok":
            found.append(f"{result['status']}: {result['reason']}")
        elif not result["check"]["passed"] or result["routing"] != expected[cell_id]["routing"]:
            found.append(f"another result: {cell_id}")
    return found


@dataclass
class Row:
    """What came of the trials of one kind of kill."""

    wrong: list[str] = field(default_factory=list)
    n_run_twice: int = 0
    n_commands: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, sweep: Sweep, n_commands: int, seconds: float, wrong: list[str]) -> None:
        """Of one trial."""
        self.wrong += wrong
        self.n_run_twice += sweep.n_run_twice
        self.n_commands.append(n_commands)
        self.seconds.append(seconds)

    def values(self) -> list[str]:
        """Of the columns of `_COLUMNS`."""
        typed = f"{min(self.n_commands)} to {max(self.n_commands)}"
        seconds = f"{statistics.median(self.seconds):.0f}"
        return [str(len(self.seconds)), str(len(self.wrong)), str(self.n_run_twice), typed, seconds]

    def __str__(self) -> str:
        return " | ".join(self.values())


def trial(sweep: Sweep, kill: Callable[[Sweep, random.Random], str] | None, at_s: float, dice: random.Random) -> int:
    """How often the command was typed until it ended well."""
    sweep.start()
    if kill is not None:
        time.sleep(at_s)
        while kill(sweep, dice) == NOTHING and sweep.driver is not None and sweep.driver.poll() is None:
            time.sleep(_LOOK_S)
    for n_commands in range(1, _MOST_COMMANDS + 1):
        if sweep.ends() == 0:
            return n_commands
        sweep.start()
    return _MOST_COMMANDS


def run_trials(given: argparse.Namespace, started: cluster.Cluster, rows: dict[str, Row]) -> None:
    """Fill the rows, one trial of each kind after the other."""
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        expected = without_a_cluster(Path(folder))
    assert len(expected) == N_CELLS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sweep, begun = Sweep(given.engine, started, Path(folder)), time.monotonic()
        assert trial(sweep, None, 0, dice) == 1 and not complaints(sweep.results(), expected)
        whole_s = time.monotonic() - begun
    print(f"without a kill: {whole_s:.0f} s\n", flush=True)
    for _ in range(given.times):
        for name, row in rows.items():
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                sweep, begun = Sweep(given.engine, started, Path(folder)), time.monotonic()
                at_s = dice.uniform(0, whole_s)
                n_commands = trial(sweep, KILLS[given.engine][name], at_s, dice)
                wrong = complaints(sweep.results(), expected)
                row.add(sweep, n_commands, time.monotonic() - begun, wrong)
                print(f"{name} after {at_s:.0f} s: {row}", file=sys.stderr)
                if wrong or sweep.n_run_twice:
                    print((sweep.folder / "log").read_text()[-4000:], *wrong, sep="\n", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[*KILLS], required=True)
    parser.add_argument("--times", type=int, default=10, help="trials of each kind of kill")
    parser.add_argument("--only", help="one kind of kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="output folder of cluster_kills_ENGINE.csv")
    given = parser.parse_args()
    make = cluster.CLUSTERS[given.engine]
    if (reason := make.lacking()) is not None:
        parser.error(reason)
    rows = {name: Row() for name in KILLS[given.engine] if given.only in (None, name)}
    started = make(Path(tempfile.mkdtemp(prefix="cluster-")))
    started.up()
    try:
        run_trials(given, started, rows)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # what was seen until then is printed
    finally:
        started.down()
    seen = {name: row for name, row in rows.items() if row.seconds}
    print(f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|")
    for name, row in seen.items():
        print(f"| {name} | {row} |")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        with open(given.out / f"cluster_kills_{given.engine}.csv", "w", newline="") as file:
            rows_of_file = ([given.seed, name, *row.values()] for name, row in seen.items())
            csv.writer(file).writerows([["seed", *_COLUMNS], *rows_of_file])
    return 1 if any(row.wrong or row.n_run_twice for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
