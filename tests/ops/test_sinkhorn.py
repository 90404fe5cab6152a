"""log_plan, and plan and choice by kernels, against an independent Sinkhorn in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx
from moe_lab.ops.library import triton_interprets
from moe_lab.ops.sinkhorn import log_plan, require_computable, scores_of, sinkhorn_route
from tests.ops.compiling import assert_compiles

SIZES = pytest.mark.parametrize(
    ("T", "E"),
    [
        pytest.param(1, 5, id="T=1"),
        pytest.param(37, 1, id="E=1"),
        pytest.param(3, 12, id="T<E"),
        pytest.param(37, 7, id="T=37"),
        pytest.param(199, 12, id="T=199"),
    ],
)
ITERS = pytest.mark.parametrize(
    "iters", [pytest.param(0, id="0 iters"), pytest.param(1, id="1 iter"), pytest.param(10, id="10 iters")]
)


def skewed_logits(T: int, E: int) -> Tensor:
    """Seeded logits that favour the first experts."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) - torch.arange(E) * 0.3


def plan64(logits_TE: Tensor, iters: int, temperature: float = 1.0) -> np.ndarray:
    """Rows scaled to 1, then columns to T/E and rows to 1 in turn, on the matrix itself in float64."""
    T, E = logits_TE.shape
    wide = logits_TE.double().numpy() / temperature
    plan_TE = np.exp(wide - wide.max(1, keepdims=True))
    plan_TE /= plan_TE.sum(1, keepdims=True)
    for _ in range(iters):
        plan_TE *= T / E / plan_TE.sum(0)
        plan_TE /= plan_TE.sum(1, keepdims=True)
    return plan_TE


def column_error(log_plan_TE: Tensor) -> float:
    """Largest deviation of a column from T/E, relative to it."""
    T, E = log_plan_TE.shape
    return float((log_plan_TE.double().exp().sum(0) * E / T - 1).abs().max())


@SIZES
@ITERS
@pytest.mark.parametrize(
    "temperature", [pytest.param(1.0, id="1"), pytest.param(0.3, id="0.3"), pytest.param(4.0, id="4")]
)
def test_the_plan_equals_sinkhorn_in_float64(T: int, E: int, iters: int, temperature: float) -> None:
    """After any number of iterations the plan is that of the matrix form, in float32."""
    logits_TE = skewed_logits(T, E)
    log_plan_TE = log_plan(logits_TE, iters, temperature)
    assert log_plan_TE.dtype == torch.float32
    np.testing.assert_allclose(log_plan_TE.exp(), plan64(logits_TE, iters, temperature), rtol=2e-5, atol=1e-7)


@SIZES
def test_the_converged_plan_has_both_marginals(T: int, E: int) -> None:
    """With many iterations rows sum to 1, columns to T/E, and the plan is the float64 fixed point."""
    logits_TE = skewed_logits(T, E)
    log_plan_TE = log_plan(logits_TE, 300, 1.0)
    torch.testing.assert_close(log_plan_TE.exp().sum(1), torch.ones(T), rtol=1e-5, atol=0)
    assert column_error(log_plan_TE) < 1e-4
    np.testing.assert_allclose(log_plan_TE.exp(), plan64(logits_TE, 3000), rtol=2e-4)


@SIZES
@ITERS
@pytest.mark.parametrize("scale", [pytest.param(1.0, id="1"), pytest.param(30.0, id="30"), pytest.param(3e4, id="3e4")])
def test_rows_sum_to_one_after_any_number_of_iterations(T: int, E: int, iters: int, scale: float) -> None:
    """The rows are scaled last, so they are exact however far the columns are off and however large the logits."""
    rows_T = log_plan(skewed_logits(T, E) * scale, iters, 1.0).exp().sum(1)
    torch.testing.assert_close(rows_T, torch.ones(T), rtol=2e-5, atol=0)


