"""runs/place.py: what a run finds in its folder stays or is kept aside, and a mistake leaves the folder as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.records import store
from moe_lab.records.held import held
from moe_lab.records.store import read_record
from moe_lab.runs.run import Run
from tests import quick


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(folder: Path, **values: Any) -> None:
    """The record there with other values."""
    store.write_record(folder, dataclasses.replace(read_record(folder), **values))


def failing(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    """A run whose step raises."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Run, step, fail)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused, and nothing of the first changes."""
    moe_lab.run(quick.compose("minimal"), tmp_path)
    before = files_of(tmp_path)
    with held(tmp_path), pytest.raises(ValueError, match="another run writes into this folder"):
        moe_lab.run(quick.compose("minimal"), tmp_path)
    assert files_of(tmp_path) == before
    moe_lab.run(quick.compose("minimal"), tmp_path)


def test_the_same_again_replaces_the_result(tmp_path: Path) -> None:
    """Same configuration, code and machine: nothing piles up."""
    cfg = quick.compose("minimal")
    for _ in range(3):
        assert moe_lab.run(cfg, tmp_path).status == "ok"
    assert set(files_of(tmp_path)) == {"result.json", "samples.npz", "run.log", "config.yaml"}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"code_id": "1" * 12}, id="other-code"),
        pytest.param({"env_id": "1" * 12}, id="another-machine"),
        pytest.param({"cell_id": "1" * 12}, id="another-configuration"),
        pytest.param({"code_id": "1" * 12, "status": "failed"}, id="failed-of-other-code"),
        pytest.param({"agreement": {"jaccard": 1.0}}, id="with-a-comparison"),
    ],
)
def test_another_result_is_kept_aside(values: dict[str, Any], tmp_path: Path) -> None:
    """With its samples and its log, whatever there was before."""
    moe_lab.run(quick.compose("minimal"), tmp_path)
    edited(tmp_path, **values)
    old = files_of(tmp_path)
    record = moe_lab.run(quick.compose("minimal"), tmp_path)
    assert record.status == "ok"
    stale = f"stale-{values.get('code_id', record.code_id)}-{values.get('env_id', record.env_id)}"
    new = files_of(tmp_path)
    for name in ("result.json", "samples.npz", "run.log"):
        assert new[f"{stale}.{name}"] == old[name]
    assert len(new) == 7


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in (store.TRACE, store.TIMELINE)])
def test_what_only_the_earlier_run_wrote_is_kept_aside(name: str, tmp_path: Path) -> None:
    """A replay may read it."""
    moe_lab.run(quick.compose("minimal"), tmp_path)
    (tmp_path / name).write_bytes(b"routes")
    moe_lab.run(quick.compose("minimal"), tmp_path)
    (kept,) = tmp_path.glob(f"stale-*.{name}")
    assert kept.read_bytes() == b"routes" and not (tmp_path / name).exists()
    assert kept.with_name(kept.name.replace(name, store.RESULT)).exists()


def test_a_failure_does_not_cost_an_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same identity: kept aside."""
    moe_lab.run(quick.compose("minimal"), tmp_path)
    failing(monkeypatch, "measure", RuntimeError("planted"))
    assert moe_lab.run(quick.compose("minimal"), tmp_path).status == "failed"
    assert len(list(tmp_path.glob("stale-*.result.json"))) == len(list(tmp_path.glob("stale-*.samples.npz"))) == 1


@pytest.mark.parametrize(
    "error", [pytest.param(kind("no"), id=kind.__name__) for kind in (ValueError, UnavailableError)]
)
@pytest.mark.parametrize("before", [pytest.param(text, id=text) for text in ("nothing", "ok", "failed", "unreadable")])
def test_a_mistake_leaves_all_as_it_was(
    before: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing was: then there is no folder."""
    folder = tmp_path / "a" / "b"
    if before != "nothing":
        moe_lab.run(quick.compose("minimal"), folder)
    if before == "failed":
        edited(folder, status="failed", code_id="1" * 12)
    if before == "unreadable":
        (folder / "result.json").write_text("{")
        (folder / "samples.npz").unlink()
        (folder / "run.log").unlink()
    old = files_of(folder) if before != "nothing" else None
    failing(monkeypatch, "build", error)
    with pytest.raises(type(error)):
        moe_lab.run(quick.compose("minimal"), folder)
    assert (files_of(folder) if folder.exists() else None) == old


def test_the_record_is_begun_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed there has a row, failed, that tables and `compare` take for no result."""
    seen = []
    build = Run.build

    def look(run: Run) -> None:
        seen.append(read_record(tmp_path))
        build(run)

    monkeypatch.setattr(Run, "build", look)
    record = moe_lab.run(quick.compose("minimal"), tmp_path)
    assert (seen[0].status, str(seen[0].reason)[:12]) == ("failed", "unfinished: ")
    assert seen[0].cell_id == record.cell_id and seen[0].config == record.config


def test_sys_exit_in_a_run_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not end the process."""
    failing(monkeypatch, "measure", SystemExit(0))
    record = moe_lab.run(quick.compose("minimal"), tmp_path)
    assert (record.status, record.reason) == ("failed", "error: SystemExit: 0")
