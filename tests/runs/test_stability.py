"""runs/stability.py: sums by hand, and models of which one layer was changed on purpose."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from moe_lab.measure.tolerances import TOLERANCES, exact_products
from moe_lab.routers.contract import members
from moe_lab.runs.stability import Compared, First, _predictions, _sums, _Window, compare_all
from tests import quick

TOKENS = 192
DECODER = ("model=decoder_moe", "model.vocab_size=256", "router=torch", "model.d_model=32", "model.n_heads=4")
DECODER += ("model.n_layers=2", "model.mlp_hidden_dim=24", "model.n_experts=6", "model.top_k=2")


def compared(*variants: DictConfig, n_tokens: int = TOKENS) -> tuple[First, list[Compared | str]]:
    first = First.of(quick.compose("checkpoint"), variants, n_tokens)
    return first, list(compare_all(first, dict(enumerate(variants)), lambda _, windows: windows).values())  # type: ignore[misc]


def altered(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the checkpoint with other weights."""
    shutil.copytree(quick.TINY_OLMOE, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def window(y: list[list[float]], used: list[list[list[int]]], logits: list[list[list[float]]], E: int = 4) -> _Window:
    return _Window(torch.tensor(y), [members(torch.tensor(ids), E) for ids in used], list(map(torch.tensor, logits)))


def test_sums_by_hand() -> None:
    """Two layers, three tokens, two experts of four.

    Token 0 changes in layer 1 alone, token 1 in both, token 2 in none (the order does not count). In layer 0 the
    probabilities are 0.4, 0.3, 0.2, 0.1; in layer 1 0.3 + d, 0.3, 0.3 - d, 0.1.
    """
    d = 1e-7
    wide = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3).log().tolist()
    tight = torch.tensor([[0.3 + d, 0.3, 0.3 - d, 0.1]] * 3, dtype=torch.float64).log().tolist()
    y = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    first = window(y, [[[0, 1]] * 3, [[0, 1]] * 3], [wide, tight])
    other = window([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [[[0, 1], [0, 2], [1, 0]], [[0, 2], [2, 3], [0, 1]]], [])
    sums = _sums(first, other, [2, 2], TOLERANCES[torch.float32])
    same_L, used_L, changed_L, first_L, near, argmax, kl, margins = sums
    assert (same_L.tolist(), used_L.tolist()) == ([2 + 1 + 2, 1 + 0 + 2], [6, 6])
    assert (changed_L.tolist(), first_L.tolist()) == ([1, 2], [1, 1])
    assert (near, argmax) == (1, 1)  # token 0's
    assert sorted(margins.tolist()) == pytest.approx([d, 0.1], abs=1e-7)
    p = 1 / (1 + math.e)
    assert kl == pytest.approx((1 - 2 * p) * 1, rel=1e-6)  # of token 1 alone: ln q/p = 1, and -1


def test_kl_by_hand() -> None:
    """q = 1/2, 1/2 and p = 1/4, 3/4; in pieces of any size; equal distributions have exactly 0."""
    q, p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log() + 3
    kl_S, argmax_S = _predictions(q.expand(5, 2), p.expand(5, 2))
    assert kl_S.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)] * 5)
    assert kl_S.dtype == torch.float64 and argmax_S.tolist() == [True] * 5
    assert _predictions(q, q)[0].tolist() == [0] and not _predictions(q, q)[1].any()


@pytest.mark.slow
def test_the_batch_changes_nothing_but_rounding() -> None:
    """Batches of 1, 3 and 2: windows are paired whatever the batch; 2 again is exactly the same."""
    first, found = compared(*(quick.compose("checkpoint", f"batch={batch}") for batch in (1, 3, 2)))
    assert first.n_windows == TOKENS // 16 and not first.missing
    for of in found:
        assert isinstance(of, Compared) and of.implementation["router"] == "torch"
        assert (of.used_LW == 2 * 16).all() and of.used_LW.shape == (4, 12)
        assert of.same_LW.sum() >= 0.99 * of.used_LW.sum() and abs(of.kl_W).max() < 1e-6
        assert of.near_W is not None and of.near_W.sum() == of.first_LW.sum()  # whatever changed was a near-tie
    again = found[2]
    assert isinstance(again, Compared) and not again.changed_LW.any() and not again.kl_W.any()


def test_near_ties_are_known_where_both_choose_the_largest_of_a_softmax() -> None:
    """With the same k: of another router, or of more experts, another number decides."""
    _, found = compared(*(quick.compose("checkpoint", *more) for more in ([], ["router=sinkhorn"], ["model.top_k=1"])))
    assert [of.near_W is None for of in found if isinstance(of, Compared)] == [False, True, True]