def test_columns_come_nearer_with_every_iteration() -> None:
    """The columns' error never grows (but for rounding) and ends small."""
    logits_TE = skewed_logits(199, 12)
    errors = [column_error(log_plan(logits_TE, iters, 0.5)) for iters in (0, 1, 2, 4, 8, 16, 32)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert errors[0] > 1 and errors[-1] < 1e-2


@settings(max_examples=30, deadline=None, database=None)
@given(
    logits=st.integers(1, 6).flatmap(
        lambda E: st.lists(st.lists(st.floats(-20, 20, width=32), min_size=E, max_size=E), min_size=1, max_size=6)
    ),
    iters=st.integers(0, 5),
)
def test_rows_sum_to_one_for_any_logits(logits: list[list[float]], iters: int) -> None:
    """Any finite logits give a finite plan with rows that sum to 1."""
    log_plan_TE = log_plan(torch.tensor(logits), iters, 1.0)
    assert log_plan_TE.isfinite().all()
    torch.testing.assert_close(log_plan_TE.exp().sum(1), torch.ones(len(logits)), rtol=2e-5, atol=0)


@pytest.mark.parametrize("E", [pytest.param(5, id="E=5"), pytest.param(12, id="E=12")])
def test_one_token_has_the_uniform_plan(E: int) -> None:
    """With T=1 every column must hold 1/E, whatever the logits."""
    log_plan_TE = log_plan(skewed_logits(1, E) * 10, 1, 1.0)
    torch.testing.assert_close(log_plan_TE, torch.full((1, E), -math.log(E)), rtol=1e-5, atol=1e-5)


@ITERS
def test_no_tokens_have_an_empty_plan(iters: int) -> None:
    """T=0 gives [0, E] float32."""
    log_plan_TE = log_plan(torch.empty(0, 7, dtype=torch.float16), iters, 1.0)
    assert log_plan_TE.shape == (0, 7) and log_plan_TE.dtype == torch.float32


@ITERS
@pytest.mark.parametrize("E", [pytest.param(5, id="E=5"), pytest.param(33, id="E=33")])
def test_equal_experts_have_equal_columns(iters: int, E: int) -> None:
    """Experts with the same logits get the same share, up to the order in which a column is summed."""
    logits_TE = skewed_logits(37, E)
    logits_TE[:, E - 1] = logits_TE[:, E // 2] = logits_TE[:, 0]
    log_plan_TE = log_plan(logits_TE, iters, 1.0)
    torch.testing.assert_close(log_plan_TE[:, [E - 1, E // 2]], log_plan_TE[:, [0, 0]], rtol=1e-6, atol=1e-6)


@SIZES
@ITERS
def test_equal_logits_have_a_plan_of_one_value(T: int, E: int, iters: int) -> None:
    """Where all logits are equal, all entries are bitwise equal: a tie that the ids can break."""
    log_plan_TE = log_plan(torch.full((T, E), 1.7), iters, 0.7)
    assert log_plan_TE.unique().numel() == 1
    torch.testing.assert_close(log_plan_TE, torch.full((T, E), -math.log(E)), rtol=1e-6, atol=1e-6)


@ITERS
@pytest.mark.parametrize(
    "shift", [pytest.param(10.0, id="10"), pytest.param(-1e3, id="-1e3"), pytest.param(3e4, id="3e4")]
)
def test_a_shift_of_a_token_s_logits_changes_nothing(iters: int, shift: float) -> None:
    """A constant added to a row cancels; the logits are multiples of 1/256, so the sum itself is exact."""
    logits_TE = (skewed_logits(37, 7) * 256).round() / 256
    shift_T1 = torch.arange(37)[:, None] % 2 * shift
    torch.testing.assert_close(
        log_plan(logits_TE + shift_T1, iters, 1.0), log_plan(logits_TE, iters, 1.0), rtol=1e-5, atol=2e-5
    )


def test_at_convergence_a_shift_of_an_expert_s_logits_changes_nothing() -> None:
    """A bias per expert is what the column scaling takes out."""
    logits_TE = skewed_logits(37, 7)
    torch.testing.assert_close(
        log_plan(logits_TE + torch.arange(7), 300, 1.0), log_plan(logits_TE, 300, 1.0), rtol=1e-4, atol=1e-4
    )


@ITERS
def test_the_temperature_divides_the_logits(iters: int) -> None:
    """Dividing the logits beforehand is the same."""
    logits_TE = skewed_logits(37, 7)
    assert torch.equal(log_plan(logits_TE, iters, 0.25), log_plan(logits_TE / 0.25, iters, 1.0))


@ITERS
def test_tokens_and_experts_have_no_order(iters: int) -> None:
    """Permuting tokens and experts permutes the plan."""
    logits_TE = skewed_logits(37, 7)
    generator = torch.Generator().manual_seed(0)
    token_T, expert_E = torch.randperm(37, generator=generator), torch.randperm(7, generator=generator)
    torch.testing.assert_close(
        log_plan(logits_TE[token_T][:, expert_E], iters, 1.0),
        log_plan(logits_TE, iters, 1.0)[token_T][:, expert_E],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
def test_logits_of_any_dtype_give_the_float32_plan(dtype: torch.dtype) -> None:
    """The computation is float32 whatever comes in."""
    logits_TE = skewed_logits(37, 7).to(dtype)
    before_TE = logits_TE.clone()
    assert torch.equal(log_plan(logits_TE, 5, 1.0), log_plan(logits_TE.float(), 5, 1.0))
    assert torch.equal(logits_TE, before_TE)


@pytest.mark.parametrize("iters", [pytest.param(0, id="0 iters"), pytest.param(30, id="30 iters")])
def test_a_tolerance_ends_the_iterations(iters: int) -> None:
    """The plan is that of the first iteration whose columns are near enough; of a small one that of all."""
    logits_TE = skewed_logits(199, 12)
    plans = [log_plan(logits_TE, i, 1.0) for i in range(iters + 1)]
    for tolerance in (0.5, 0.05, 1e-3):
        first = next((i for i, plan in enumerate(plans) if column_error(plan) <= tolerance), iters)
        assert torch.equal(log_plan(logits_TE, iters, 1.0, tolerance), plans[first])


needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [pytest.param("triton", id="triton"), pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx)]
)
EXTENSION = pytest.mark.parametrize("implementation", [pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx)])


def log_plan64(logits_TE: Tensor, iters: int, temperature: float, tolerance: float) -> Tensor:
    """As `plan64`, in logarithms, which no size of logits overflows."""
    T, E = logits_TE.shape
    wide_TE = logits_TE.double().cpu()
    plan_TE = (wide_TE / temperature).log_softmax(1)
    for _ in range(iters if T > 1 else 0):
        step_E = math.log(T / E) - plan_TE.logsumexp(0)
        if float(((-step_E).exp() - 1).abs().max()) <= tolerance:
            break
        plan_TE = (plan_TE + step_E).log_softmax(1)
    return plan_TE if T > 1 else wide_TE


def check(
    found: tuple[Tensor, Tensor, Tensor],
    logits_TE: Tensor,
    k: int,
    iters: int = 10,
    temperature: float = 1.0,
    tolerance: float = 0.0,
) -> None:
    """The k largest of the plan, but where they are within rounding of each other; weights, and the columns' scale."""
    ids_TK, weights_TK, log_b_E = (tensor.cpu() for tensor in found)
    T, E = logits_TE.shape
    assert (ids_TK.dtype, weights_TK.dtype, log_b_E.dtype) == (torch.int32, torch.float32, torch.float32)
    assert ids_TK.shape == weights_TK.shape == (T, k) and log_b_E.shape == (E,)
    if T == 0:
        return
    expected_TE = log_plan64(logits_TE, iters, temperature, tolerance)
    rounding = 1e-4 + 64 * 2**-24 * float(logits_TE.double().abs().max()) / temperature
    chosen_TK = expected_TE.gather(1, ids_TK.long())
    assert bool((ids_TK.sort(1).values.diff(dim=1) > 0).all()) and int(ids_TK.min()) >= 0 and int(ids_TK.max()) < E
    assert float((expected_TE.topk(k).values - chosen_TK).abs().max()) <= rounding
    weights64_TK = logits_TE.double().cpu().gather(1, ids_TK.long()).softmax(1)
    torch.testing.assert_close(weights_TK.double(), weights64_TK, rtol=1e-5, atol=1e-6)
    scores_TE = scores_of(logits_TE.cpu(), log_b_E, temperature)
    torch.testing.assert_close(scores_TE.double(), expected_TE, rtol=0, atol=rounding)


def few_levels(T: int, E: int) -> Tensor:
    """Ties everywhere."""
    return torch.randint(-1, 2, (T, E), generator=torch.Generator().manual_seed(T + E)).float()


def far_columns(T: int, E: int) -> Tensor:
    """The last experts are so far down in every row that their columns of the softmax are 0 in fp32."""
    return skewed_logits(T, E) - 150 * (torch.arange(E) > E // 2)


def takes_long(case: dict[str, Any]) -> bool:
    """To interpret."""
    large = case["T"] * case["E"] > 10000 and case["kind"] not in (skewed_logits, far_columns)
    return large and case["implementation"] == "triton" and triton_interprets()


ROUTED = (
    (0, 5, 2, "T=0"),
    (1, 7, 3, "T=1"),
    (2, 5, 2, "T=2"),
    (37, 7, 7, "k=E"),
    (199, 33, 4, "E=33"),
    (199, 1, 1, "E=1"),
    (300, 64, 12, "k=12"),
    (700, 64, 8, "more than one block"),
    (40, 300, 3, "E=300"),
)


@pytest.mark.thinned(2, empty=("T=0", "E=1"))
@pytest.mark.skip_where(takes_long, reason="the interpreter is slow: smaller ones, and all on a GPU")
@pytest.mark.parametrize(("T", "E", "k"), [pytest.param(*size, id=name) for *size, name in ROUTED])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(skewed_logits, id="skewed"),
        pytest.param(lambda T, E: skewed_logits(T, E).half(), id="fp16", marks=pytest.mark.slow),
        pytest.param(lambda T, E: skewed_logits(T, E).bfloat16(), id="bf16", marks=pytest.mark.slow),
        pytest.param(lambda T, E: 3e4 * few_levels(T, E), id="huge"),
        pytest.param(far_columns, id="far columns", marks=pytest.mark.slow),
        pytest.param(lambda T, E: torch.full((T, E), 1.7), id="constant", marks=pytest.mark.slow),
    ],
)
@IMPLEMENTATION
def test_plan_and_choice_are_those_of_float64(
    T: int, E: int, k: int, kind: Callable[[int, int], Tensor], implementation: str, device: torch.device
) -> None:
    """Few tokens and many, one expert or all, columns that underflow; twice the same bits; logits are not written."""
    interprets = implementation == "triton" and triton_interprets()
    logits_TE = kind(T, E).to(device)
    before_TE = logits_TE.clone()
    for iters, temperature in ((2 if interprets else 10, 1.0), (1, 0.3), (0, 1.0)):
        arguments = (logits_TE, k, iters, temperature, 0.0, implementation)
        found = sinkhorn_route(*arguments)
        check(found, logits_TE, k, iters, temperature)
        assert all(torch.equal(*pair) for pair in zip(found, sinkhorn_route(*arguments), strict=True))
        if interprets:
            break
    assert torch.equal(logits_TE, before_TE)


@IMPLEMENTATION
def test_constant_logits_go_to_the_lowest_ids(implementation: str, device: torch.device) -> None:
    """A plan of ties."""
    ids_TK, weights_TK, _ = sinkhorn_route(torch.full((37, 12), 0.3, device=device), 3, 10, 1.0, 0.0, implementation)
    assert ids_TK.tolist() == [[0, 1, 2]] * 37
    torch.testing.assert_close(weights_TK.cpu(), torch.full((37, 3), 1 / 3))


@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(199, id="one block"), pytest.param(1100, id="several")])
def test_kernels_end_the_iterations_as_the_reference_does(T: int, implementation: str, device: torch.device) -> None:
    """By the same test of the columns, on the device."""
    logits_TE = skewed_logits(T, 12).to(device)
    for tolerance in (0.5, 0.05):
        found = sinkhorn_route(logits_TE, 3, 8, 1.0, tolerance, implementation)
        check(found, logits_TE, 3, 8, 1.0, tolerance)


