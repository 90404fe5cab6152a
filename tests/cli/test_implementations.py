"""implementations.py: `moe-lab list routers` and `moe-lab list experts`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moe_lab.cli import implementations
from moe_lab.cli.commands import COMMANDS
from moe_lab.config import targets
from tests import tiny

ROUTERS, EXPERTS = ({path.stem for path in (tiny.ROOT / "conf" / g).glob("*.yaml")} for g in ("router", "experts"))


def blocks(text: str) -> dict[str, tuple[str, str]]:
    """name -> (its line, the line below); the title is left out."""
    _, *lines = text.splitlines()
    return {line.split()[0]: (line, below.strip()) for line, below in zip(lines[::2], lines[1::2], strict=True)}


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.slow
def test_every_router_with_its_properties(capsys: pytest.CaptureFixture[str]) -> None:
    """Its comment, then what it declares and who computes it, or why it cannot run."""
    implementations.show("router", None)
    text = capsys.readouterr().out
    shown = blocks(text)
    assert text.startswith("router\n") and set(shown) == ROUTERS
    assert shown["torch"][1] == "causal, batch_invariant, static_k, graph_safe; implementations: torch"
    assert shown["sinkhorn"][1].startswith(
        "static_k, graph_safe; implementations: torch, triton, cuda_ext; used here: "
    )
    assert shown["expert_choice"][1] == "implementations: torch"
    assert "needs_token_ids" in shown["hash"][1]
    assert "calibrates" in shown["quantile"][1]
    assert shown["cuda_ext"][1].startswith("router=cuda_ext: router.impl=cuda_ext")
    assert "2401.04088" in shown["mixtral"][0]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of a CPU")
def test_all_experts_with_what_they_declare(capsys: pytest.CaptureFixture[str]) -> None:
    """`moe-lab list experts`: what is declared, and each kernel that would run here."""
    assert COMMANDS["list"](["experts"]) == 0
    text = capsys.readouterr().out
    shown = blocks(text)
    assert text.startswith("experts\n") and set(shown) == EXPERTS
    assert shown["grouped"][1] == "graph_safe, reads_dispatch; implementations: grouped, segment_mm=loop"
    assert shown["loop"][1] == "implementations: loop"
    assert "2211.15841" in shown["grouped"][0]


@pytest.mark.slow
def test_a_router_of_ones_own_stands_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folder of examples."""
    shutil.copytree(tiny.ROOT / "examples" / "my_router", tmp_path / "my_router")
    (tmp_path / "my_router" / "listed_router.py").write_text(
        "from moe_lab.routers.base import Router\nclass Quiet(Router):\n    causal = True\n"
    )
    (tmp_path / "my_router" / "router" / "quiet.yaml").write_text("_target_: listed_router.Quiet\nname: quiet\n")
    targets.trust(tmp_path / "my_router")
    implementations.show("router", str(tmp_path / "my_router"))
    text = capsys.readouterr().out
    assert "Softmax top-k whose weights are raised to a power." in text
    assert "causal; implementations: torch; not declared: batch_invariant, static_k, graph_safe" in text
    assert text.count("not declared") == 1


PLUGIN = """
from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts

class Own(Experts):
    graph_safe = True
    def __init__(self, block=64):
        if block == 0:
            raise UnavailableError("planted; use experts=loop")
        self.block = block
    def implementation(self, x_TD, weights):
        return {"experts": f"own:{self.block}:{len(x_TD)}:{tuple(weights.w_down_EDF.shape)}"}

def plain(x_TD, routing, weights, *, scale):
    return x_TD
"""


@pytest.mark.slow
def test_experts_of_ones_own_stand_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class, a function, and one that cannot run here, by --config-dir; sizes are those of model=decoder_moe."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "listed_experts.py").write_text(PLUGIN)
    for name, rest in (
        ("own", "Own\nblock: 32"),
        ("bad", "Own\nblock: 0"),
        ("plain", "plain"),
        ("typo", "Own\nblok: 1"),
    ):
        (tmp_path / "experts" / f"{name}.yaml").write_text(f"# About {name}.\n_target_: listed_experts.{rest}\n")
    assert COMMANDS["list"](["experts", "--config-dir", str(tmp_path)]) == 0
    shown = blocks(capsys.readouterr().out)
    assert set(shown) == {*EXPERTS, "own", "bad", "plain", "typo"}
    assert shown["own"][0].endswith("About own.")
    assert shown["own"][1] == "graph_safe; implementations: own:32:256:(8, 512, 2048)"
    assert shown["plain"][1] == "implementations: plain"
    assert shown["bad"][1].startswith("experts=Own: planted; use experts=loop (listed_experts.py:")
    assert shown["typo"][1].startswith("experts.blok: unknown key; listed_experts.Own takes ")
