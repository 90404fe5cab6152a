"""cli/plan.py: `moe-lab plan`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from moe_lab.cli.main import main
from tests import quick, tiny
from tests.sweep import faulty, test_plan

MISTAKES = {
    "routr=torch": "routr",
    "router=sinkhrn": "Did you mean sinkhorn",
    "batch=abc": "batch",
    "model.top_k=9": "model.top_k=9",
    "sweep.stale=sometimes": "sweep.stale=sometimes",
    "router": "router: not a command and not a KEY=VALUE override",
    "--mutli": "--mutli: not an option",
    "workload=text": "set workload.path=",
    "router=glob(sinkorn*)": "router=glob(sinkorn*): no value matches, so the sweep has no cell",
    "router=glob(*,exclude=*)": "router=glob(*,exclude=*): no value matches, so the sweep has no cell",
    "batch=range(3,3)": "batch=range(3,3): no value matches, so the sweep has no cell",
    "hydra.sweeper.seed=0,1": "hydra.sweeper.seed=0,1: a key of Hydra has one value in a sweep; run it once for each",
}


def plan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [*faulty.MOE_LAB, "plan", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_a_search_without_optuna_says_what_to_install(tmp_path: Path) -> None:
    """In one line, as `moe-lab -m` does."""
    code = "import sys; sys.modules['optuna'] = None; from moe_lab.cli.main import main; sys.exit(main())"
    command = [faulty.MOE_LAB[0], "-c", code, "plan", "-m", "experiment=search_router"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    wanted = "moe-lab: hydra/sweeper=moe_lab_optuna needs Optuna; run pip install 'moe-lab[search]'.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.slow
def test_every_cell_is_shown_with_what_would_be_done_and_nothing_is_written(tmp_path: Path) -> None:
    """In an empty folder: to do, cannot run here, impossible, excluded; a bound for the time; `-m` may be there."""
    arguments = quick.overrides(
        "moe_layer",
        "router=torch,cuda_ext,sinkhorn",
        "model.shape.top_k=2,9",
        "sweep.exclude=[{router: sinkhorn}]",
        "sweep.name=s",
    )
    done = plan("-m", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = {
        status: done.stdout.count(f" {status}")
        for status in (
            "to do",
            "cannot run here: unavailable: router=cuda_ext",
            "skipped: impossible: model.shape.top_k=9",
            "excluded",
        )
    }
    assert list(found.values()) == [1, 1, 2, 2], done.stdout
    last = done.stdout.splitlines()[-1]
    assert last == "outputs/s: 6 cells, 1 to run, about 0:00 of timing at most, without building and verifying"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_its_time_is_expected_of_the_rest(tmp_path: Path) -> None:
    """One cell has a record that took 90 seconds, another one of other code, the third none; equal ones are counted."""
    made = test_plan.make(tmp_path / "outputs" / "s", "batch=1,2,3")
    test_plan.leave(made.cells[0], elapsed_s=90.0)
    test_plan.leave(made.cells[1], elapsed_s=90.0, code_id="f" * 12)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = plan(*quick.overrides("moe_layer", "batch=1,2,3,1", "sweep.name=s"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    statuses = {line.split()[6]: line.split(maxsplit=7)[7].rstrip() for line in done.stdout.splitlines()[1:-1]}
    expected = ("done", "stale: different code", "to do")
    assert statuses == {cell.cell_id: status for cell, status in zip(made.cells, expected, strict=True)}
    assert done.stdout.splitlines()[-1] == ("outputs/s: 3 cells, 2 to run (1 duplicate left out), about 3:00")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_checkpoints_and_phases_are_told_apart(tmp_path: Path) -> None:
    """The model by its folder; the workload has a column where it differs, and prefill has no context."""
    arguments = quick.overrides("checkpoint", "workload.phase=prefill,decode", "workload.context_len=3,5")
    done = plan(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows, last = done.stdout.splitlines()
    assert " ".join(head.split()) == "variant model workload batch seq_len router impl experts impl cell_id status"
    shown = ("prefill)", "decode, context_len=3)", "decode, context_len=5)")
    assert len(rows) == len(shown) and "3 to run (1 duplicate left out)" in last
    for row, text in zip(rows, shown, strict=True):
        assert row.startswith(f"native  tiny-olmoe text(phase={text}")


def test_cells_that_differ_in_their_seed_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a column that is there only then; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *quick.overrides("moe_layer", "seed=0,37")]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert "seq_len seed " in head and "2 cells, 2 to run" in last
    assert [row.split()[4] for row in rows] == ["0", "37"] and all("to do" in row for row in rows)
    assert main(["plan", *quick.overrides("moe_layer", "seed=37")]) == 0
    assert " seed " not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """One process for all of them: nothing on stdout, nothing written, no traceback."""
    program = (
        "import contextlib, io, json, os, sys; from moe_lab.cli.main import main\n"
        "os.chdir(sys.argv[1])\n"
        "for argument in json.loads(sys.argv[2]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        code = main(['plan', argument])\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]))"
    )
    printed = tiny.python(program, tmp_path, json.dumps(list(MISTAKES)))
    for (argument, names), line in zip(MISTAKES.items(), printed.splitlines(), strict=True):
        code, out, err = json.loads(line)
        assert (code, out) == (2, ""), argument
        assert err.startswith("moe-lab: ") and err.count("\n") == 1 and names in err, err
    assert list(tmp_path.iterdir()) == []
