"""cli/help.py: the text of `--help`, and which arguments are overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.cli.commands import COMMANDS
from moe_lab.cli.help import HELP, argv_overrides, config_dir_of, help_text
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


def test_overrides_among_the_arguments() -> None:
    """Options are none, whatever they hold."""
    arguments = ["-m", "router=a,b", "plan", "--config-dir=x", "~model", "hydra.run.dir=/tmp/a=b"]
    assert argv_overrides(arguments) == ["router=a,b", "hydra.run.dir=/tmp/a=b"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        pytest.param(["a=1"], None, id="none"),
        pytest.param(["--config-dir", "mine", "a=1"], "mine", id="apart"),
        pytest.param(["a=1", "--config-dir=mine=1"], "mine=1", id="joined"),
        pytest.param(["-cd", "mine"], "mine", id="short"),
        pytest.param(["--config-dir"], "", id="nothing behind it"),
    ],
)
def test_the_folder_of_the_configuration(arguments: list[str], folder: str | None) -> None:
    """As Hydra reads it."""
    assert config_dir_of(arguments) == folder
