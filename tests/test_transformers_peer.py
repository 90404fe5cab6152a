"""benchmarks/transformers_peer.py: what transformers' model and its cache share with ours, and what a step does."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from benchmarks import checkpoint_peers
from benchmarks.checkpoint_peers import Cell
from benchmarks.transformers_peer import Peer, lends, peer_model, same_weights
from moe_lab.runs.built import Built
from tests import tiny
from tests.models import checkpoints

CELL = Cell("decode", 2, 9)


def built_of(folder: Path, weights: dict[str, Tensor], dtype: str = "fp32") -> Built:
    options = {"path": str(folder), "text": "", "device": "cpu", "dtype": dtype, "execution": "eager"}
    return checkpoint_peers.ours(argparse.Namespace(**options), CELL, weights)


def peer_of(folder: Path) -> tuple[Built, Peer]:
    weights: dict[str, Tensor] = {}
    built = built_of(folder, weights)
    return built, Peer(peer_model(built, weights, "sdpa"), "grouped_mm", built, CELL.length)


@pytest.fixture(params=["olmoe", "qwen3-moe", "mixtral", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "mixtral":
        return checkpoints.checkpoint("mixtral", tmp_path)
    if request.param != "tied":
        return tiny.ROOT / f"assets/tiny-{request.param}"
    shutil.copytree(tiny.ROOT / "assets/tiny-olmoe", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16")])
def test_weights_are_lent_where_both_keep_the_same(
    folder: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory is ours, and its values are what transformers loads; so are the buffers."""
    weights: dict[str, Tensor] = {}
    with torch.inference_mode():
        built = built_of(folder, weights, dtype)
        model = peer_model(built, weights, "sdpa")
    assert "loads its own" not in capsys.readouterr().err
    mine = {tensor.data_ptr() for tensor in weights.values()}
    assert {tensor.data_ptr() for tensor in model.parameters()} == mine
    assert not {id(tensor) for tensor in model.parameters()} & {id(tensor) for tensor in weights.values()}  # marks
    own = peer_model(built, weights | {"more": torch.zeros(1)}, "sdpa")
    assert "loads its own" in capsys.readouterr().err
    lent, loaded = named(model), named(own)
    assert lent.keys() == loaded.keys()
    for name, tensor in lent.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name
    ids = checkpoints.ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, own(ids).logits)


def test_rows_in_another_order_are_not_lent(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint("ernie4_5_moe", tmp_path)
    weights: dict[str, Tensor] = {}
    built_of(folder, weights)
    assert same_weights(folder, weights) is None


@torch.inference_mode()
def test_a_cache_is_lent_where_both_keep_the_same() -> None:
    """The memory is ours, so nothing is computed twice; a cache of latents or windows is another matter."""
    built, peer = peer_of(tiny.ROOT / "assets/tiny-qwen3-moe")
    for mine, theirs in zip(built.task.cache.layers, peer.cache.layers, strict=True):
        for kept, lent in ((mine.k_BHNd, theirs.keys), (mine.v_BHNd, theirs.values)):
            assert lent.data_ptr() == kept.data_ptr() and lent.shape == kept.shape
            assert hasattr(lent, "_dynamo_static_input_type") and not hasattr(kept, "_dynamo_static_input_type")
    theirs = peer.cache.layers[0]
    theirs.__class__ = type("OfAWindow", (type(theirs),), {})
    assert not lends(built.task.cache, peer.cache)


class Fills(TorchDispatchMode):
    """Counts the kernels that fill a tensor."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten.fill_.Scalar
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [pytest.param("tiny-qwen3-moe", id="lent"), pytest.param("ernie4_5_moe", id="own")])
@torch.inference_mode()
def test_a_round_counts_by_itself_and_can_be_repeated(tmp_path: Path, name: str) -> None:
    """A timed step fills its position and nothing of a layer; the logits of each round are the model's."""
    asset = tiny.ROOT / "assets" / name
    built, peer = peer_of(asset if asset.is_dir() else checkpoints.checkpoint(name, tmp_path))
    want = peer.model(built.x[:, : CELL.length + 4]).logits[:, CELL.length :]
    for _ in range(2):
        peer.begin()
        for i in range(4):
            with Fills() as fills:
                y = peer.step(CELL.length + i)
            torch.testing.assert_close(y[:, -1], want[:, i], rtol=1e-4, atol=1e-4)
            assert fills.n == 1
        peer.require_counted(CELL.length + 4)
    with pytest.raises(ValueError, match=r"^transformers' cache counts \[13\] positions, not 12$"):
        peer.require_counted(12)


def named(model: Any) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}
