"""examples/: each as a person would use it, copied outside the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moe_lab.records.store import read_record
from tests import quick

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_router_of_ones_own_is_compared_with_ours(tmp_path: Path) -> None:
    """The sweep runs both; the row of the new one is verified and names it."""
    shutil.copytree(EXAMPLES / "my_router", tmp_path / "my_router")
    command = [sys.executable, "-m", "moe_lab", "-m", "--config-dir", "my_router"]
    more = quick.overrides("moe_layer", "router=torch,sharpened", "sweep.name=s", "sweep.report=false")
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [read_record(path.parent) for path in sorted((tmp_path / "outputs/s").glob("*/result.json"))]
    assert sorted(record.config["router"]["name"] for record in records) == ["sharpened", "torch"]
    assert all(record.status == "ok" and record.check is not None and record.check.passed for record in records)


def test_its_own_tests_pass(tmp_path: Path) -> None:
    """With nothing but pytest in its folder."""
    shutil.copytree(EXAMPLES / "my_router", tmp_path / "my_router")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path / "my_router", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_router_that_breaks_the_contract_is_a_row_that_names_the_clause(tmp_path: Path) -> None:
    """The best expert in both slots."""
    shutil.copytree(EXAMPLES / "my_router", tmp_path / "my_router")
    module = tmp_path / "my_router" / "my_routers.py"
    source = module.read_text()
    assert "return Routing(ids_TK" in source
    module.write_text(source.replace("return Routing(ids_TK", "return Routing(ids_TK[:, :1].expand_as(ids_TK)"))
    command = [sys.executable, "-m", "moe_lab", "-m", "--config-dir", "my_router"]
    more = quick.overrides("moe_layer", "router=torch,sharpened", "sweep.name=s", "sweep.report=false")
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "failed: mismatch: route: a token names one expert twice" in done.stderr
