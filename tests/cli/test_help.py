"""cli/help.py: the text of `--help`."""

from __future__ import annotations

from pathlib import Path

from moe_lab.cli.commands import COMMANDS
from moe_lab.cli.help import HELP, help_text
from moe_lab.config.hydra_patches import register


def test_every_command_has_one_line() -> None:
    """And no other does; each says in the same column what it is."""
    lines = [line for line in HELP.splitlines() if line.startswith("moe-lab ") and line.split()[1][0].isalpha()]
    assert sorted(line.split()[1] for line in lines) == sorted(COMMANDS)
    assert all(line[46:48] in ("  ", "8 ") and line[48] != " " for line in lines), lines


def test_groups_and_values_follow_the_overrides(tmp_path: Path) -> None:
    """Of the folder given, too."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("# Mine.\nname: mine\nshift: 7\n")
    register()
    text = help_text(["router=mine", "batch=12345"], str(tmp_path))
    (routers,) = (line for line in text.splitlines() if line.startswith("router: "))
    assert {"mine", "torch"} <= set(routers.removeprefix("router: ").split(", "))
    assert "shift: 7" in text and "batch: 12345" in text and "hydra:" not in text
