"""The weighted sum over a token's slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops import cxx, extension
from moe_lab.ops.combine import combine

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")

DTYPES = [
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.float16, 2e-3, id="fp16"),
    pytest.param(torch.bfloat16, 1e-2, id="bf16"),
]


def case(T: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs in a random order, weights, and about a third of the slots unused (one token without any)."""
    generator = torch.Generator().manual_seed(T * 100 + K)
    o_ND = torch.randn(T * K, D, generator=generator).to(dtype)
    inverse_N = torch.randperm(T * K, generator=generator).int()
    weights_TK, used_TK = torch.rand(T, K, generator=generator), torch.rand(T, K, generator=generator) > 0.3
    used_TK[T // 2 : T // 2 + 1] = False
    return o_ND.to(device), inverse_N.to(device), weights_TK.to(device), used_TK.to(device)


def expected(o_ND: Tensor, inverse_N: Tensor, weights_TK: Tensor, used_TK: Tensor) -> Tensor:
    """The formula in float64, slot by slot."""
    (T, K), o_ND = weights_TK.shape, o_ND.double().cpu()
    y_TD = torch.zeros(T, o_ND.shape[1], dtype=torch.float64)
    for token, slot in used_TK.cpu().nonzero().tolist():
        y_TD[token] += float(weights_TK[token, slot]) * o_ND[int(inverse_N[token * K + slot])]
    return y_TD


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("T", "K", "D"),
    [pytest.param(0, 2, 5, id="T=0"), pytest.param(1, 1, 1, id="ones"), pytest.param(37, 3, 33, id="odd")],
)
def test_the_sum_is_that_of_the_formula(
    T: int, K: int, D: int, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    """In every dtype, with slots and whole tokens unused."""
    arguments = case(T, K, D, dtype, device)
    y_TD = combine(*arguments)
    assert y_TD.dtype == dtype
    assert y_TD.shape == (T, D)
    torch.testing.assert_close(y_TD.double().cpu(), expected(*arguments), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rows_of_unused_slots_may_hold_nan(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """They are replaced, not multiplied by 0; a token without a slot is 0."""
    o_ND, inverse_N, weights_TK, used_TK = case(37, 3, 33, dtype, device)
    o_ND[inverse_N[~used_TK.flatten()].long()] = float("nan")
    weights_TK[~used_TK] = float("nan")
    y_TD = combine(o_ND, inverse_N, weights_TK, used_TK)
    assert y_TD.isfinite().all()
    assert not y_TD[~used_TK.any(-1)].any()
    wanted_TD = expected(o_ND, inverse_N, weights_TK, used_TK)
    torch.testing.assert_close(y_TD.double().cpu(), wanted_TD, atol=tolerance, rtol=tolerance)


def test_all_slots_unused_is_zero(device: torch.device) -> None:
    """Even where every row is NaN."""
    o_ND = torch.full((6, 4), float("nan"), device=device)
    nothing_TK = torch.zeros(3, 2, dtype=torch.bool, device=device)
    y_TD = combine(o_ND, torch.arange(6, dtype=torch.int32, device=device), torch.ones(3, 2, device=device), nothing_TK)
    assert torch.equal(y_TD, torch.zeros(3, 4, device=device))


def test_rows_of_unused_slots_need_not_be_there() -> None:
    """On a CPU in fp32 the used ones alone are computed; they come first in the order."""
    o_ND, _, weights_TK, used_TK = case(37, 3, 33, torch.float32, torch.device("cpu"))
    used_N = used_TK.flatten()
    inverse_N = torch.where(used_N, used_N.cumsum(0) - 1, used_N.sum() + (~used_N).cumsum(0) - 1).int()
    few = combine(o_ND[: int(used_N.sum())], inverse_N, weights_TK, used_TK)
    torch.testing.assert_close(few, combine(o_ND, inverse_N, weights_TK, used_TK), atol=0, rtol=0)
    assert combine(o_ND[:0], inverse_N, weights_TK, torch.zeros_like(used_TK)).eq(0).all()


def test_weights_may_be_left_out_and_ids_say_what_is_used(device: torch.device) -> None:
    """Then all weigh 1; a negative id is an unused slot."""
    for dtype in (torch.float32, torch.bfloat16):
        o_ND, inverse_N, weights_TK, used_TK = case(37, 3, 33, dtype, device)
        ids_TK = torch.where(used_TK, 5, -1).int()
        ones_TK = torch.ones_like(weights_TK)
        assert torch.equal(combine(o_ND, inverse_N, None, ids_TK), combine(o_ND, inverse_N, ones_TK, used_TK))
        assert torch.equal(combine(o_ND, inverse_N, weights_TK, ids_TK), combine(o_ND, inverse_N, weights_TK, used_TK))


def by_extension(
    o: Tensor, inverse_N: Tensor | None, ids_TK: Tensor, weights_TK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The op, of the extension built and loaded first."""
    extension.load()
    return torch.ops.moe_lab.combine(o, inverse_N, ids_TK, weights_TK, dtype)


def in_order(
    o: Tensor, inverse_N: Tensor | None, ids_TK: Tensor, weights_TK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the op promises bit for bit, by numpy: each piece, product and sum rounded to float32, in that order."""
    (T, K), pieces = ids_TK.shape, (o if o.dim() == 3 else o[None]).float().cpu().numpy()
    y_TD = np.zeros((T, pieces.shape[2]), np.float32)
    for token, slot in (ids_TK if ids_TK.dtype == torch.bool else ids_TK >= 0).cpu().nonzero().tolist():
        at = token * K + slot
        row_D = np.zeros_like(y_TD[0])
        for index, piece in enumerate(pieces):
            its_D = piece[at if inverse_N is None else int(inverse_N[at])]
            row_D = its_D if index == 0 else row_D + its_D
        y_TD[token] += row_D if weights_TK is None else np.float32(weights_TK[token, slot].item()) * row_D
    return torch.from_numpy(y_TD).to(dtype)


DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
SHAPES = pytest.mark.parametrize(
    ("T", "K", "D"),
    [
        pytest.param(0, 2, 8, id="T=0"),
        pytest.param(1, 1, 1, id="ones"),
        pytest.param(1, 8, 264, id="T=1"),
        pytest.param(37, 3, 33, id="odd D"),
        pytest.param(37, 9, 12, id="D of four"),
        pytest.param(37, 5, 520, id="a row of several warps"),
        pytest.param(5, 33, 40, id="more than 32 slots"),
        pytest.param(199, 8, 16, id="T=199"),
    ],
)


@needs_cxx
@SHAPES
@DTYPE
def test_the_extension_sums_in_the_order_of_the_slots(
    T: int, K: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit, to every dtype, with weights and without, rows sorted and in the order of the slots; and near the
    formula in float64. Rows and weights of unused slots hold NaN."""
    o_ND, inverse_N, weights_TK, used_TK = case(T, K, D, dtype, device)
    weights_TK[~used_TK] = float("nan")
    for order_N in (inverse_N, None):
        rows_N = torch.arange(T * K, device=device) if order_N is None else order_N.long()
        poisoned_ND = o_ND.clone()
        poisoned_ND[rows_N[~used_TK.flatten()]] = float("nan")
        for weights in (weights_TK, None):
            for out in (torch.float32, torch.float16, torch.bfloat16):
                for ids_TK in (torch.where(used_TK, 3, -1).int(), used_TK):
                    arguments = (poisoned_ND, order_N, ids_TK, weights, out)
                    y_TD = by_extension(*arguments)
                    assert y_TD.dtype == out and torch.equal(y_TD.cpu(), in_order(*arguments))
        y_TD = by_extension(poisoned_ND, order_N, used_TK, weights_TK, torch.float32)
        wanted_TD = expected(o_ND, rows_N, weights_TK, used_TK)
        torch.testing.assert_close(y_TD.double().cpu(), wanted_TD, atol=1e-5, rtol=1e-5)


@needs_cxx
@pytest.mark.parametrize("pieces", [pytest.param(n, id=f"{n} pieces") for n in (1, 2, 7, 9)])
@pytest.mark.parametrize("D", [pytest.param(33, id="odd"), pytest.param(132, id="D of four")])
def test_the_pieces_of_a_row_are_summed_first(pieces: int, D: int, device: torch.device) -> None:
    """In their order, before the weight."""
    for T, K in ((1, 2), (37, 3), (3, 33)):
        _, inverse_N, weights_TK, used_TK = case(T, K, D, torch.float32, device)
        generator = torch.Generator().manual_seed(pieces)
        o = torch.randn(pieces, T * K, D, generator=generator).to(device)
        o[:, inverse_N[~used_TK.flatten()].long()] = float("nan")
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (o, inverse_N, torch.where(used_TK, 0, -1).int(), weights_TK, dtype)
            assert torch.equal(by_extension(*arguments).cpu(), in_order(*arguments))


@needs_cxx
@settings(max_examples=40, deadline=None, database=None)
@given(data=st.data(), T=st.integers(0, 5), K=st.integers(1, 4), D=st.integers(1, 9), pieces=st.integers(1, 3))
def test_any_sum_is_that_of_the_formula(data: st.DataObject, T: int, K: int, D: int, pieces: int) -> None:
    """Any rows, the same row for several slots too, any slots unused."""
    rows = data.draw(st.lists(st.integers(0, max(T * K - 1, 0)), min_size=T * K, max_size=T * K))
    used = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    generator = torch.Generator().manual_seed(T + K + D)
    o, weights_TK = torch.randn(pieces, T * K, D, generator=generator), torch.randn(T, K, generator=generator)
    inverse_N, used_TK = torch.tensor(rows, dtype=torch.int32), torch.tensor(used, dtype=torch.bool).view(T, K)
    y_TD = by_extension(o, inverse_N, used_TK, weights_TK, torch.float32)
    wanted_TD = expected(o.double().sum(0), inverse_N, weights_TK, used_TK)
    torch.testing.assert_close(y_TD.double(), wanted_TD, atol=1e-5, rtol=1e-5)


@needs_cxx
def test_rows_at_any_address_are_read(device: torch.device) -> None:
    """The wide loads are for rows on a boundary of 16 bytes: others are read one by one, with the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        o_ND, inverse_N, weights_TK, used_TK = case(37, 3, 64, dtype, device)
        shifted = torch.empty(o_ND.numel() + 1, dtype=dtype, device=device)[1:].view_as(o_ND).copy_(o_ND)
        assert shifted.data_ptr() % 16
        wanted_TD = by_extension(o_ND, inverse_N, used_TK, weights_TK, dtype)
        assert torch.equal(by_extension(shifted, inverse_N, used_TK, weights_TK, dtype), wanted_TD)


@needs_cxx
def test_the_out_variant_writes_every_element_and_nothing_else(device: torch.device) -> None:
    """Also of an output within a larger tensor, of tokens without a slot too."""
    for D in (33, 64):
        o_ND, inverse_N, weights_TK, used_TK = case(37, 3, D, torch.bfloat16, device)
        whole = torch.full((39, D), -7.0, dtype=torch.bfloat16, device=device)
        wanted_TD = by_extension(o_ND, inverse_N, used_TK, weights_TK, torch.bfloat16)
        torch.ops.moe_lab.combine.out(o_ND, inverse_N, used_TK, weights_TK, y=whole[1:38])
        assert torch.equal(whole[1:38], wanted_TD)
        assert bool((whole[[0, 38]] == -7).all())


@needs_cxx
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"o": torch.zeros(6)}, "o: must be", id="o's dimensions"),
        pytest.param({"o": torch.zeros(6, 4, dtype=torch.float64)}, "must be float32, float16 or bfloat16", id="fp64"),
        pytest.param({"o": torch.zeros(5, 4), "inverse": None}, "a row for each of the 6 slots", id="too few rows"),
        pytest.param({"inverse": torch.zeros(5, dtype=torch.int32)}, "inverse: must be int32 with T", id="inverse"),
        pytest.param({"ids": torch.zeros(3, 2, dtype=torch.int64)}, "ids: must be", id="int64 ids"),
        pytest.param({"weights": torch.zeros(3, 2).half()}, "weights: must be float32", id="fp16 weights"),
        pytest.param({"dtype": torch.float64}, "must be float32, float16 or bfloat16", id="y in fp64"),
    ],
)
def test_the_extension_refuses_what_it_cannot_sum(changed: dict[str, object], message: str) -> None:
    """In a sentence, before anything is computed."""
    arguments = {
        "o": torch.zeros(6, 4),
        "inverse": torch.arange(6, dtype=torch.int32),
        "ids": torch.zeros(3, 2, dtype=torch.int32),
        "weights": torch.zeros(3, 2),
        "dtype": torch.float32,
    }
    with pytest.raises(RuntimeError, match=message):
        by_extension(*(arguments | changed).values())  # type: ignore[arg-type]


@needs_cxx
def test_the_sum_has_a_fake_form(device: torch.device) -> None:
    """Shapes and dtypes of fake tensors are those of real ones, so torch.compile takes it."""
    extension.load()
    for T in (0, 37):
        o_ND, inverse_N, weights_TK, used_TK = case(T, 3, 33, torch.float16, device)
        for arguments in (
            (o_ND, inverse_N, used_TK, weights_TK, torch.float16),
            (o_ND.float()[None], None, used_TK.int() - 1, None, torch.bfloat16),
        ):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.moe_lab.combine.default, arguments, test_utils=checks)
    compiled = torch.compile(by_loaded_extension, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), by_extension(*arguments))


