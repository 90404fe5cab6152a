"""A sweep in a folder that somebody prepared with links: nothing outside of it changes.

In the place of what sweep/lock.py, sweep/engine.py, sweep/multirun.py, results/outputs.py and Hydra write.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import quick

FILES = (".owner.json", "multirun.yaml", "plan.json", "runs.csv", "runs.parquet", "summary.csv", "report.html")


def sweep(cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "moe_lab", "-m", *quick.overrides("minimal", "sweep.name=s", *more)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_sweep_writes_through_no_link(tmp_path: Path) -> None:
    """Files are replaced; a log, a folder of plots and a cell's folder that are links are refused in a line."""
    folder, victim = tmp_path / "outputs" / "s", tmp_path / "victim"
    folder.mkdir(parents=True)
    victim.mkdir()
    for name in (*FILES, "worker.log"):
        (victim / name).write_text("precious")
        (folder / name).symlink_to(victim / name)
    before = {path.name: path.read_text() for path in victim.iterdir()}
    done = sweep(tmp_path, "sweep.report=false")
    assert done.returncode == 2 and "worker.log: is a link" in done.stderr
    (folder / "worker.log").unlink(missing_ok=True)
    (folder / "plots").symlink_to(victim)
    done = sweep(tmp_path)
    assert done.returncode == 2 and "plots: is a link" in done.stderr and len(done.stderr.splitlines()[-1:]) == 1
    (folder / "plots").unlink()
    (cell,) = (path.parent for path in folder.glob("*/result.json"))
    cell.rename(tmp_path / "cell")
    cell.symlink_to(victim)
    done = sweep(tmp_path, "sweep.report=false", "sweep.stale=rerun")
    assert done.returncode != 0 and "is a link" in done.stdout + done.stderr
    assert {path.name: path.read_text() for path in victim.iterdir()} == before


@pytest.mark.slow
def test_a_sweep_goes_on_where_folders_and_pipes_are_in_the_place_of_its_files(tmp_path: Path) -> None:
    """They are set aside; Hydra would wait for the reader of a pipe."""
    folder = tmp_path / "outputs" / "s"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).mkdir()
    (folder / "multirun.yaml").rmdir()
    os.mkfifo(folder / "multirun.yaml")
    done = sweep(tmp_path, "sweep.report=false")
    assert done.returncode == 0, done.stderr
    assert (folder / "multirun.yaml").is_file() and (folder / "runs.csv").is_file()
    assert (folder / "runs.unreadable.csv").is_dir() and (folder / "multirun.unreadable.yaml").is_fifo()
