"""cli/export.py: from an earlier run to a pair, and what it says of a pair that was damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import moe_lab
from moe_lab.cli.main import main
from tests import quick
from tests.cli.test_main import moe_lab as moe_lab_process


@pytest.fixture(autouse=True)
def _same_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` writes sys.argv for Hydra."""
    monkeypatch.setattr("sys.argv", ["moe-lab"])


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error), without the seconds that a process takes to import torch."""
    code = main(["export", *map(str, arguments)])
    return code, *capsys.readouterr()


def damaged(pair: Path, tmp_path: Path, how: str) -> Path:
    """A copy of `pair` with its weights overwritten, truncated or gone."""
    folder = tmp_path / "damaged"
    shutil.copytree(pair, folder)
    blob = folder / "__params__"
    if how == "missing":
        blob.unlink()
    elif how == "truncated":
        os.truncate(blob, 5000)
    elif how == "overwritten":
        with blob.open("r+b") as file:
            file.seek(4096)
            file.write(b"\x3f" * 100)
    else:
        (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without an export."""
    folder = tmp_path_factory.mktemp("export") / "run"
    assert moe_lab.run(quick.compose("decoder_moe", "router=sinkhorn", "seed=3"), folder).status == "ok"
    return folder


@pytest.fixture(scope="module")
def pair(run: Path) -> Path:
    """Its export, by a process of its own."""
    done = moe_lab_process("export", str(run), cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "passed, relative error" in done.stdout
    return run / "netron"


def test_a_run_is_exported_once_and_verifies(
    run: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder; a second call leaves what is there."""
    monkeypatch.chdir(tmp_path)
    before = (pair / "__model__").stat().st_mtime_ns
    code, output, _ = call(capsys, run)
    assert (code, (pair / "__model__").stat().st_mtime_ns) == (0, before)
    assert "already exists" in output
    assert call(capsys, "--verify", pair) == (0, f"{pair}: passed\n", "")


@pytest.mark.parametrize(
    ("how", "said", "code"),
    [
        pytest.param("overwritten", "__params__ was changed", 1, id="overwritten"),
        pytest.param("truncated", "__params__ is truncated: 5000 bytes", 1, id="truncated"),
        pytest.param("missing", "__params__ is missing", 1, id="missing"),
        pytest.param("no manifest", "no export found", 2, id="no manifest"),
    ],
)
def test_damage_has_a_message_of_its_own(
    how: str,
    said: str,
    code: int,
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 1; 2 where there never was an export."""
    found, _, error = call(capsys, "--verify", damaged(pair, tmp_path, how))
    assert found == code and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("export.opsets=18",), "Did you mean opset?", id="typo"),
        pytest.param(("export.opset=19",), "export.opset=19: must be one of 18, 23", id="opset"),
        pytest.param(("export.dynamic=[time]",), "export.dynamic=time: must be one of batch, seq_len", id="axis"),
        pytest.param(("batch=3",), "only keys of export can be changed", id="the run's own key"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    said: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and nothing is written."""
    before = sorted(run.rglob("*"))
    code, _, error = call(capsys, run, *arguments)
    assert code == 2 and said in error and error.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so."""
    code, _, error = call(capsys, tmp_path)
    assert code == 2 and "not the folder of a run" in error