def by_loaded_extension(*arguments: object) -> Tensor:
    return torch.ops.moe_lab.combine(*arguments)


@needs_cxx
def test_combine_takes_the_extension_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors of any strides, weights or none; other dtypes are summed by torch. On a CPU it is not asked."""
    extension.load()
    assert not extension.computes(torch.device("cpu"))
    monkeypatch.setattr(extension, "computes", lambda device: True)
    calls: list[torch.dtype] = []
    op = torch.ops.moe_lab.combine
    monkeypatch.setattr(torch.ops.moe_lab, "combine", lambda *given: calls.append(given[-1]) or op(*given))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        o_ND, inverse_N, weights_TK, used_TK = case(37, 3, 33, dtype, torch.device("cpu"))
        strided = (o_ND.t().contiguous().t(), inverse_N, weights_TK.t().contiguous().t(), used_TK.t().contiguous().t())
        for arguments in ((o_ND, inverse_N, weights_TK, used_TK), strided):
            y_TD = combine(*arguments)
            assert y_TD.dtype == dtype
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(y_TD.double(), expected(*arguments), atol=tolerance, rtol=tolerance)
    assert calls == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize(
    ("T", "K", "D"),
    [
        pytest.param(1, 8, 7168, id="one token"),
        pytest.param(64, 2, 4096, id="mixtral"),
        pytest.param(4096, 8, 2048, id="olmoe"),
        pytest.param(65536, 4, 264, id="many tokens"),
    ],
)
def test_cuda_sums_with_the_bits_of_the_cpu(T: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of real sizes: few warps and many."""
    o_ND, inverse_N, weights_TK, used_TK = case(T, K, D, dtype, torch.device("cpu"))
    arguments = (o_ND, inverse_N, used_TK, weights_TK)
    on_gpu = [tensor.to(device) for tensor in arguments]
    assert torch.equal(by_extension(*on_gpu, dtype).cpu(), by_extension(*arguments, dtype))