@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(37, id="T=37")])
@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (math.nan, math.inf, -math.inf)])
def test_logits_without_a_plan_still_name_different_experts(
    value: float, T: int, implementation: str, device: torch.device
) -> None:
    """Ids in range and unique, so that nothing is read outside. (A run refuses such logits.)"""
    logits_TE = skewed_logits(T, 12).to(device)
    logits_TE[T - 1, 3:9] = value
    ids_TK, _, _ = sinkhorn_route(logits_TE, 5, 10, 1.0, 0.0, implementation)
    assert bool((ids_TK.sort(1).values.diff(dim=1) > 0).all()) and int(ids_TK.min()) >= 0 and int(ids_TK.max()) < 12


@IMPLEMENTATION
def test_views_are_taken(implementation: str, device: torch.device) -> None:
    """Whatever the strides."""
    whole = skewed_logits(40, 40).to(device)
    for view in (whole[:37, 3:15], whole[:12, :37].t(), whole[::2, ::3], whole[:1, :12].expand(5, 12)):
        check(sinkhorn_route(view, 3, 10, 1.0, 0.0, implementation), view, 3)


@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(0, id="T=0"), pytest.param(5, id="T=5")])
def test_the_op_passes_opcheck(T: int, implementation: str, device: torch.device) -> None:
    """Schema, fake tensors and tracing agree with what the op does."""
    logits_TE = skewed_logits(T, 8).to(device)
    sinkhorn_route(logits_TE, 2, 3, 1.0, 0.0, implementation)  # loads it
    op = {"triton": torch.ops.moe_lab.sinkhorn_route_triton, "cuda_ext": torch.ops.moe_lab.sinkhorn_route}
    results = torch.library.opcheck(op[implementation].default, (logits_TE, 2, 3, 1.0, 0.0))
    assert set(results.values()) == {"SUCCESS"}


