"""examples/: each as a person would use it, copied outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab.records.schema import Record
from moe_lab.records.store import read_record
from tests import quick
from tests.ops.compiling import assert_compiles

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("folder", "passed"),
    [pytest.param("my_router", 2, id="my_router"), pytest.param("my_experts", 24, id="my_experts")],
)
@pytest.mark.slow
def test_its_own_tests_pass(folder: str, passed: int, tmp_path: Path) -> None:
    """With nothing but pytest in its folder."""
    shutil.copytree(EXAMPLES / folder, tmp_path / folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout or torch.cuda.is_available()  # there it tries bf16 and graphs, too


@pytest.mark.slow
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
    assert "failed: mismatch: route: a token uses the same expert twice" in done.stderr


def sweep_of_experts(folder: Path, *more: str, interprets: bool, device: str = "cpu") -> dict[str, Record]:
    """The records of a sweep over loop, grouped and my_experts in `folder`, by the experts' name."""
    shutil.copytree(EXAMPLES / "my_experts", folder / "my_experts")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe_lab", "-m", "--config-dir", "my_experts", "experts=loop,grouped,my_experts"]
    sweep = quick.overrides("moe_layer", *more, "sweep.name=s", "sweep.report=false", device=device)
    done = subprocess.run(
        [*command, *sweep],
        cwd=folder,
        env=environment | ({"TRITON_INTERPRET": "1"} if interprets else {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    records = [read_record(path.parent) for path in (folder / "outputs/s").glob("*/result.json")]
    assert len(records) == 3
    return {record.config["experts"]["name"]: record for record in records}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.slow
def test_experts_of_ones_own_are_compared_with_ours(tmp_path: Path) -> None:
    """The sweep runs all three; the row of the new ones is verified and says which kernels ran."""
    records = sweep_of_experts(tmp_path, interprets=True)
    assert set(records) == {"loop", "grouped", "my_experts"}
    assert all(
        record.status == "ok" and record.check is not None and record.check.passed for record in records.values()
    )
    ran = {"router": "torch", "experts": "my_experts:block_32", "segment_mm": "loop"}
    assert records["my_experts"].implementation == ran
    assert records["my_experts"].latency_ms is not None


@pytest.mark.slow
def test_where_its_kernel_cannot_run_the_row_says_why(tmp_path: Path) -> None:
    """On a CPU without Triton's interpreter; the others run."""
    records = sweep_of_experts(tmp_path, interprets=False)
    assert [records[name].status for name in ("loop", "grouped", "my_experts")] == ["ok", "ok", "skipped"]
    reason = records["my_experts"].reason
    assert reason is not None and reason.startswith("unavailable: experts=my_experts: its kernel needs device=cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph", "compile")])
@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16")])
def test_experts_of_ones_own_run_on_cuda(dtype: str, execution: str, tmp_path: Path) -> None:
    """Natively, captured in a graph too, as they declare."""
    more = (f"dtype={dtype}", f"execution={execution}", "seq_len=37")
    records = sweep_of_experts(tmp_path, *more, interprets=False, device="cuda")
    assert [records[name].status for name in ("grouped", "my_experts")] == ["ok", "ok"]
    assert records["my_experts"].implementation["experts"] == "my_experts:block_32"


def launches() -> None:
    """The kernel of my_experts on odd and even sizes, in each dtype."""
    sys.path.insert(0, str(EXAMPLES / "my_experts"))
    from my_experts import gate_up

    order = {"perm": torch.zeros(6, dtype=torch.int32), "offsets": torch.zeros(6, dtype=torch.int32)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for D, F, K, scales_input, block in ((64, 128, 2, False, 32), (37, 65, 3, True, 64), (1, 1, 1, True, 16)):
            x, w = torch.ones(6 // K, D, dtype=dtype), torch.ones(5, 2 * F, D, dtype=dtype)
            gate_up(x, w, **order, weights=torch.ones(6 // K, K), scales_input=scales_input, block=block)


@pytest.mark.slow
def test_its_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Triton's interpreter runs much that does not compile."""
    assert_compiles(launches, tmp_path)
