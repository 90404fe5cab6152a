"""measure/roofline.py: operations, least bytes, and the floor they give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_lab.measure.roofline import count_flops, least_bytes, measured_peaks, roofline
from moe_lab.models import Output
from moe_lab.models.attend import attend
from moe_lab.routers.base import Routing
from tests import tiny
from tests.tiny import BATCH, HEADS, LAYERS, SEQ, VOCAB, D, E, F, K, T

CPU = torch.device("cpu")


def layer_flops(tokens: int, slots: int) -> int:
    """A router's gate, and three matrices [F, D] per used slot; 2 operations per multiply-add."""
    return 2 * tokens * E * D + 2 * slots * 3 * D * F


def decoder_flops() -> int:
    projections = 4 * 2 * T * D * D
    scores_and_values = 2 * 2 * BATCH * (SEQ * (SEQ + 1) // 2) * D
    return LAYERS * (projections + scores_and_values + layer_flops(T, T * K)) + 2 * T * D * VOCAB


def routing_to(ids: list[list[int]]) -> Routing:
    ids_TK = torch.tensor(ids, dtype=torch.int32)
    return Routing(ids_TK, (ids_TK >= 0).float() / ids_TK.shape[1])


def decoder_output(x_BS: Tensor, ids: list[list[int]]) -> Output:
    """What a decoder would return that sent the first tokens to `ids` and the others to the same as the last."""
    filled = ids + [ids[-1]] * (x_BS.numel() - len(ids))
    return Output(torch.zeros(*x_BS.shape, VOCAB), (routing_to(filled),) * LAYERS)


@pytest.mark.parametrize("tokens", [pytest.param(n, id=f"t{n}") for n in (1, 14)])
def test_operations_of_a_layer_are_its_gate_and_its_used_slots(tokens: int) -> None:
    """2 T E D for the gate, 2 T K 3 D F for the experts, of the fp32 reference."""
    run = tiny.built(tiny.moe_layer(tokens=tokens))
    _, flops = count_flops(lambda: run.built.twin(run.built.x))
    assert flops == layer_flops(tokens, tokens * K)


def test_unused_slots_cost_no_operations() -> None:
    """A dropped slot (id -1) is not multiplied."""
    run = tiny.built(tiny.moe_layer(tokens=3))
    forced = routing_to([[0, 1], [2, -1], [-1, -1]])
    _, flops = count_flops(lambda: run.built.twin(run.built.x, forced_routing=(forced,)))
    assert flops == layer_flops(0, 3)


def test_operations_of_a_decoder_are_those_of_its_matrices() -> None:
    """Projections, attention (a query's products with the keys up to its own), layers and head."""
    run = tiny.built(tiny.decoder_moe())
    _, flops = count_flops(lambda: run.built.twin(run.built.x))
    assert flops == decoder_flops()


@pytest.mark.parametrize("heads", [pytest.param(4, id="own_keys"), pytest.param(2, id="shared_keys")])
@pytest.mark.parametrize(
    ("S", "N", "positions", "window", "seen"),
    [
        pytest.param(5, 5, None, None, 1 + 2 + 3 + 4 + 5, id="whole"),
        pytest.param(5, 9, None, None, 5 + 6 + 7 + 8 + 9, id="behind a cache"),
        pytest.param(5, 5, None, 3, 1 + 2 + 3 + 3 + 3, id="window"),
        pytest.param(3, 9, None, 2, 2 + 2 + 2, id="window behind a cache"),
        pytest.param(1, 9, [6], None, 7, id="one token"),
        pytest.param(2, 9, [1, 2], 2, 2 + 2, id="two tokens in a window"),
        pytest.param(0, 9, None, None, 0, id="none"),
    ],
)
def test_operations_of_attention_are_those_of_the_seen_keys(
    S: int, N: int, positions: list[int] | None, window: int | None, seen: int, heads: int
) -> None:
    """Not of the square that a kernel may compute: the floor is what any implementation does."""
    q, k, v = torch.randn(3, 4, S, 8), torch.randn(3, heads, N, 8), torch.randn(3, heads, N, 6)
    position_S = None if positions is None else torch.tensor(positions)
    y, flops = count_flops(lambda: attend(q, k, v, position_S, window))  # type: ignore[arg-type, return-value]
    assert flops == 2 * 3 * 4 * seen * (8 + 6)
    torch.testing.assert_close(y, attend(q, k, v, position_S, window))


@pytest.mark.parametrize("chunk", [pytest.param(3, id="chunks"), pytest.param("null", id="whole")])
def test_a_prefill_in_chunks_has_no_more_operations(chunk: int | str) -> None:
    """Than a forward pass, but for the head: it reads the last position alone."""
    run = tiny.built(tiny.decoder_moe("workload.phase=prefill", f"workload.prefill_chunk={chunk}"))
    run.verify()
    assert run.verification is not None
    assert run.verification.flops == decoder_flops() - 2 * (T - BATCH) * D * VOCAB


def flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> None:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat(1, 1, 2, 1), v.transpose(1, 2).repeat(1, 1, 2, 1)
    torch.ops.aten._efficient_attention_forward(q, k, v, None, None, None, None, None, 0.0, 2)


@pytest.mark.parametrize("attend", [pytest.param(each, id=each.__name__) for each in (flash, cudnn, efficient)])
def test_operations_of_attention_behind_a_cache_on_a_gpu(attend: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Fewer queries than keys, and two heads a key: each query's product with each key, and with each value."""
    q, k, v = (torch.empty(3, heads, n, 64, device="meta") for heads, n in ((4, 5), (2, 9), (2, 9)))
    _, flops = count_flops(lambda: attend(q, k, v))  # type: ignore[arg-type, return-value]
    assert flops == 2 * 3 * 4 * 5 * 9 * (64 + 64)


@pytest.mark.parametrize(
    "model", [pytest.param("moe_layer", id="moe_layer"), pytest.param("decoder_moe", id="decoder")]
)
def test_operations_in_the_record_hold_the_gate(model: str) -> None:
    """A run routes its tokens: the forced reference pass, which skips the router, is not what the run computes."""
    run = tiny.built(tiny.moe_layer() if model == "moe_layer" else tiny.decoder_moe())
    run.verify()
    assert run.verification is not None
    assert run.verification.flops == (layer_flops(T, T * K) if model == "moe_layer" else decoder_flops())


@pytest.mark.parametrize(
    ("ids", "used"),
    [
        pytest.param([[0, 3], [3, 0], [0, 3]], 2, id="two_of_five"),
        pytest.param([[0, 1], [2, 3], [4, 0]], 5, id="all"),
        pytest.param([[1, -1], [-1, -1], [1, -1]], 1, id="one_and_dropped_slots"),
        pytest.param([[-1, -1]] * 3, 0, id="none"),
    ],
)
def test_least_bytes_of_a_layer_hold_only_the_experts_in_use(ids: list[list[int]], used: int) -> None:
    """The gate, 3 D F per used expert, the input and the output, 4 bytes each."""
    run = tiny.built(tiny.moe_layer(tokens=3))
    output = Output(torch.zeros(3, D), (routing_to(ids),))
    assert least_bytes(run.built.model, run.built.x, output) == 4 * (E * D + used * 3 * D * F + 2 * 3 * D)


def test_least_bytes_halve_with_bf16() -> None:
    """Weights, input and output are all stored in the run's dtype."""
    wide, narrow = (tiny.built(tiny.moe_layer(f"dtype={dtype}")) for dtype in ("fp32", "bf16"))
    routing = routing_to([[0, 3]] * 14)
    sizes = [
        least_bytes(run.built.model, run.built.x, Output(torch.zeros(14, D, dtype=run.built.dtype), (routing,)))
        for run in (wide, narrow)
    ]
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize("tied", [pytest.param(False, id="untied"), pytest.param(True, id="tied")])
def test_least_bytes_of_a_decoder_hold_only_the_embedding_rows_in_use(tied: bool) -> None:
    """Untied, the rows of the distinct tokens and the whole head; tied, the one matrix, which the head reads whole."""
    run = tiny.built(tiny.decoder_moe(f"model.tie_embeddings={tied}".lower()))
    x_BS = torch.tensor([[5, 5, 9, 9, 9, 5, 5], [0, 96, 0, 96, 5, 5, 5]])
    output = decoder_output(x_BS, [[0, 1], [2, 2]])
    distinct, used = 4, 3
    layer = 4 * D * D + E * D + used * 3 * D * F + 2 * D
    embedding_and_head = VOCAB * D if tied else distinct * D + VOCAB * D
    parameters = LAYERS * layer + D + embedding_and_head
    assert least_bytes(run.built.model, x_BS, output) == 4 * parameters + 8 * x_BS.numel() + 4 * x_BS.numel() * VOCAB


def test_least_bytes_of_minimal_are_all_of_it() -> None:
    """No part of it is left unread."""
    run = tiny.built(tiny.minimal())
    hidden = 37
    assert least_bytes(run.built.model, run.built.x, run.built.step()) == 4 * (
        hidden * hidden + hidden + 2 * 2 * hidden
    )


def test_least_bytes_do_not_depend_on_the_number_of_heads() -> None:
    """The heads split the projections and add no parameter."""
    sizes = set()
    for heads in (1, HEADS):
        run = tiny.built(tiny.decoder_moe(f"model.n_heads={heads}"))
        sizes.add(least_bytes(run.built.model, run.built.x, decoder_output(run.built.x, [[0, 1]])))
    assert len(sizes) == 1


@pytest.mark.slow
def test_peaks_are_positive_and_measured_once() -> None:
    """The second look is the first one's result."""
    peaks = measured_peaks(CPU, torch.float32)
    assert peaks["bytes_per_s"] > 0 and peaks["flops_per_s"] > 0
    assert "float32" in peaks["peak_source"]
    assert measured_peaks(CPU, torch.float32) is peaks


@pytest.mark.parametrize(
    "flops", [pytest.param(0, id="bound_by_bytes"), pytest.param(10**15, id="bound_by_operations")]
)
def test_the_floor_is_the_slower_of_moving_and_multiplying(flops: int) -> None:
    """floor = max(bytes / bandwidth, operations / rate), and the fraction is floor over the median."""
    moved = 12345
    result = roofline(moved, flops, 2.0, CPU, torch.float32)
    assert result["bytes"] == moved and result["flops"] == flops
    slower_s = max(moved / result["bytes_per_s"], flops / result["flops_per_s"])
    assert result["floor_ms"] == pytest.approx(slower_s * 1e3)
    assert result["fraction_of_floor"] == pytest.approx(result["floor_ms"] / 2.0)
    assert result.items() >= measured_peaks(CPU, torch.float32).items()
