"""cli/status.py: what `moe-lab status` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_lab.cli import main, status
from moe_lab.sweep.lock import Lock
from moe_lab.sweep.standing import Board
from tests import tiny
from tests.sweep import test_plan
from tests.sweep.test_status import planned


def test_a_sweep_that_nobody_runs_says_how_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, each failure with its log, and the command; of a finished one only the counts."""
    plan = planned(tmp_path / "s")
    for number, cell in enumerate(plan.to_run()):
        if number == 1:
            test_plan.leave(cell, status="failed", reason="out_of_memory")
        elif number:
            test_plan.leave(cell)
    assert status.main([str(tmp_path / "s")]) == 0
    failed, line = capsys.readouterr().out.splitlines()
    assert failed == f"failed: out_of_memory ({plan.to_run()[1].directory / 'run.log'})"
    counts = f"{tmp_path / 's'}: 6 cells: 3 ok, 1 failed, 1 excluded, 1 to run"
    assert line.startswith(f"{counts}; nobody runs them; to continue, run: moe-lab -m ")
    test_plan.leave(plan.to_run()[0])
    assert status.main([str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 's'}: 6 cells: 4 ok, 1 failed, 1 excluded"


def test_a_sweep_that_runs_has_a_line_for_each_slot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What each does, since when, and the end that is to be expected; a job only where there is one."""
    planned(tmp_path / "s")
    lock = Lock(tmp_path / "s")
    with Board(tmp_path / "s") as board:
        board._begun -= 60
        board.at("n1-cpu0", 3, "some-cell", "verify")
        board.ended("n1-cpu0", is_failed=True)
        board.at("n2-cpu0", None, None, None)
        assert status.main([str(tmp_path / "s")]) == 0
        heads, first, second, line = capsys.readouterr().out.splitlines()
        assert heads.split() == ["slot", "group", "cell", "step", "since", "done", "failed"]
        assert re.fullmatch(r"n1-cpu0 3 +some-cell verify 0:0\d +1 +1", first)
        assert re.fullmatch(r"n2-cpu0 - +- +- +0:0\d +0 +0", second)
        assert re.search(r"; runs \(process \d+ on .*\), 1:0\d, about 5:\d\d left \(until .* UTC\)$", line)
        board.at("n2-cpu0", 4, "other", "time", "job 17_2")
        assert status.main([str(tmp_path / "s")]) == 0
        assert capsys.readouterr().out.splitlines()[2].endswith("job 17_2")
    lock.release()


def test_it_needs_no_torch_and_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a login node; a folder that is no sweep's is exit code 2."""
    planned(tmp_path / "s")
    code = "import sys; from moe_lab.cli import status; status.main(sys.argv[1:]); print('torch' in sys.modules)"
    assert tiny.python(code, tmp_path / "s").splitlines()[-1] == "False"
    assert main.main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"moe-lab: {tmp_path}: not the folder of a sweep")
