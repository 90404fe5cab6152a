"""runs/describe.py: what an option declares, known without building the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab.runs import build
from moe_lab.runs.describe import Description, describe
from tests import quick, tiny


@pytest.mark.parametrize(
    ("more", "properties"),
    [
        pytest.param([], ["causal", "batch_invariant", "static_k", "graph_safe"], id="native"),
        pytest.param(["router=hash"], ["causal", "static_k", "graph_safe", "needs_token_ids"], id="hash"),
    ],
)
def test_what_a_checkpoints_router_declares_is_known_without_its_weights(
    more: list[str], properties: list[str], tmp_path: Path
) -> None:
    """From config.json alone."""
    (tmp_path / "config.json").write_text((quick.TINY_OLMOE / "config.json").read_text())
    described = describe("router", tiny.compose("checkpoint", *more, f"model.path={tmp_path}"))
    assert described.skip is None
    assert set(properties) <= set(described.properties)
    assert build.check_available(tiny.compose("checkpoint", *more, f"model.path={tmp_path}"))[0] == torch.device("cpu")


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("decoder_moe", "moe_layer")])
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param(["experts=loop"], Description([], ["loop"]), id="loop"),
        pytest.param(
            ["batch=17", "seq_len=1"],
            Description(["graph_safe", "reads_dispatch"], ["grouped", "segment_mm=loop"]),
            id="T=17",
        ),
        pytest.param(["batch=2", "seq_len=8"], Description(["graph_safe"], ["grouped", "segment_mm=loop"]), id="T=16"),
        pytest.param(
            ["batch=2", "seq_len=8", "execution=compile"],
            Description(["graph_safe", "reads_dispatch"], ["grouped", "segment_mm=loop"]),
            id="compiled",
        ),
        pytest.param(
            ["experts=grouped", "batch=1", "seq_len=1"],
            Description(["graph_safe"], ["grouped:one_token"]),
            id="grouped-T=1",
        ),
        pytest.param(["batch=1", "seq_len=1"], Description(["graph_safe"], ["grouped:one_token"]), id="T=1"),
    ],
)
def test_experts_are_described_for_the_tokens_of_the_configuration(
    model: str, more: list[str], expected: Description
) -> None:
    """What they declare and which kernels run; `skip` is None."""
    assert describe("experts", tiny.compose(model, *more)) == expected


def test_no_memory_is_taken_for_the_weights() -> None:
    """A layer of 2.4 TB is described."""
    sizes = ("model.shape.d_model=100000", "model.shape.mlp_hidden_dim=400000")
    described = describe("experts", moe_lab.compose(quick.overrides("moe_layer", *sizes)))
    assert described.implementations == ["grouped", "segment_mm=loop"]


@pytest.mark.parametrize(
    ("group", "more", "reason"),
    [
        pytest.param("experts", "dtype=fp16", "dtype=fp16: not supported on a CPU", id="device"),
        pytest.param("router", "router=native", "router=native: only for model=checkpoint", id="value"),
    ],
)
def test_what_cannot_run_is_described_by_the_reason(group: str, more: str, reason: str) -> None:
    """Of the device, or of the option."""
    described = describe(group, tiny.moe_layer(more))
    assert described.properties == described.implementations == []
    assert described.skip is not None and described.skip.startswith(reason)


def test_what_a_router_does_not_declare_is_named(tmp_path: Path) -> None:
    """It is neither true nor false; all of the package's own declare."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "quiet.yaml").write_text("_target_: quiet_router.Quiet\nname: quiet\n")
    (tmp_path / "quiet_router.py").write_text(
        "from moe_lab.routers.base import Router\nclass Quiet(Router):\n    causal, static_k = False, True\n"
    )
    described = describe("router", moe_lab.compose(quick.overrides("moe_layer", "router=quiet"), config_dir=tmp_path))
    assert described.properties == ["static_k"]
    assert described.undeclared == ["batch_invariant", "graph_safe"]
    assert describe("router", tiny.moe_layer("router=sinkhorn")).undeclared == []
