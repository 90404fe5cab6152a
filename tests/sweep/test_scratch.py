"""sweep/scratch.py: folders go with their processes, however those end."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe_lab.sweep import scratch
from moe_lab.sweep.scratch import Scratch

STEM = f"moe-lab-scratch-{platform.node()}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders are made, for the first time in this process."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch._remove_left.cache_clear()
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
        link = root / f"{STEM}-link"
        link.symlink_to(mine)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert all((path / "log").is_file() for path in paths)
        Scratch().close()
        assert {*root.iterdir()} == {paths[1], mine, link}
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()


def test_folders_of_other_nodes_stay(root: Path) -> None:
    """Of their locks nothing is seen here; nor is a name that begins with ours one of ours."""
    others = {root / "moe-lab-scratch-elsewhere-abcdefgh", root / f"{STEM}-2-abcdefgh"}
    for path in others:
        path.mkdir()
    Scratch().close()
    assert {*root.iterdir()} == others


def test_what_was_left_before_it_was_held_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed at any time."""
    right = os.open

    def fail(path: Path, *arguments: int) -> int:
        if Path(path).name.startswith(STEM):
            raise OSError("too many open files")
        return right(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(OSError, match="too many"):
            Scratch()
    assert len([*root.iterdir()]) == 1
    scratch._remove_left.cache_clear()  # as in the next process
    Scratch().close()
    assert not [*root.iterdir()]


@pytest.mark.parametrize(
    "when", [pytest.param("open", id="before_it_is_open"), pytest.param("flock", id="before_lock")]
)
def test_a_folder_that_another_removes_at_once_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Until it is held it looks like one that a killed process left."""
    module = os if when == "open" else fcntl
    right = getattr(module, when)
    removed: list[Path] = []

    def remove_first(*arguments: object) -> object:
        for path in root.iterdir() if not removed else ():
            removed.append(path)
            path.rmdir()
        return right(*arguments)

    scratch._remove_left(str(root))  # so that the next call is that of the new folder
    monkeypatch.setattr(module, when, remove_first)
    one = Scratch()
    assert removed and one.path not in removed and [*root.iterdir()] == [one.path]


def test_a_process_looks_once(root: Path) -> None:
    """Each group and slot of a sweep makes a folder."""
    Scratch().close()
    left = root / f"{STEM}-abcdefgh"
    left.mkdir()
    Scratch().close()
    assert [*root.iterdir()] == [left]


def test_without_locks_nothing_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell what is in use."""

    def refuse(*_: object) -> None:
        raise OSError("no locks")

    left = root / f"{STEM}-left"
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    Scratch().close()
    assert [*root.iterdir()] == [left]
