"""cli/report.py: `moe-lab report`, with `--tables` and without (results/outputs.py), in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import synthetic
from moe_lab.cli.report import main
from moe_lab.records.schema import Ratio
from moe_lab.records.store import PLAN, RESULT
from moe_lab.results import outputs
from moe_lab.results.aggregate import OUTPUTS
from tests.cli.test_main import moe_lab
from tests.results.compared import record, tiny_config, write


def test_tables_are_written_alone_and_counted(tmp_path: Path) -> None:
    """Records by status, those that share a cell, and each file that could not be read; no plot and no page."""
    folder = write(tmp_path / "sweep", record(1.0), record(1.1), record(status="failed", reason="?", cell_id="0" * 12))
    (folder / "broken").mkdir()
    (folder / "broken" / RESULT).write_text("{")
    done = moe_lab("report", "--tables", "sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *table = done.stdout.splitlines()
    assert first == f"sweep: 3 records (2 ok, 1 failed) in {', '.join(OUTPUTS)}"
    assert table[0].split()[0] == "variant" and [line.split()[-1] for line in table[1:4]] == ["ok", "ok", "failed"]
    assert table[-1] == "failed: ? (sweep/cell-2/run.log)"
    copies, unread = done.stderr.splitlines()
    assert copies == "2 records have the same cell_id as another record (column n_records)"
    assert unread.startswith(f"not read: broken/{RESULT}: ")
    assert all((folder / name).is_file() for name in OUTPUTS)
    assert not (folder / "plots").exists() and not (folder / "report.html").exists()


@pytest.mark.slow
def test_without_it_there_are_plots_and_a_page(tmp_path: Path) -> None:
    """It prints where they are, and then the table of the records."""
    folder = write(tmp_path / "sweep", record(1.0))
    done = moe_lab("report", "sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *files, heading, row = done.stdout.splitlines()
    assert files == ["sweep/runs.csv", "sweep/report.html"]
    assert heading.startswith("variant") and row.startswith("sinkhorn") and "1 ms" in row
    assert (folder / "report.html").is_file() and (folder / "plots").is_dir()


@pytest.mark.slow
def test_what_to_take_is_broken_between_words_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal that is narrower would break its numbers; a file has a line for each sentence."""
    synthetic.sweep(tmp_path, 16)
    outputs.say(tmp_path)
    whole = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    outputs.say(tmp_path)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert plain.split() == whole.split() and max(map(len, plain.splitlines())) <= 40 < len(whole.splitlines()[0])


def test_the_table_is_in_the_order_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders lie in another: the anchor is the command's first, or the one that the plan names."""
    routers = ["torch", "sinkhorn", "hash"]
    cells = [record(1.0, config={"router": {**tiny_config()["router"], "name": router}}) for router in routers]
    folder = write(tmp_path / "sweep", *reversed(cells))
    plan: dict[str, Any] = {"schema": 1, "name": "sweep", "commands": [], "compare": ["router"], "anchor": None}
    plan["cells"] = [{"cell_id": cell.cell_id, "status": "done"} for cell in cells]
    for anchor, order in ((None, routers), ({"router": "hash"}, ["hash", "torch", "sinkhorn"])):
        (folder / PLAN).write_text(json.dumps({**plan, "anchor": anchor}))
        assert main([str(folder), "--tables"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == order


def test_it_ends_with_what_to_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several variants; the first doubt stands below."""
    one, two = (record(p50, config={"router": {**tiny_config()["router"], "iters": int(p50)}}) for p50 in (1.0, 2.0))
    two.ratio_to_anchor = Ratio(anchor=one.cell_id, p50=2.0, ci95_low=1.9, ci95_high=2.1, rounds=9)
    one.interleaved_with, two.interleaved_with = [two.cell_id], [one.cell_id]
    folder = write(tmp_path / "sweep", one, two)
    assert main([str(folder), "--tables"]) == 0
    take, doubt = capsys.readouterr().out.splitlines()[-2:]
    assert take.startswith("By speed alone sinkhorn(iters=1)") and "one process" in doubt


def test_a_folder_without_records_is_a_mistake(tmp_path: Path) -> None:
    """Whatever reads the exit code would take nothing for a result."""
    with pytest.raises(ValueError, match="no readable records"):
        main([str(tmp_path), "--tables"])
    with pytest.raises(ValueError, match="no readable records"):
        main([str(tmp_path)])


@pytest.mark.slow
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
