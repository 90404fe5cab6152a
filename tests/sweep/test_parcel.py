"""sweep/parcel.py: what travels to a node, and what is missing there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import hydra
import numpy
import pytest

from moe_lab.records import identity
from moe_lab.sweep import parcel

_ON_A_NODE = """
import sys
sys.path[:0] = sys.argv[1:]
import moe_lab, moe_lab.conf, moe_lab.assets
from moe_lab.records import identity
from moe_lab.sweep import parcel
from pathlib import Path
print(moe_lab.__file__)
(folder,) = parcel.plugins_here(1)
print(identity.code_id(), identity.code_id([Path(folder)]))
print(sorted(path.name for path in Path(folder).rglob("*")))
"""


def test_a_node_without_moe_lab_has_the_same_code(tmp_path: Path) -> None:
    """An interpreter that reads no .pth has the dependencies alone: the package that travelled is found, with its
    identity and that of a plug-in; hidden files stay at home."""
    plugin = tmp_path / "mine"
    (plugin / "router").mkdir(parents=True)
    (plugin / "router" / "x.yaml").write_text("name: x\n")
    (plugin / "x.py").write_text("X = 1\n")
    (plugin / ".venv").mkdir()
    (plugin / ".venv" / "y.py").touch()
    sent = tmp_path / "sent"
    sent.mkdir()
    modules = parcel.pack(sent, [str(plugin)])
    assert [path.name for path in modules] == ["moe_lab", parcel.PLUGINS]
    dependencies = {str(Path(module.__file__).parents[1]) for module in (numpy, hydra)}
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _ON_A_NODE, str(sent), *dependencies],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    place, ids, names = told.stdout.splitlines()
    assert place == str(sent / "moe_lab" / "__init__.py")
    assert ids.split() == [identity.code_id(), identity.code_id([plugin])]
    assert names == str(["router", "x.py", "x.yaml"])


def test_without_plugins_no_module_is_looked_for() -> None:
    """It is there on a node only."""
    assert parcel.plugins_here(0) == ()


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        pytest.param("numpy>=1.26", [], id="there"),
        pytest.param("no-such-package>=2", ["no-such-package (missing)"], id="missing"),
        pytest.param("numpy<1", [f"numpy {importlib.metadata.version('numpy')} (needs <1)"], id="another-version"),
        pytest.param("no-such-package; python_version < '3'", [], id="not-for-this-python"),
    ],
)
def test_what_is_missing_is_listed(needed: str, expected: list[str]) -> None:
    """By name; of another version with that and what is needed."""
    assert parcel.lacking([needed]) == expected


def test_moe_labs_own_requirements_are_met_here() -> None:
    """Without those of extras."""
    needed = parcel.requirements()
    assert any(line.startswith("torch") for line in needed) and not any("pytest" in line for line in needed)
    assert parcel.lacking(needed) == []
