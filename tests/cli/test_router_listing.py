"""router_listing.py: `moe-lab list routers`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_lab.cli import router_listing
from moe_lab.config import targets
from tests import tiny

ROUTERS = {path.stem for path in (tiny.ROOT / "conf" / "router").glob("*.yaml")}


@pytest.mark.usefixtures("no_compiler")
def test_every_router_with_its_properties(capsys: pytest.CaptureFixture[str]) -> None:
    """Its comment, then what it declares and who computes it, or why it cannot run."""
    router_listing.show(None)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "router"
    shown = {line.split()[0]: (line, below.strip()) for line, below in zip(lines[::2], lines[1::2], strict=True)}
    assert set(shown) == ROUTERS
    assert shown["torch"][1] == "causal, batch_invariant, static_k, graph_safe; by torch"
    assert shown["sinkhorn"][1] == "static_k, graph_safe; by torch, triton, cuda_ext"
    assert "needs_token_ids" in shown["hash"][1]
    assert "calibrates" in shown["quantile"][1]
    assert shown["cuda_ext"][1].startswith("router=cuda_ext: router.impl=cuda_ext")
    assert "2401.04088" in shown["mixtral"][0]


@pytest.mark.slow
def test_a_router_of_ones_own_stands_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folder of examples."""
    shutil.copytree(tiny.ROOT / "examples" / "my_router", tmp_path / "my_router")
    targets.trust(tmp_path / "my_router")
    router_listing.show(str(tmp_path / "my_router"))
    text = capsys.readouterr().out
    assert "Softmax top-k whose weights are raised to a power." in text