@EXTENSION
def test_the_out_variant_writes_what_it_is_given(implementation: str, device: torch.device) -> None:
    """All of it, and refuses what it cannot."""
    logits_TE = skewed_logits(37, 8).to(device)
    expected = sinkhorn_route(logits_TE, 2, 3, 1.0, 0.0, implementation)
    given = {name: torch.full_like(t, -7) for name, t in zip(("ids", "weights", "log_b"), expected, strict=True)}
    torch.ops.moe_lab.sinkhorn_route.out(logits_TE, 2, 3, 1.0, 0.0, **given)
    assert all(torch.equal(*pair) for pair in zip(given.values(), expected, strict=True))
    with pytest.raises(RuntimeError, match="temperature > 0"):
        torch.ops.moe_lab.sinkhorn_route(logits_TE, 2, 3, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"iters must be >= 0 and < 2\*\*31"):
        torch.ops.moe_lab.sinkhorn_route(logits_TE, 2, 2**31, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="log_b: must be contiguous"):
        torch.ops.moe_lab.sinkhorn_route.out(logits_TE, 2, 3, 1.0, 0.0, **given | {"log_b": expected[1]})


def test_sizes_without_a_kernel_are_unavailable() -> None:
    """Before the extension is asked."""
    require_computable("cuda_ext", 32, 1024)
    require_computable("triton", 33, 1025)
    for k, E in ((33, 64), (2, 1025)):
        with pytest.raises(UnavailableError, match="at most 1024 experts and 32 experts per token"):
            require_computable("cuda_ext", k, E)


