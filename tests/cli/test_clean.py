"""cli/clean.py: `moe-lab clean` lists, and removes on demand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.cli.clean import size
from moe_lab.cli.main import main
from moe_lab.records.held import held
from moe_lab.records.leftovers import remove_empty_sweep
from moe_lab.sweep.lock import Lock
from tests.records.test_leftovers import put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sweep with a failed and a good cell, and a failed single run."""
    put(tmp_path / "s" / "good", "ok", aside=True)
    put(tmp_path / "s" / "bad", "failed", "crash: SIGSEGV")
    (tmp_path / "s" / "plan.json").write_text("{}")
    put(tmp_path / "runs" / "lost", "failed", "unfinished: killed")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints; it ends well."""
    assert main(["clean", *words]) == 0
    return capsys.readouterr().out


def test_it_lists_and_removes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind, date, size, folder and reason; then how to remove it."""
    before = sorted(root.rglob("*"))
    lines = said(capsys, str(root)).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["failed", "failed", "stale"]
    assert lines[1].startswith("failed  2026-02-28") and lines[1].endswith(f"{root}/s/bad: crash: SIGSEGV")
    assert lines[-1].startswith(f"{root}: 3 could go, ") and lines[-1].endswith("--remove removes them")
    assert sorted(root.rglob("*")) == before


def test_it_removes_what_it_lists(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And names the sweeps whose tables are older than their cells now."""
    lines = said(capsys, str(root), "--remove").splitlines()
    assert lines[-2].startswith(f"{root}: 3 of 3 removed, ")
    assert lines[-1] == f"moe-lab report {root}/s makes its tables and page again"
    assert not (root / "s" / "bad").exists() and not (root / "runs" / "lost").exists()
    assert (root / "s" / "good" / "result.json").exists()
    assert said(capsys, str(root)) == f"{root}: 0 could go, 0 B\n"


def test_a_sweep_without_runs_goes_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its tables, plots and search, but for what a person put there."""
    for name in ("runs.csv", "report.html", "search.json", "notes.txt"):
        (root / "s" / name).write_text("x")
    (root / "s" / "plots").mkdir()
    lines = said(capsys, str(root), "--older-than", "0", "--remove").splitlines()
    assert lines[-1] == f"{root}/s: no run is left, so its tables and page went too"
    assert [path.name for path in (root / "s").iterdir() if path.is_file()] == ["notes.txt"]
    assert not (root / "s" / "plots").exists()


def test_kinds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One kind alone, and age."""
    assert "3 could go" not in (text := said(capsys, str(root), "--stale")) and "1 could go" in text
    assert "2 could go" in said(capsys, str(root), "--failed")
    assert "3 could go" in said(capsys, str(root), "--older-than", "0")
    assert "0 could go" in said(capsys, str(root), "--older-than", "90000")


def test_what_is_in_use_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep under way, and a run under way: the record that it began with says `failed`."""
    sweep = Lock(root / "s")
    with held(root / "runs" / "lost"):
        text = said(capsys, str(root), "--remove")
    sweep.release()
    assert text.count("kept: it is in use") == 3 and "0 of 3 removed" in text
    assert (root / "s" / "bad" / "result.json").exists() and (root / "runs" / "lost" / "result.json").exists()


@pytest.fixture
def nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In `root`, as somebody who is not root and has these files: root reads everything."""
    monkeypatch.chdir(root)
    main(["clean", "."])  # all is imported
    is_root = os.geteuid() == 0
    if is_root:
        for path in (root, *root.rglob("*")):
            os.chown(path, 65534, -1)
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("words", [pytest.param((), id="lists"), pytest.param(("--remove",), id="removes")])
def test_a_folder_that_cannot_be_read_is_said(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """And the others are looked into; a sweep with such a folder keeps its own files."""
    closed = [Path("a"), Path("s/good"), *(Path(f"many/{n}") for n in range(12)), Path("s/bad/.hydra")]
    for path in closed:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0)
    try:
        capsys.readouterr()
        assert main(["clean", ".", *words]) == 0
        out, err = capsys.readouterr()
    finally:
        for path in closed:
            path.chmod(0o755)
    lines = err.splitlines()
    assert lines[0] == "moe-lab clean: ./a: not looked into (Permission denied)" and len(lines) == 11
    assert lines[-1] == f"moe-lab clean: {len(closed) - 10} more folders not looked into"
    assert "s/bad: left out (s/bad/.hydra: Permission denied)" in out
    assert ("1 could go" if not words else "1 of 2 removed") in out
    assert Path("s/plan.json").exists() and Path("s/bad/result.json").exists()
    assert Path("runs/lost").exists() == (not words)


@pytest.mark.usefixtures("nobody")
def test_what_cannot_be_removed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """And stays."""
    Path("runs/lost").chmod(0o555)
    capsys.readouterr()
    assert main(["clean", "runs", "--remove"]) == 0
    Path("runs/lost").chmod(0o755)
    out = capsys.readouterr().out
    assert "runs/lost: not removed (runs/lost/result.json: Permission denied)" in out and "0 of 1 removed" in out
    assert Path("runs/lost/result.json").exists()


@pytest.mark.usefixtures("nobody")
def test_a_sweep_is_not_empty_as_long_as_a_folder_cannot_be_read() -> None:
    """A run may be in it."""
    shutil.rmtree("s/bad")
    Path("s/good").chmod(0)
    assert not remove_empty_sweep(Path("s")) and Path("s/plan.json").exists()
    Path("s/good").chmod(0o755)
    shutil.rmtree("s/good")
    assert remove_empty_sweep(Path("s")) and not Path("s").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param(["/nowhere/at/all"], "/nowhere/at/all: folder not found", id="no-folder"),
        pytest.param(["--older-than", "-1"], "--older-than", id="negative"),
        pytest.param(["--older-than", "nan"], "--older-than", id="nan"),
        pytest.param(["--older-than", "week"], "--older-than", id="no-number"),
        pytest.param(["--all"], "--all", id="unknown-option"),
    ],
)
def test_mistakes(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert main(["clean", *words]) == 2
    captured = capsys.readouterr()
    assert named in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_sizes() -> None:
    """Three digits of the largest unit."""
    assert [size(n) for n in (0, 999, 1000, 123456, 5.5e9, 7e13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "5.5 GB",
        "70 TB",
    ]