@pytest.mark.parametrize("layer", [pytest.param(0, id="first", marks=pytest.mark.slow), pytest.param(2, id="third")])
def test_the_first_changed_layer_is_the_one_that_was_changed(layer: int, tmp_path: Path) -> None:
    """Another gate in one layer: nothing changes before it, and what changes there is no near-tie."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    path = altered(tmp_path / "other", change)
    _, (of,) = compared(quick.compose("checkpoint", f"model.path={path}"))
    assert isinstance(of, Compared)
    assert not of.changed_LW[:layer].any() and not of.first_LW[layer + 1 :].sum() > 0.3 * TOKENS
    assert of.first_LW[layer].sum() == of.changed_LW[layer].sum() > 0.5 * TOKENS
    assert of.near_W.sum() < 0.05 * of.first_LW.sum() and np.median(of.margins) > 1e-3
    assert of.kl_W.sum() > 0.01 * TOKENS and of.argmax_W.sum() > 0


def test_experts_that_changed_places_are_counted_exactly(tmp_path: Path) -> None:
    """Two experts of layer 1 swapped, gate rows and weights: other ids for the tokens that use one of them alone."""
    first = First.of(quick.compose("checkpoint"), [], TOKENS)
    ids_WS = first.windows.ids_WS[: first.n_windows]
    with exact_products(), torch.inference_mode():
        used_TE = members(first.model(ids_WS).routings[1].expert_ids_TK, 16)
    a, b = used_TE.sum(0).topk(2).indices.tolist()
    moved_W = (used_TE[:, a] != used_TE[:, b]).view(first.n_windows, -1).sum(1).numpy()

    def change(tensors: dict[str, Tensor]) -> None:
        gate = tensors["model.layers.1.mlp.gate.weight"]
        gate[[a, b]] = gate[[b, a]].clone()
        for part in ("gate_proj", "up_proj", "down_proj"):
            one, other = (f"model.layers.1.mlp.experts.{expert}.{part}.weight" for expert in (a, b))
            tensors[one], tensors[other] = tensors[other], tensors[one]

    of = first.compare(quick.compose("checkpoint", f"model.path={altered(tmp_path / 'other', change)}"))
    assert moved_W.sum() > 20 and np.array_equal(of.first_LW[1], moved_W)
    assert np.array_equal(of.changed_LW[1], moved_W) and np.array_equal(of.used_LW[1] - of.same_LW[1], moved_W)
    assert not of.changed_LW[0].any() and of.kl_W.max() < 1e-6 and not of.argmax_W.any()


@pytest.mark.slow
def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    """Not here, other layers, weights that are cut off; the others are compared all the same."""
    cut = altered(tmp_path / "cut", lambda tensors: None)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    _, found = compared(
        quick.compose("checkpoint", "dtype=fp16"),
        quick.compose("checkpoint", "execution=cuda_graph"),
        quick.compose("checkpoint", f"model.path={quick.ASSETS / 'tiny-qwen3-moe'}"),
        quick.compose("checkpoint", f"model.path={cut}"),
        quick.compose("checkpoint", "experts=loop"),
        n_tokens=32,
    )
    assert found[0] == "unavailable: dtype=fp16: not supported on a CPU; use bf16 or fp32"
    assert str(found[1]).startswith("unavailable: execution=cuda_graph")
    assert found[2] == "error: it has other layers of experts, or other numbers of experts"
    assert str(found[3]).startswith("error: ") and "model.safetensors" in str(found[3])
    assert isinstance(found[4], Compared)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """The same model, whose bytes a tokenizer.json numbers otherwise."""
    path = altered(tmp_path / "other", lambda tensors: None)
    vocabulary = {letter: 255 - index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    _, (of,) = compared(quick.compose("checkpoint", f"model.path={path}"))
    assert of == "error: it has another vocabulary or tokenizer, so its tokens are others"


@pytest.mark.slow
def test_a_decoder_without_a_checkpoint_is_compared() -> None:
    """In bf16: some tokens change, and hardly one that is not a near-tie."""
    first = First.of(quick.compose("checkpoint", *DECODER), [], 1024)
    found = compare_all(first, {"bf16": quick.compose("checkpoint", *DECODER, "dtype=bf16")}, lambda _, of: of)["bf16"]
    assert isinstance(found, Compared) and [layer.layer for layer in first.layers] == [0, 1]
    assert 0 < found.first_LW.sum() < 200 and found.near_W.sum() > 0.9 * found.first_LW.sum()
    assert 0 < found.kl_W.sum() < 10


@pytest.mark.slow
def test_a_compiled_pass_is_compared() -> None:
    """It rounds otherwise, and predicts the same."""
    first = First.of(quick.compose("checkpoint", *DECODER), [], TOKENS)
    of = first.compare(quick.compose("checkpoint", *DECODER, "execution=compile", "experts=grouped"))
    assert 0 < of.kl_W.max() < 1e-6 and of.near_W.sum() == of.first_LW.sum()


@pytest.mark.parametrize(
    ("first", "variant", "message"),
    [
        pytest.param(["workload.phase=prefill"], [], "workload.phase=prefill: whole passes are compared", id="phase"),
        pytest.param(["execution=compile"], [], "put it among the variants", id="execution"),
        pytest.param(["workload.load=balanced"], [], "are the router's own choice here", id="load"),
        pytest.param([], ["batch=100003"], "batches of 2, 100003 need a multiple of 200006", id="batches"),
    ],
)
def test_a_first_one_that_cannot_be_is_said(first: list[str], variant: list[str], message: str) -> None:
    """In one line."""
    with pytest.raises(ValueError, match=message):
        First.of(quick.compose("checkpoint", *first), [quick.compose("checkpoint", *variant)], None)


def test_windows_that_fill_no_batch_are_said(tmp_path: Path) -> None:
    """Seven windows of 16: a batch of 3 and one of 2 take six together."""
    (tmp_path / "a.txt").write_text("x" * 113)
    cfg = quick.compose("checkpoint", f"workload.path={tmp_path}")
    first = First.of(cfg, [quick.compose("checkpoint", f"workload.path={tmp_path}", "batch=3")], None)
    assert first.n_windows == 6 and first.missing == ["the last window, which does not fill a batch"]
