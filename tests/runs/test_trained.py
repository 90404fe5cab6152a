"""runs/trained.py: what makes a checkpoint's model another than the one that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.parameters import shareable
from moe_lab.runs import build, trained
from tests import quick, tiny

QWEN3 = tiny.ROOT / "assets" / "tiny-qwen3-moe"
CPU = torch.device("cpu")


def checkpoint(*overrides: str) -> DictConfig:
    """The checkpoint of assets/ with its own router, unless the overrides say otherwise."""
    own = [] if any(text.startswith("router=") for text in overrides) else ["router=native"]
    return tiny.compose("checkpoint", *own, *overrides)


@pytest.fixture(scope="module")
def native() -> Checkpoint:
    model = build.build_model(checkpoint(), CPU)
    assert isinstance(model, Checkpoint)
    return model


def test_native_routers_and_checkpoints_are_known_by_their_nodes() -> None:
    """Where the router is another, and for the reference."""
    cfg, other = checkpoint(), checkpoint("router=olmoe", "measure.reference_router=native")
    assert trained.is_checkpoint(cfg.model) and not trained.is_checkpoint(tiny.decoder_moe().model)
    assert trained.is_native(cfg.router) and trained.is_native(other.measure.reference_router)
    assert not trained.is_native(other.router)


@pytest.mark.parametrize(
    ("overrides", "is_it"),
    [
        pytest.param([], True, id="as-it-is"),
        pytest.param(["router=olmoe"], False, id="router"),
        pytest.param(["router.top_k=1"], False, id="k"),
        pytest.param(["model.top_k=[2,1,1,2]"], False, id="k-by-layer"),
    ],
)
def test_the_trained_model_takes_everything_back(native: Checkpoint, overrides: list[str], is_it: bool) -> None:
    """The same output as the checkpoint itself, from the parameters that the run has; the configuration stays."""
    cfg = checkpoint(*overrides)
    assert trained.is_as_trained(cfg) == is_it
    ids = torch.arange(37).unsqueeze(0) % 256
    model = build.build_model(cfg, CPU, shareable(native))
    assert torch.equal(model(ids).y, native(ids).y) == is_it or overrides == ["router=olmoe"]
    assert torch.equal(build.build_model(trained.as_trained(cfg), CPU, shareable(model))(ids).y, native(ids).y)
    assert trained.is_as_trained(cfg) == is_it


WEIGHTS = "this alone changes the predictions"
V3 = ["router=deepseek_v3", "router.n_groups=1", "router.top_groups=1"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        pytest.param(["router=native"], None, id="native"),
        pytest.param(["router=olmoe"], None, id="its-own-rule"),
        pytest.param(["router=torch"], "router.renormalize=false", id="softmax"),
        pytest.param(["router=top_p"], "router.renormalize=false", id="top_p"),
        pytest.param(["router=top_p", "router.renormalize=false"], None, id="top_p-plain"),
        pytest.param(["router=top_p", "router.renormalize=null"], None, id="top_p-as-trained"),
        pytest.param(["router=capacity"], "router.inner.renormalize=false", id="inside"),
        pytest.param(["router=capacity", "router@router.inner=native"], None, id="native-inside"),
        pytest.param(["router=minimax_m2"], None, id="no-softmax"),
        pytest.param([*V3, "router.scale=2.5"], "router.scale=1 keeps", id="scale"),
        pytest.param([*V3, "router.scale=1"], None, id="scale-of-1"),
        pytest.param(["router=expert_choice"], None, id="without-the-key"),
    ],
)
def test_weights_of_another_size_than_the_trained_ones_are_named(
    native: Checkpoint, overrides: list[str], key: str | None
) -> None:
    """With the key that keeps the checkpoint's rule; OLMoE's weights do not sum to 1."""
    said = [text for text in trained.warnings(checkpoint(*overrides), native) if WEIGHTS in text]
    assert len(said) == (key is not None)
    assert all(key in text and text.startswith(overrides[0]) for text in said if key)


@pytest.mark.parametrize(
    ("path", "renormalize"),
    [pytest.param(quick.TINY_OLMOE, False, id="olmoe"), pytest.param(QWEN3, True, id="qwen3")],
)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["router=oea", "router.renormalize=null"], id="alone"),
        pytest.param(["router=capacity", "router@router.inner=sinkhorn", "router.inner.renormalize=null"], id="inside"),
    ],
)
def test_a_null_takes_the_checkpoints_rule(path: Path, renormalize: bool, words: list[str]) -> None:
    """Whether a token's weights sum to 1; the configuration keeps its null."""
    cfg = checkpoint(f"model.path={path}", *words)
    router = build.build_router(cfg)
    assert getattr(router, "inner", router).renormalize is renormalize
    assert (cfg.router.get("inner") or cfg.router).renormalize is None


def test_without_a_checkpoint_there_is_no_rule_to_take() -> None:
    """One line."""
    with pytest.raises(ValueError, match=r"router\.renormalize=null: only for model=checkpoint"):
        build.build_router(tiny.decoder_moe("router=oea", "router.renormalize=null"))
