"""Every command of the README runs as it stands (the timing cut short), and ends as the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
FENCED = re.findall(r"^\.venv/bin/(moe-lab .+)$", README, re.MULTILINE)
IN_TABLE = re.findall(r"^\| `[^|]*\| `(moe-lab [^`]+)`|`(moe-lab measure[^`]+)`", README, re.MULTILINE)
COMMANDS = list(dict.fromkeys(FENCED + [first or second for first, second in IN_TABLE]))
# Each of the table's builds a model of the demo's size.
TRIED = [
    pytest.param(
        command, id=command.replace("moe-lab ", "")[:60], marks=[] if command in FENCED else [pytest.mark.slow]
    )
    for command in COMMANDS
]


def test_the_readme_has_the_commands_that_are_tried() -> None:
    """The patterns above find them: five outside the table, and nine pairs of demo and moe-lab."""
    assert len(FENCED) == 5
    assert len(COMMANDS) >= 12
    assert "moe-lab measure.routing=false device=cpu" in COMMANDS


@pytest.mark.parametrize("command", TRIED)
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path) -> None:
    """Exit code 0 and a row that is ok; 2 and one line for what the README calls unavailable, or has no device."""
    quick = [] if "--help" in command else ["measure.max_time_s=0.1", "measure.warmup_s=0"]
    arguments = [sys.executable, "-m", "moe_lab", *command.split()[1:], *quick]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "cuda_ext" in command or ("device=cuda" in command and not torch.cuda.is_available()):
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        return
    assert done.returncode == 0, done.stderr
    if "--help" not in command and " plan " not in command:
        assert list(tmp_path.glob("outputs/*/*/result.json"))
        assert "failed" not in done.stdout
