"""runs/unchanged.py: the process is after a plug-in what it was before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, sys
from moe_lab.runs.unchanged import unchanged_process
with unchanged_process():
    os.chdir("/")
    sys.stdout.close(); sys.stderr.close(); os.closerange(1, 3)
    assert open(sys.argv[1], "w").fileno() in (1, 2)
print(os.getcwd())
print("error", file=sys.stderr)
with unchanged_process():
    fork = os.fork()
print("once")
assert os.waitpid(fork, 0)[1]
"""


def test_folder_streams_and_forks(tmp_path: Path) -> None:
    """What is printed afterwards goes where it went before, and is printed once."""
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [os.path.realpath(tmp_path), "once"]
    assert done.stderr == "error\n"
    assert (tmp_path / "x").read_text() == ""
