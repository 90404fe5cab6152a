"""cli/report.py: `moe-lab report`, with `--tables` and without (results/outputs.py), in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lab.cli.report import main
from moe_lab.records.store import RESULT
from moe_lab.results.aggregate import OUTPUTS
from tests.cli.test_main import moe_lab
from tests.results.compared import record, write


def test_tables_are_written_alone_and_counted(tmp_path: Path) -> None:
    """Records by status, those that share a cell, and each file that could not be read; no plot and no page."""
    folder = write(tmp_path / "sweep", record(1.0), record(1.1), record(status="failed", reason="?", cell_id="0" * 12))
    (folder / "broken").mkdir()
    (folder / "broken" / RESULT).write_text("{")
    done = moe_lab("report", "--tables", "sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"sweep: 3 records (2 ok, 1 failed) in {', '.join(OUTPUTS)}\n"
    copies, unread = done.stderr.splitlines()
    assert copies == "2 records have the same cell_id as another record (column n_records)"
    assert unread.startswith(f"not read: broken/{RESULT}: ")
    assert all((folder / name).is_file() for name in OUTPUTS)
    assert not (folder / "plots").exists() and not (folder / "report.html").exists()


def test_without_it_there_are_plots_and_a_page(tmp_path: Path) -> None:
    """It prints where they are."""
    folder = write(tmp_path / "sweep", record(1.0))
    done = moe_lab("report", "sweep", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "sweep/runs.csv\nsweep/report.html\n"), done.stderr
    assert (folder / "report.html").is_file() and (folder / "plots").is_dir()


def test_a_folder_without_records_is_a_mistake(tmp_path: Path) -> None:
    """Whatever reads the exit code would take nothing for a result."""
    with pytest.raises(ValueError, match="no readable records"):
        main([str(tmp_path), "--tables"])
    with pytest.raises(ValueError, match="no readable records"):
        main([str(tmp_path)])


def test_plotly_lies_where_the_command_or_else_the_sweep_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command wins; without the page the option is a mistake, and so is another word."""
    folder = write(tmp_path / "sweep", record(1.0))
    page = folder / "report.html"
    assert main([str(folder), "--plotly", "directory"]) == 0
    assert (folder / "plotly.min.js").stat().st_size > 3e6 > page.stat().st_size
    assert main([str(folder)]) == 0 and page.stat().st_size > 3e6 and not (folder / "plotly.min.js").exists()
    plan = {
        "schema": 1,
        "name": "s",
        "compare": ["router"],
        "anchor": None,
        "commands": [],
        "cells": [],
        "plotly": "none",
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    assert main([str(folder)]) == 0 and page.stat().st_size < 3e6 and "data:image/png" in page.read_text()
    assert main([str(folder), "--plotly", "inline"]) == 0 and page.stat().st_size > 3e6
    capsys.readouterr()
    with pytest.raises(ValueError, match="--plotly: only used for the page"):
        main([str(folder), "--tables", "--plotly", "none"])
    with pytest.raises(ValueError, match="--plotly"):
        main([str(folder), "--plotly", "cdn"])
