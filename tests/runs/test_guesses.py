"""runs/guesses.py: what routers would choose earlier, recomputed from what the layers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lab.measure.tolerances import exact_products
from moe_lab.models.moe_layer import hooked, moe_layers
from moe_lab.ops.softmax_topk import top_k
from moe_lab.records.trace import Trace
from moe_lab.runs import build
from moe_lab.runs.guesses import Guesses
from moe_lab.runs.trace import layers_of, record
from moe_lab.workloads import text
from tests import quick

DECODE = ("workload.phase=decode", "workload.context_len=11", "seq_len=5")


def recorded(path: Path, *more: str, n_tokens: int = 64) -> Trace:
    record(quick.compose("checkpoint", *more), path, n_tokens, guesses=True)
    return Trace(path)


def column(trace: Trace, index: int, name: str) -> np.ndarray:
    return np.concatenate(list(trace.pieces_of(index, name)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tiny-olmoe", id="tiny-olmoe"),
        pytest.param("tiny-qwen3-moe", id="tiny-qwen3-moe", marks=pytest.mark.slow),
    ],
)
def test_guesses_are_the_layers_own_gate_on_earlier_states(name: str, tmp_path: Path) -> None:
    """Ahead: on what the layer before read. Before attention: on the sum so far, normed by hand."""
    more = (f"model.path={quick.ASSETS / name}", "batch=4")
    cfg = quick.compose("checkpoint", *more)
    model = build.build_model(cfg)
    layers, read, sums = moe_layers(model), [], []
    windows = text.windows(text.read_domains(cfg.workload.path, 256, None), 16, 4, 0)
    with exact_products(), torch.inference_mode():
        handles = [  # x and residual as they enter the block
            block.register_forward_pre_hook(
                lambda _, args: sums.append(args[0] if args[1] is None else args[0] + args[1])
            )
            for block in model.layers  # type: ignore[union-attr]
        ]
        with hooked(layers, lambda _, args, result: read.append(args[0])):
            model(windows.ids_WS)
        for handle in handles:
            handle.remove()
        with recorded(tmp_path / "x.trace", *more) as trace:
            assert trace.columns == ("weights", "margin", "ahead", "pre_attention")
            K = trace.layers[0].top_k
            for index, layer in enumerate(layers):
                block = model.layers[index]  # type: ignore[index]
                scale, eps = block.mlp_norm.weight, block.mlp_norm.eps
                x: Tensor = sums[index].flatten(0, 1)
                normed_TD = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale
                wanted = top_k(layer.logits(normed_TD), 2 * K).numpy()
                assert np.mean(column(trace, index, "pre_attention") == wanted) > 0.99  # but for near-ties
                if index:
                    wanted = top_k(layer.logits(read[index - 1]), 2 * K).numpy()
                    assert np.array_equal(column(trace, index, "ahead"), wanted)
                else:
                    assert (column(trace, index, "ahead") == -1).all()


@torch.inference_mode()
def test_without_attention_the_state_before_it_tells_the_choice() -> None:
    """Attention that adds nothing: the guess is what the router chooses, in every layer."""
    model = build.build_model(quick.compose("checkpoint"))
    for block in model.layers:  # type: ignore[union-attr]
        block.attention.o.weight.zero_()
    guesses = Guesses(model, layers_of(model))
    with guesses.looking():
        routings = model(torch.arange(30).view(2, 15)).routings
    for routing, found in zip(routings, guesses.take(), strict=True):
        assert torch.equal(routing.expert_ids_TK.sort().values, found["pre_attention"][:, :2].sort().values)


def test_decoding_guesses_as_the_whole_pass_does(tmp_path: Path) -> None:
    """Step by step, in the order of the steps."""
    with recorded(tmp_path / "x.trace", *DECODE) as trace, recorded(tmp_path / "y.trace") as whole:
        tokens = trace.tokens()
        order = np.lexsort((tokens.position, tokens.sequence))
        for index in range(4):
            for name in ("ahead", "pre_attention"):
                assert np.mean(column(trace, index, name)[order] == column(whole, index, name)) > 0.98


def test_lookahead_computes_what_was_guessed(tmp_path: Path) -> None:
    """In layer 1, before which nothing is changed: its experts are the first k of the native model's guess."""
    with recorded(tmp_path / "x.trace") as native:
        record(quick.compose("checkpoint", "router=lookahead", "router@router.inner=native"), tmp_path / "y.trace", 64)
        with Trace(tmp_path / "y.trace") as ahead:
            assert np.array_equal(ahead.ids(0), native.ids(0))
            assert np.array_equal(np.sort(ahead.ids(1)), np.sort(column(native, 1, "ahead")[:, :2]))
            assert not np.array_equal(np.sort(ahead.ids(1)), np.sort(native.ids(1)))