@EXTENSION
def test_any_number_of_threads_finds_the_same_bits(implementation: str) -> None:
    """The parts that are summed depend on the size alone."""
    logits_TE, threads = skewed_logits(5000, 60), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(sinkhorn_route(logits_TE, 6, 10, 1.0, 0.0, implementation))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.gpu
@IMPLEMENTATION
@pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        pytest.param(*size, id=" ".join(map(str, size)))
        for size in ((4096, 64, 8), (16384, 128, 8), (65536, 64, 2), (20000, 200, 9), (70000, 256, 8), (3000, 1000, 32))
    ],
)
def test_many_tokens_on_the_device(T: int, E: int, k: int, implementation: str) -> None:
    """Blocks that wait for each other; rows that no longer fit into them; scales that need care."""
    for logits_TE in (skewed_logits(T, E) / 8, few_levels(T, E), far_columns(T, E) / 8):
        check(sinkhorn_route(logits_TE.cuda(), k, 10, 1.0, 0.0, implementation), logits_TE, k)


@pytest.mark.gpu
@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (199, 4096, 30000)])
def test_a_thousand_replays_give_the_same_bits(T: int, implementation: str) -> None:
    """Of a graph of three calls, one after the other; and what stands in its input is what is routed."""
    logits_TE = skewed_logits(T, 64).cuda()
    sinkhorn_route(logits_TE, 8, 10, 1.0, 0.0, implementation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            routed = sinkhorn_route(logits_TE, 8, 10, 1.0, 0.0, implementation)
    logits_TE.copy_(few_levels(T, 64) + skewed_logits(T, 64))
    graph.replay()
    check(routed, logits_TE, 8)
    first = [tensor.clone() for tensor in routed]
    differences = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        for tensor, wanted in zip(routed, first, strict=True):
            differences += (tensor != wanted).sum()
    assert int(differences) == 0


@pytest.mark.gpu
@EXTENSION
def test_threads_launch_side_by_side(implementation: str) -> None:
    """Each with as much shared memory as its size needs."""
    sizes = (300, 4000, 30000)
    wanted = [sinkhorn_route(skewed_logits(T, 64).cuda(), 8, 5, 1.0, 0.0, implementation) for T in sizes]

    def same(i: int) -> bool:
        logits_TE = skewed_logits(sizes[i], 64).cuda()
        found = [sinkhorn_route(logits_TE, 8, 5, 1.0, 0.0, implementation) for _ in range(300)]
        return all(torch.equal(a, b) for routed in found for a, b in zip(routed, wanted[i], strict=True))

    with ThreadPoolExecutor(len(sizes)) as pool:
        assert all(pool.map(same, range(len(sizes))))


def launches() -> None:
    """One program and several, one expert and many."""
    for dtype in (torch.bfloat16, torch.float32):
        sinkhorn_route(skewed_logits(37, 12).to(dtype), 3, 2, 1.0, 0.1, "triton")
        sinkhorn_route(skewed_logits(300, 64).to(dtype), 8, 2, 1.0, 0.0, "triton")
    sinkhorn_route(skewed_logits(1, 12), 3, 2, 1.0, 0.0, "triton")


@pytest.mark.slow
def test_the_triton_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Which their interpreter does not ask."""
    assert_compiles(launches, tmp_path)
