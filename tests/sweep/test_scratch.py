"""sweep/scratch.py: folders go with their processes, however those end."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe_lab.sweep.scratch import Scratch


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders are made."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_goes_with_all_that_is_in_it(root: Path) -> None:
    """And no sooner: another one leaves it alone."""
    one, other = Scratch(), Scratch()
    assert {*root.iterdir()} == {one.path, other.path}
    (one.path / "cell").mkdir()
    (one.path / "cell" / "result.json").touch()
    for _ in range(2):  # as often as one likes
        one.close()
    assert [*root.iterdir()] == [other.path]
    del other
    assert not [*root.iterdir()]


def test_the_next_removes_what_a_killed_process_left(root: Path) -> None:
    """With kill -9, though not what a living one has, nor what is not a folder of ours."""
    code = (
        "from moe_lab.sweep.scratch import Scratch; import time\n"
        "one = Scratch(); (one.path / 'log').write_text('x'); print(one.path, flush=True); time.sleep(600)"
    )
    killed, alive = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        paths = [Path(process.stdout.readline().strip()) for process in (killed, alive)]  # type: ignore[union-attr]
        mine = root / "moe-lab-mine"
        mine.mkdir()
        (root / "moe-lab-scratch-link").symlink_to(mine)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert all((path / "log").is_file() for path in paths)
        Scratch().close()
        assert {*root.iterdir()} == {paths[1], mine, root / "moe-lab-scratch-link"}
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()


def test_without_locks_nothing_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell what is in use."""

    def refuse(*_: object) -> None:
        raise OSError("no locks")

    left = root / "moe-lab-scratch-left"
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    Scratch().close()
    assert [*root.iterdir()] == [left]
