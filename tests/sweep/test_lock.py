"""sweep/lock.py: one sweep at a time in a folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.sweep.lock import OWNER, Lock

_HOLD = """
import sys
from moe_lab.sweep.lock import *
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_folder_is_made_and_the_next_one_gets_in(tmp_path: Path) -> None:
    """What is held says who holds it, and nothing of that is left after `release`."""
    folder = tmp_path / "a" / "b"
    lock = Lock(folder)
    owner = json.loads((folder / OWNER).read_text())
    assert (owner["pid"], owner["host"]) == (os.getpid(), platform.node())
    lock.release()
    assert not (folder / OWNER).exists()
    Lock(folder).release()


def test_a_held_folder_is_a_mistake_of_one_line_that_names_the_owner(tmp_path: Path) -> None:
    """Folder, process, host, and what to do; a folder beside it is free."""
    lock = Lock(tmp_path / "held")
    with pytest.raises(ValueError) as raised:
        Lock(tmp_path / "held")
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/held: another sweep is using this folder (process {os.getpid()} on ")
    assert "sweep.name" in text and "\n" not in text
    assert json.loads((tmp_path / "held" / OWNER).read_text())["pid"] == os.getpid()
    Lock(tmp_path / "free").release()
    lock.release()


@pytest.mark.parametrize("text", [pytest.param(text, id=text or "empty") for text in ("", "{", "[]", "{}")])
def test_an_owner_that_cannot_be_read_is_not_named(tmp_path: Path, text: str) -> None:
    """The folder stays locked all the same."""
    lock = Lock(tmp_path)
    (tmp_path / OWNER).write_text(text)
    with pytest.raises(ValueError, match="another sweep is using this folder; wait for it"):
        Lock(tmp_path)
    (tmp_path / OWNER).unlink()
    with pytest.raises(ValueError, match="another sweep is using this folder; wait for it"):
        Lock(tmp_path)
    lock.release()


def test_another_process_is_kept_out_until_its_owner_is_killed(tmp_path: Path) -> None:
    """A dead owner keeps nothing, though its note is still there."""
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"\(process {process.pid} on "):
            Lock(tmp_path)
        process.kill()
    assert (tmp_path / OWNER).exists()
    Lock(tmp_path).release()
