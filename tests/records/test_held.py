"""records/held.py: a run's folder is its own while it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.records.held import held

_HOLD = """
import os, sys
from pathlib import Path
from moe_lab.records.held import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_until_the_holder_is_gone(tmp_path: Path) -> None:
    """One line that names the folder and what to do; also after kill -9, and nothing is left in the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=r"another run writes into this folder; .*hydra\.run\.dir") as raised,
            held(tmp_path),
        ):
            pass
        assert str(raised.value).startswith(f"{tmp_path}: ")
        holder.kill()
        holder.wait()
    with held(tmp_path):
        pass
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
