"""records/leftovers.py: what a folder of results need not keep."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moe_lab.records import leftovers, store
from moe_lab.records.leftovers import Leftover
from moe_lab.records.schema import Record

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def put(folder: Path, status: str, reason: str | None = None, *, days: float = 1, aside: bool = False) -> Path:
    """A run that began so many days before `NOW`."""
    folder.mkdir(parents=True, exist_ok=True)
    started = (NOW - timedelta(days=days)).isoformat()
    record = Record(status=status, reason=reason, cell_id="c" * 12, code_id="d" * 12, env_id=None, started=started)  # type: ignore[arg-type]
    store.write_record(folder, record)
    (folder / "run.log").write_text("log")
    for name in (store.SENT, store.TRACKERS_LOG):
        (folder / name).write_text("{}")
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text("a: 1")
    if aside:
        (folder / "stale-abc-def.result.json").write_text("{}")
        (folder / "result.unreadable.json").write_text("{")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs of every kind, below one another."""
    put(tmp_path / "runs" / "good", "ok", aside=True)
    put(tmp_path / "runs" / "bad", "failed", "crash: SIGSEGV", days=9)
    put(tmp_path / "sweep" / "killed", "failed", "unfinished: it was killed", aside=True)
    put(tmp_path / "sweep" / "old", "ok", days=40)
    put(tmp_path / "sweep" / "left_out", "skipped", "excluded")
    return tmp_path


def found(root: Path, *, failed: bool = False, stale: bool = False, days: float | None = None) -> list[Leftover]:
    """See `leftovers.find`."""
    before = None if days is None else NOW - timedelta(days=days)
    return list(leftovers.find(root, failed=failed, stale=stale, before=before, unreadable=pytest.fail))


def names(some: list[Leftover]) -> list[tuple[str, str]]:
    """Kind and folder."""
    return [(one.kind, one.folder.name) for one in some]


def test_each_kind_is_found_and_no_other(root: Path) -> None:
    """What was set aside stays where the present result is not ok: it may be the only good one."""
    assert names(found(root, failed=True)) == [("failed", "bad"), ("failed", "killed")]
    assert names(found(root, stale=True)) == [("stale", "good")]
    assert names(found(root, days=30)) == [("old", "old")]
    assert names(found(root, days=5)) == [("old", "bad"), ("old", "old")]
    assert names(found(root, failed=True, stale=True, days=5)) == [
        ("failed", "bad"),
        ("stale", "good"),
        ("failed", "killed"),
        ("old", "old"),
    ]
    (bad, _) = found(root, failed=True)
    assert (bad.why, bad.when) == ("crash: SIGSEGV", NOW - timedelta(days=9))
    assert bad.n_bytes == sum(path.stat().st_size for path in (root / "runs" / "bad").rglob("*") if path.is_file())


def test_a_run_goes_with_its_folder(root: Path) -> None:
    """And what was set aside without it."""
    for one in found(root, failed=True, stale=True):
        stays = leftovers.remove(one)
        assert (stays == []) == (one.folder.name == "bad")
    assert not (root / "runs" / "bad").exists()
    assert sorted(path.name for path in (root / "runs" / "good").iterdir()) == [
        ".hydra",
        store.SENT,
        "result.json",
        "run.log",
        store.TRACKERS_LOG,
    ]
    assert sorted(path.name for path in (root / "sweep" / "killed").iterdir()) == [
        "result.unreadable.json",
        "stale-abc-def.result.json",
    ]
    assert found(root, failed=True, stale=True) == []


def test_what_is_not_the_runs_own_stays(root: Path) -> None:
    """A file of the person, a link and what it points to, and a folder that is a link."""
    bad = root / "runs" / "bad"
    (bad / "notes.txt").write_text("mine")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "precious.txt").write_text("mine")
    (bad / "netron").symlink_to(root / "elsewhere")
    (root / "sweep" / "link").symlink_to(root / "sweep" / "killed")
    (one, _) = found(root, failed=True)
    assert leftovers.remove(one) == ["netron", "notes.txt"]
    assert (root / "elsewhere" / "precious.txt").read_text() == "mine"
    assert names(found(root, failed=True)) == [("failed", "killed")]


def test_a_record_that_cannot_be_read_is_left_alone(root: Path) -> None:
    """Nobody knows what it is."""
    (root / "runs" / "bad" / "result.json").write_text("{")
    assert names(found(root, failed=True)) == [("failed", "killed")]


def test_without_a_start_the_file_tells_the_age(root: Path) -> None:
    """Records of runs that never began have none."""
    store.write_record(root / "runs" / "good", Record(status="ok", cell_id="c" * 12, code_id="d" * 12, env_id=None))
    there = leftovers.find(root, failed=False, stale=False, before=datetime.now(UTC), unreadable=pytest.fail)
    assert names(list(there)) != []
    assert "good" not in [one.folder.name for one in found(root, days=0)]  # written after NOW
