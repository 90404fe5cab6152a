"""code_id covers what can change a number, room by room, and nothing that only talks to people."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import moe_lab.kernels
import pytest

from moe_lab.records import identity
from tests import tiny

TALKS_TO_PEOPLE = {"analyses", "api", "cli", "results", "trackers"}
ROOMS = sorted(
    path.name
    for path in identity.PACKAGE.iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.name.startswith("__")
)
SOURCES = ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h")


@pytest.fixture(params=[pytest.param("kernels", id="checkout"), pytest.param("moe_lab/kernels", id="installed")])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package and its kernels, as they lie in a checkout and in an installation; code_id looks there."""
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(identity.PACKAGE, tmp_path / "moe_lab", ignore=compiled)
    shutil.copytree(tiny.ROOT / "kernels", tmp_path / request.param, ignore=compiled)
    monkeypatch.setattr(identity, "PACKAGE", tmp_path / "moe_lab")
    monkeypatch.setattr(moe_lab.kernels, "__path__", [str(tmp_path / request.param)])
    yield tmp_path
    identity._package_code_id.cache_clear()


def code_id() -> str:
    identity._package_code_id.cache_clear()
    return identity.code_id()


def edited(file: Path) -> str:
    """code_id while this file has one more comment."""
    before = file.read_bytes()
    file.write_bytes(before + b"\n")
    found = code_id()
    file.write_bytes(before)
    return found


def test_an_edit_in_any_room_makes_results_stale_but_for_those_that_no_run_executes(tree: Path) -> None:
    """Every room and every module beside them, one file after the other."""
    assert {"config", "runs", "sweep", "records", "measure", "workloads", "models", "routers", "experts"} < set(ROOMS)
    assert {"ops", "export", "errors.py", "intervals.py", "marks.py"} | TALKS_TO_PEOPLE < set(ROOMS)
    before = code_id()
    kept = set()
    for name in ROOMS:
        place = tree / "moe_lab" / name
        file = place if place.is_file() else max(place.rglob("*.py"))
        if edited(file) == before:
            kept.add(name)
    assert kept == TALKS_TO_PEOPLE
    assert code_id() == before


def test_an_edit_of_any_kernel_makes_results_stale(tree: Path) -> None:
    """Whatever language it is in."""
    before, kernels = code_id(), next(tree.rglob("kernels"))
    files = [next(kernels.glob(pattern)) for pattern in SOURCES if any(kernels.glob(pattern))]
    assert {file.suffix for file in files} >= {".cu", ".cpp", ".cuh"}
    for file in files:
        assert edited(file) != before, file


def test_a_yaml_is_no_code(tree: Path) -> None:
    """What it changes in a result is in the cell_id."""
    before = code_id()
    (tree / "moe_lab" / "conf").mkdir()
    shutil.copy(tiny.ROOT / "conf" / "config.yaml", tree / "moe_lab" / "conf")
    assert code_id() == before
