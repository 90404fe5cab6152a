"""sweep/capped_log.py: what is printed is in the file, up to a bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.sweep import capped_log
from moe_lab.sweep.capped_log import CappedLog


def printed(path: Path, n_bytes: int) -> bytes:
    """The log after a process that prints so much."""
    with CappedLog(path) as log:
        command = [sys.executable, "-c", f"import sys; sys.stdout.write('x' * {n_bytes})"]
        process = subprocess.Popen(command, stdout=log.fileno())
    assert process.wait(timeout=60) == 0
    log.join()
    return path.read_bytes()


def test_what_is_printed_is_appended(tmp_path: Path) -> None:
    """All of it, after what was there."""
    (tmp_path / "log").write_text("before\n")
    assert printed(tmp_path / "log", 200_000) == b"before\n" + b"x" * 200_000


def test_the_rest_is_left_out_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process goes on to its end; once it is full, the next one adds nothing but the line."""
    monkeypatch.setattr(capped_log, "MOST_BYTES", 1000)
    for _ in range(2):
        content = printed(tmp_path / "log", 300_000)
        assert content.startswith(b"x" * 1000 + b"\nmoe-lab: more than 16 MiB were printed")
        assert len(content) < 1300