@pytest.mark.gpu
def test_a_graph_sums_what_stands_in_its_input(device: torch.device) -> None:
    """Twenty calls in a graph, replayed over other rows; then a thousand times with the same bits."""
    o_ND, inverse_N, weights_TK, used_TK = case(300, 8, 264, torch.bfloat16, device)
    arguments = (o_ND, inverse_N, used_TK, weights_TK, torch.bfloat16)
    by_extension(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            y_TD = by_extension(*arguments)
    o_ND.copy_(o_ND.flip(0))
    graph.replay()
    assert torch.equal(y_TD.cpu(), in_order(*arguments))
    first, differences = y_TD.clone(), torch.zeros((), device=device, dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        differences += (y_TD != first).sum()
    assert int(differences) == 0


@pytest.mark.gpu
def test_combine_uses_the_extension_on_cuda(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is loaded; nothing is read on the host."""
    extension.load()
    arguments, op, calls = case(37, 3, 64, torch.bfloat16, device), torch.ops.moe_lab.combine, []
    monkeypatch.setattr(torch.ops.moe_lab, "combine", lambda *given: calls.append(given) or op(*given))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD = combine(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 1
    torch.testing.assert_close(y_TD.double().cpu(), expected(*arguments), atol=1e-2, rtol=1e-2)
