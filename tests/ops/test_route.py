"""route by Triton and by the extension: order, ties, extreme values, groups, biases, weights, and the sorted slots."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.cli import listing
from moe_lab.config.compose import compose
from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx, extension
from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.library import triton_interprets
from moe_lab.ops.route import Routed, gate_route, multiplies_gate, require_computable, route
from moe_lab.ops.selection import Selection
from moe_lab.runs import build
from tests.ops.compiling import assert_compiles
from tests.routers.cases import SCORED, make

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where a fixture cannot say it
needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
IMPLEMENTATIONS = ("torch", "triton", "cuda_ext", "vllm", "sglang", "transformers")
IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [pytest.param("triton", id="triton"), pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx)]
)
EXTENSION = pytest.mark.parametrize("implementation", [pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx)])
DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
RENORMALIZE = pytest.mark.parametrize(
    "renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")]
)
DSV3 = Selection(8, "sigmoid", 8, 4, "top2", True, 2.5)


def normal(T: int, E: int) -> Tensor:
    """Seeded logits without ties."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E))


def few_levels(T: int, E: int) -> Tensor:
    """Seeded logits of three values: ties everywhere."""
    return torch.randint(-1, 2, (T, E), generator=torch.Generator().manual_seed(T + E)).float()


def close(T: int, E: int) -> Tensor:
    """Values that differ in their last bits alone."""
    return 1 + normal(T, E) * 3e-7


def far(T: int, E: int) -> Tensor:
    """Of every size and sign, so that the k-th is far below the first."""
    return normal(T, E) * 10 ** (4 * normal(E, T).t())


def minus_infinities(T: int, E: int) -> Tensor:
    """Two of three logits are -inf, but one of each row."""
    logits_TE = torch.where(few_levels(T, E) < 1, -torch.inf, normal(T, E))
    logits_TE[:, E // 2] = -3e4
    return logits_TE


def huge(T: int, E: int) -> Tensor:
    """+-3e4 and 0."""
    return few_levels(T, E) * 3e4


ALL_LOGITS = (normal, few_levels, close, far, minus_infinities, huge)


def expected_ids(scores_TE: Tensor, k: int) -> list[list[int]]:
    """The k first of a stable sort by falling score, by numpy."""
    return np.argsort(-scores_TE.double().cpu().numpy(), axis=-1, kind="stable")[:, :k].tolist()


def weights64(logits_TE: Tensor, ids_TK: Tensor, how: Selection) -> np.ndarray:
    """The weights of these experts in float64."""
    x_TE = logits_TE.double().cpu()
    scores = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": lambda x: x.sigmoid(),
        "sqrt_softplus": lambda x: torch.nn.functional.softplus(x, threshold=1e9).sqrt(),
    }
    chosen_TK = scores[how.score](x_TE).gather(-1, ids_TK.long().cpu())
    if how.renormalize and how.score == "softmax":  # of the chosen logits: cannot underflow
        chosen_TK = x_TE.gather(-1, ids_TK.long().cpu()).softmax(-1)
    elif how.renormalize:
        chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1e-20)
    return (how.scale * chosen_TK).numpy()


def check(routed: Routed, logits_TE: Tensor, how: Selection) -> None:
    """The ids of a stable sort of the logits, and the weights in float64."""
    ids_TK, weights_TK = routed.expert_ids_TK, routed.weights_TK
    assert (ids_TK.dtype, weights_TK.dtype) == (torch.int32, torch.float32)
    assert ids_TK.shape == weights_TK.shape == (len(logits_TE), how.k)
    assert ids_TK.tolist() == expected_ids(logits_TE, how.k)
    np.testing.assert_allclose(weights_TK.cpu(), weights64(logits_TE, ids_TK, how), rtol=1e-5, atol=1e-6)


SIZES = pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(3, 1, 1, id="E=1"),
        pytest.param(16, 5, 5, id="k=E"),
        pytest.param(199, 8, 2, id="E=8"),
        pytest.param(37, 16, 4, id="E=16"),
        pytest.param(37, 32, 8, id="E=32"),
        pytest.param(5, 12, 1, id="top 1"),
        pytest.param(37, 64, 6, id="E=64"),
        pytest.param(37, 65, 6, id="E=65"),
        pytest.param(37, 128, 8, id="E=128"),
        pytest.param(3, 256, 8, id="E=256"),
        pytest.param(2, 384, 8, id="E=384"),
        pytest.param(2, 512, 10, id="E=512"),
        pytest.param(3, 300, 9, id="E=300"),
        pytest.param(2, 1000, 32, id="k=32"),
        pytest.param(2, 32, 32, id="k=E=32"),
    ],
)


def takes_long(case: dict[str, Any]) -> bool:
    """To interpret."""
    return case["T"] * case["k"] > 64 and case["implementation"] == "triton" and triton_interprets()


@pytest.mark.thinned(2, empty=("T=0", "E=1"))
@pytest.mark.skip_where(takes_long, reason="the interpreter is slow: smaller ones, and all on a GPU")
@SIZES
@RENORMALIZE
@DTYPE
@IMPLEMENTATION
def test_the_kernel_chooses_and_weighs_as_a_sort_does(
    T: int, E: int, k: int, renormalize: bool, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    """For any number of experts, all of them chosen or one, ties to the lowest id; the logits stay as they are."""
    kinds = ALL_LOGITS
    if implementation == "triton" and triton_interprets():
        kinds = (normal, few_levels)
    how = Selection(k, renormalize=renormalize)
    for kind in kinds:
        logits_TE = kind(T, E).to(device, dtype)
        before_TE = logits_TE.clone()
        check(route(logits_TE, how, implementation), logits_TE, how)
        assert torch.equal(logits_TE, before_TE)


@pytest.mark.gpu
@DTYPE
@EXTENSION
@pytest.mark.parametrize("k", [pytest.param(k, id=f"k={k}") for k in (1, 2, 3, 4, 6, 8, 10, 16, 31, 32)])
@pytest.mark.parametrize(
    "E", [pytest.param(E, id=f"E={E}") for E in (8, 16, 32, 33, 60, 64, 100, 128, 160, 256, 257, 384, 512, 768, 1024)]
)
def test_a_grid_of_sizes_on_the_device(E: int, k: int, dtype: torch.dtype, implementation: str) -> None:
    """Against float64, over all kinds of logits, few rows and many."""
    if k > E:
        pytest.skip("k > E")
    for T in (1, 37, 2500):
        for kind in ALL_LOGITS:
            logits_TE = kind(T, E).to("cuda", dtype)
            check(route(logits_TE, Selection(k), implementation), logits_TE, Selection(k))


@RENORMALIZE
@settings(max_examples=25, deadline=None, database=None)
@given(
    row=st.lists(st.sampled_from([-np.inf, -3e38, -1.0, -0.0, 0.0, 1e-40, 1.0, 3e4, 3e38]), min_size=1, max_size=12),
    data=st.data(),
)
@IMPLEMENTATION
def test_any_row_of_few_values_is_sorted_stably(
    renormalize: bool, row: list[float], data: st.DataObject, implementation: str
) -> None:
    """Ties of -inf, of the two zeros and of huge values go to the lowest id."""
    k = data.draw(st.integers(1, len(row)))
    logits_1E = torch.tensor([row], device=DEVICE)
    routed = route(logits_1E, Selection(k, renormalize=renormalize), implementation)
    assert routed.expert_ids_TK.tolist() == expected_ids(logits_1E, k)
    expected_1K = torch.from_numpy(weights64(logits_1E, routed.expert_ids_TK, Selection(k, renormalize=renormalize)))
    torch.testing.assert_close(routed.weights_TK.cpu(), expected_1K.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.thinned(2)
@RENORMALIZE
@IMPLEMENTATION
@pytest.mark.parametrize(
    "bad_row",
    [
        pytest.param([0.0, math.nan, 1.0, 2.0, 3.0], id="NaN"),
        pytest.param([math.nan] * 5, id="all NaN"),
        pytest.param([0.0, math.inf, 1.0, math.inf, 3.0], id="+inf"),
        pytest.param([-math.inf, math.nan, math.inf, -math.inf, 3.0], id="all kinds"),
        pytest.param([-math.inf] * 5, id="all -inf"),
    ],
)
@pytest.mark.parametrize("k", [pytest.param(1, id="k=1"), pytest.param(3, id="k=3"), pytest.param(5, id="k=5")])
@pytest.mark.parametrize("copies", [pytest.param(1, id="E=5"), pytest.param(12, id="E=64")])
def test_a_row_without_a_softmax_still_names_different_experts(
    k: int, bad_row: list[float], copies: int, renormalize: bool, implementation: str, device: torch.device
) -> None:
    """Ids in range and unique, so that nothing is read outside; weights NaN, so that it shows; other rows untouched."""
    E = 5 if copies == 1 else 64
    how = Selection(k, renormalize=renormalize)
    for bias_E in (None, normal(1, E)[0].to(device)):
        logits_TE = normal(3, E).to(device)
        clean = route(logits_TE, how, implementation, bias_E=bias_E)
        logits_TE[1] = torch.tensor((bad_row * 13)[:E])
        routed = route(logits_TE, how, implementation, bias_E=bias_E)
        chosen = routed.expert_ids_TK[1].tolist()
        assert len(set(chosen)) == k and all(0 <= expert < E for expert in chosen)
        assert bool(routed.weights_TK[1].isnan().all())
        assert torch.equal(routed.expert_ids_TK[::2], clean.expert_ids_TK[::2])
        assert torch.equal(routed.weights_TK[::2], clean.weights_TK[::2])


@IMPLEMENTATION
@pytest.mark.parametrize("group_score", [pytest.param("max", id="max"), pytest.param("top2", id="top2")])
@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (12, 32, 256)])
def test_a_group_with_nan_is_among_the_best(
    E: int, group_score: str, implementation: str, device: torch.device
) -> None:
    """As a sort has it, whatever else the group holds; its expert is the first, and its weight shows it."""
    how = Selection(4, "sigmoid", 4, 2, group_score)
    logits_TE = normal(5, E).clamp(-2, 2).to(device)
    for t, expert in enumerate((0, E // 4, E // 2 + 1, E - 1, 2)):
        logits_TE[t, expert // (E // 4) * (E // 4) :][: E // 4] = -torch.inf  # a group nobody would choose
        logits_TE[t, expert] = torch.nan
    routed = route(logits_TE, how, implementation, bias_E=torch.zeros(E, device=device))
    assert routed.expert_ids_TK[:, 0].tolist() == [0, E // 4, E // 2 + 1, E - 1, 2]
    assert bool(routed.weights_TK[:, 0].isnan().all())


@IMPLEMENTATION
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:7, :12].t(), id="transposed"),
        pytest.param(lambda x: x[:7, ::3], id="every third column"),
        pytest.param(lambda x: x[1:20:4, 3:15], id="every fourth row, cut"),
        pytest.param(lambda x: x[:1, :12].expand(5, 12), id="expanded over rows"),
        pytest.param(lambda x: x[:0, ::3], id="no rows, every third column"),
        pytest.param(lambda x: x[:5, :1].expand(5, 12), id="expanded over columns"),
        pytest.param(lambda x: x[:5, 3:4], id="one column of many"),
        pytest.param(lambda x: x[:, 1:33], id="32 experts, on no boundary of four"),
    ],
)
def test_the_kernel_takes_views(view: Callable[[Tensor], Tensor], implementation: str, device: torch.device) -> None:
    """Whatever the strides of the logits."""
    logits_TE = view(normal(37, 37).to(device))
    how = Selection(min(4, logits_TE.shape[1]))
    check(route(logits_TE, how, implementation), logits_TE, how)


@IMPLEMENTATION
def test_weights_do_not_underflow(implementation: str, device: torch.device) -> None:
    """Experts whose probability is 0 in fp32 are still ranked, and share the weight by their logits."""
    logits_1E = torch.tensor([[-400.0, 0.0, -200.0, -200.5]], device=device)
    routed = route(logits_1E, Selection(4, renormalize=False), implementation)
    assert routed.expert_ids_TK.tolist() == [[1, 2, 3, 0]] and routed.weights_TK.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    for shift in (-3e4, 3e4):
        weights_1K = route(logits_1E[:, 2:] + shift, Selection(2), implementation).weights_TK
        torch.testing.assert_close(weights_1K.cpu(), torch.tensor([[0.5, 0.0]]).softmax(-1))


@IMPLEMENTATION
def test_logits_in_float64_are_ranked_in_float32(implementation: str, device: torch.device) -> None:
    """What fp32 does not tell apart is a tie there."""
    logits_1E = torch.tensor([[1.0, 1.0 + 1e-12, 3.0, 2.0]], dtype=torch.float64, device=device)
    routed = route(logits_1E, Selection(4), implementation)
    assert routed.expert_ids_TK.tolist() == [[2, 3, 0, 1]]


def selections() -> Iterator[object]:
    """Every kind of score, ranking and group, at sizes with a path of their own and without; a half of them is slow."""
    sizes = ((64, 6, 8, 3), (256, 8, 8, 4), (160, 6, 8, 3), (60, 4, 5, 2), (12, 3, 12, 5))
    scores, group_scores, biases = ("softmax", "sigmoid", "sqrt_softplus"), ("max", "top2"), (False, True)
    for indices in product(range(5), range(3), range(2), range(2)):
        (E, k, n_groups, top_groups), score = sizes[indices[0]], scores[indices[1]]
        group_score, bias = group_scores[indices[2]], biases[indices[3]]
        how = Selection(k, score, n_groups, top_groups, group_score, score != "sqrt_softplus", 2.5)
        name = f"E={E}-{score}-{group_score}{'-bias' if bias else ''}"
        marks = pytest.mark.slow if sum(indices) % 2 else ()  # any three values still come together
        yield pytest.param(E, how, bias, id=name, marks=marks)
    yield pytest.param(37, Selection(3, "sigmoid"), True, id="no groups-bias")
    yield pytest.param(384, Selection(8, "sigmoid", scale=2.8), True, id="E=384-bias")
    yield pytest.param(128, Selection(1, "sigmoid", renormalize=False), False, id="E=128-top 1")


@IMPLEMENTATION
@pytest.mark.parametrize(("E", "how", "bias"), list(selections()))
def test_scores_biases_and_groups_are_those_of_the_torch_router(
    E: int, how: Selection, bias: bool, implementation: str, device: torch.device
) -> None:
    """The same experts but where the torch router's own scores are within rounding, and their weights."""
    if implementation == "triton" and triton_interprets() and E > 64:
        pytest.skip("the interpreter is slow: smaller ones, and all on a GPU")
    T = 5 if implementation == "triton" else 199
    keys = {**dataclasses.asdict(how), "bias": bias}
    router = SCORED(E, keys.pop("k"), impl="torch", **keys).to(device)
    if router.bias_E is not None:
        router.bias_E.data = (0.3 * normal(1, E)[0]).to(device)
    logits_TE = normal(T, E).to(device)
    expected = router.select(logits_TE)
    routed = route(logits_TE, how, implementation, bias_E=router.bias_E, sort=implementation == "cuda_ext")
    same_T = (routed.expert_ids_TK == expected.expert_ids_TK).all(-1)
    assert int((~same_T).sum()) <= T // 100  # near-ties
    torch.testing.assert_close(routed.weights_TK, router.weigh(logits_TE, routed.expert_ids_TK), rtol=1e-5, atol=1e-6)
    assert bool((routed.expert_ids_TK.sort(-1).values.diff(dim=-1) > 0).all()) or how.k == 1


@IMPLEMENTATION
@pytest.mark.parametrize("E", [pytest.param(12, id="E=12"), pytest.param(32, id="E=32")])
def test_a_gate_bias_is_part_of_the_logits(E: int, implementation: str, device: torch.device) -> None:
    """As in GPT-OSS: chosen and weighed by logits + bias."""
    logits_TE, bias_E = normal(5, E).to(device), normal(1, E)[0].to(device)
    routed = route(logits_TE, Selection(4), implementation, gate_bias_E=bias_E)
    check(routed, logits_TE + bias_E, Selection(4))


@pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        pytest.param(T, E, k, id=f"T={T} E={E}")
        for T, E, k in ((0, 8, 2), (1, 64, 8), (37, 7, 7), (199, 128, 8), (3000, 8, 2), (5000, 60, 4), (9000, 256, 8))
    ],
)
@EXTENSION
def test_the_slots_are_sorted_as_dispatch_sorts_them(
    T: int, E: int, k: int, implementation: str, device: torch.device
) -> None:
    """Counts, offsets, permutation and its inverse; few tokens and many, which other kernels sort."""
    for kind in ALL_LOGITS:
        logits_TE = kind(T, E).to(device)
        routed = route(logits_TE, Selection(k), implementation, sort=True)
        check(routed, logits_TE, Selection(k))
        assert routed.dispatch is not None
        for found, expected in zip(routed.dispatch, dispatch(routed.expert_ids_TK, E), strict=True):
            assert found.dtype == torch.int32 and torch.equal(found, expected)


@EXTENSION
def test_what_is_given_back_may_be_given_in(implementation: str, device: torch.device) -> None:
    """The out-variants write every element of what they are given, and nothing else."""
    extension.load()
    logits_TE = normal(37, 64).to(device)
    arguments = (logits_TE, None, None, 8, "softmax", 1, 1, "max", True, 1.0)
    expected = torch.ops.moe_lab.route_and_sort(*arguments)
    outputs = [torch.full_like(tensor, -7) for tensor in expected]
    names = ("ids", "weights", "counts", "offsets", "perm", "inverse")
    torch.ops.moe_lab.route_and_sort.out(*arguments, **dict(zip(names, outputs, strict=True)))
    for found, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(found, wanted)
    ids, weights = torch.full_like(expected[0], -7), torch.full_like(expected[1], -7)
    torch.ops.moe_lab.route.out(*arguments, ids=ids, weights=weights)
    assert torch.equal(ids, expected[0]) and torch.equal(weights, expected[1])
    with pytest.raises(RuntimeError, match="ids: must be contiguous"):
        torch.ops.moe_lab.route.out(*arguments, ids=ids.long(), weights=weights)


@EXTENSION
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"k": 0}, "k=0: must be between 1", id="k=0"),
        pytest.param({"k": 13}, "k=13: must be between 1", id="k > E"),
        pytest.param({"score": "tanh"}, "score=tanh: must be", id="score"),
        pytest.param({"n_groups": 5}, "n_groups=5: must divide E", id="groups"),
        pytest.param({"n_groups": 6, "top_groups": 1}, "top_groups=1: must be", id="too few left"),
        pytest.param({"bias": torch.zeros(11)}, "bias: must be float32", id="bias's size"),
        pytest.param({"gate_bias": torch.zeros(12, dtype=torch.float64)}, "gate_bias: must", id="bias's dtype"),
        pytest.param({"logits": torch.zeros(3, 12, dtype=torch.int32)}, "logits: must be float32", id="dtype"),
        pytest.param({"logits": torch.zeros(12, 3).t()}, "logits: must be .T, E. with stride 1", id="strides"),
        pytest.param({"logits": torch.zeros(2, 1025)}, "E=1025 must be between 1 and 1024", id="E"),
    ],
)
def test_the_op_refuses_what_it_cannot_compute(change: dict[str, object], message: str, implementation: str) -> None:
    """By name, before anything is read."""
    extension.load()
    given: dict[str, object] = {"logits": torch.zeros(3, 12), "gate_bias": None, "bias": None, "k": 3}
    given |= {"score": "softmax", "n_groups": 1, "top_groups": 1, "group_score": "max"}
    given |= {"renormalize": True, "scale": 1.0, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe_lab.route(**given)


def test_sizes_without_a_kernel_are_unavailable() -> None:
    """Before the extension is asked."""
    require_computable("cuda_ext", Selection(32, n_groups=32), 1024)
    for how, E in ((Selection(33), 64), (Selection(2), 1025), (Selection(2, n_groups=64), 64)):
        with pytest.raises(UnavailableError, match="supports at most"):
            require_computable("cuda_ext", how, E)


@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(0, id="T=0"), pytest.param(5, id="T=5")])
def test_the_op_passes_opcheck(T: int, implementation: str, device: torch.device) -> None:
    """Schema, fake tensors and tracing agree with what the op does."""
    arguments = (normal(T, 8).to(device), None, normal(1, 8)[0].to(device), 3, "sigmoid", 4, 2, "top2", True, 2.5)
    route(arguments[0], Selection(3), implementation)  # loads it
    names = {"triton": ["route_triton"], "cuda_ext": ["route", "route_and_sort"]}[implementation]
    for name in names:
        results = torch.library.opcheck(getattr(torch.ops.moe_lab, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}


@IMPLEMENTATION
def test_fake_tensors_have_the_real_shapes(implementation: str) -> None:
    """Under FakeTensorMode ids are int32 and weights float32 [T, K], contiguous, whatever the logits."""
    if implementation == "cuda_ext":
        extension.load()
    with FakeTensorMode():
        ids_TK, weights_TK, _ = route(torch.empty(7, 5, dtype=torch.float16).t(), Selection(3), implementation)
    for result, dtype in ((ids_TK, torch.int32), (weights_TK, torch.float32)):
        assert result.shape == (5, 3) and result.dtype == dtype and result.is_contiguous()


@needs_cxx
@EXTENSION
@pytest.mark.slow
def test_a_compiled_router_has_no_break_and_the_same_results(implementation: str, device: torch.device) -> None:
    """torch.compile(fullgraph=True) of a whole selection."""
    router = make("torch", 64, 6).to(device)
    router.impl = implementation
    extension.load()
    logits_TE = normal(37, 64).to(device)
    eager = router.select(logits_TE)
    compiled = torch.compile(lambda x: router.select(x)[:2], fullgraph=True)(logits_TE)
    assert torch.equal(compiled[0], eager.expert_ids_TK) and torch.equal(compiled[1], eager.weights_TK)


@pytest.mark.gpu
@EXTENSION
def test_a_captured_graph_routes_what_stands_in_its_input(implementation: str) -> None:
    """Twenty calls in a row in one graph, replayed over other logits; then a thousand runs with the same bits."""
    logits_TE = normal(300, 128).cuda()
    extension.load()
    route(logits_TE, Selection(8), implementation, sort=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            routed = route(logits_TE, Selection(8), implementation, sort=True)
    logits_TE.copy_(few_levels(300, 128))
    graph.replay()
    check(routed, logits_TE, Selection(8))
    assert routed.dispatch is not None
    first = [tensor.clone() for tensor in (routed.expert_ids_TK, routed.weights_TK, *routed.dispatch)]
    differences = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        for tensor, wanted in zip((routed.expert_ids_TK, routed.weights_TK, *routed.dispatch), first, strict=True):
            differences += (tensor != wanted).sum()
    assert int(differences) == 0


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (16, 4096, 40000)])
def test_a_thousand_runs_give_the_same_bits(T: int, implementation: str) -> None:
    """Grouped scores, and the slots sorted by one kernel or several."""
    logits_TE, bias_E = normal(T, 256).cuda(), normal(1, 256)[0].cuda()
    runs = 1000
    first = route(logits_TE, DSV3, implementation, bias_E=bias_E, sort=True)
    differences = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(runs):
        again = route(logits_TE, DSV3, implementation, bias_E=bias_E, sort=True)
        assert again.dispatch is not None and first.dispatch is not None
        for found, wanted in zip((*again[:2], *again.dispatch), (*first[:2], *first.dispatch), strict=True):
            differences += (found != wanted).sum()
    assert int(differences) == 0


def gate_inputs(T: int, D: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states of variance 1 and a gate that keeps it."""
    return normal(T, D).to("cuda", dtype), (normal(E, D) / D**0.5).to("cuda", dtype)


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize(
    ("D", "E", "k"),
    [
        pytest.param(D, E, k, id=f"D={D} E={E}")
        for D, E, k in (
            (4096, 8, 2),
            (2048, 64, 8),
            (2048, 128, 8),
            (7168, 256, 8),
            (32, 1, 1),
            (96, 7, 3),
            (160, 60, 4),
            (544, 200, 9),
            (1024, 1000, 32),
        )
    ],
)
def test_the_gate_is_multiplied_as_in_float64(D: int, E: int, k: int, dtype: torch.dtype, implementation: str) -> None:
    """The experts of the rounded logits, but where those round otherwise; one cluster, several, and no cluster."""
    extension.load()
    for T in (0, 1, 2, 7, 16, 17, 31, 32, *((33, 199, 4100, 40000) if E <= 8 else ())):
        x_TD, gate_ED = gate_inputs(T, D, E, dtype)
        routed = gate_route(x_TD, gate_ED, Selection(k))
        exact_TE = x_TD.double() @ gate_ED.double().t()
        expected = route(exact_TE.to(dtype), Selection(k), implementation)
        differ_T = (routed.expert_ids_TK != expected.expert_ids_TK).any(-1)
        assert int(differ_T.sum()) <= 1 + T // 8
        chosen_TK = exact_TE.gather(1, routed.expert_ids_TK.long())
        slack = 2 * torch.finfo(dtype).eps * float(exact_TE.abs().max()) if T else 0
        assert T == 0 or float((exact_TE.topk(k).values - chosen_TK).abs().max()) <= slack
        torch.testing.assert_close(routed.weights_TK.double(), chosen_TK.softmax(1), rtol=8 * slack, atol=1e-6)


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize(
    ("T", "E", "how"),
    [
        pytest.param(T, E, how, id=f"T={T} E={E} {name}")
        for name, E, how in (
            ("DeepSeek-V3", 256, DSV3),
            ("one score", 256, Selection(8, "sqrt_softplus")),
            ("groups", 256, Selection(6, "softmax", 8, 3, "max", False, 1.5)),
            ("softmax", 60, Selection(4)),
            ("softmax", 8, Selection(4)),
            ("softmax", 5, Selection(5)),
            ("one score", 8, Selection(3, "sigmoid")),
            ("groups", 8, Selection(2, "sigmoid", 4, 2, "top2", True, 2.5)),
        )
        for T in (1, 16, 199)
        if T <= 32 or E <= 8
    ],
)
def test_biases_groups_and_scores_go_with_the_gate(T: int, E: int, how: Selection, implementation: str) -> None:
    """As two steps do, where cuBLAS rounds no logit otherwise: whole numbers."""
    extension.load()
    x_TD, gate_ED = (torch.randint(-2, 3, shape, device="cuda").bfloat16() for shape in ((T, 64), (E, 64)))
    logits_TE, bias_E = x_TD @ gate_ED.t(), normal(1, E)[0].cuda()
    for gate_bias_E, score_bias_E in ((None, bias_E), (bias_E, None)):
        found = gate_route(x_TD, gate_ED, how, gate_bias_E=gate_bias_E, bias_E=score_bias_E)
        expected = route(logits_TE, how, implementation, gate_bias_E=gate_bias_E, bias_E=score_bias_E)
        assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
        torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-6, atol=0)


@pytest.mark.gpu
@EXTENSION
def test_a_thousand_products_give_the_same_bits(implementation: str) -> None:
    """Of one cluster, of several and of none, in a graph of twenty calls."""
    extension.load()
    for T, D, E in ((16, 2048, 8), (16, 2048, 128), (16, 7168, 256), (3000, 2048, 8)):
        x_TD, gate_ED = gate_inputs(T, D, E, torch.bfloat16)
        gate_route(x_TD, gate_ED, Selection(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                routed = gate_route(x_TD, gate_ED, Selection(2))
        graph.replay()
        first = [tensor.clone() for tensor in routed[:2]]
        differences = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            graph.replay()
            differences += sum((a != b).sum() for a, b in zip(routed[:2], first, strict=True))
        assert int(differences) == 0


@pytest.mark.parametrize(
    ("computes", "T", "D", "E", "dtype", "expected"),
    [
        pytest.param("cuda_ext:sm_90", 1, 7168, 256, torch.bfloat16, True, id="DeepSeek-V3, one token"),
        pytest.param("cuda_ext:sm_90", 32, 7168, 256, torch.bfloat16, False, id="DeepSeek-V3, too much for it"),
        pytest.param("cuda_ext:sm_100", 32, 2048, 64, torch.float16, True, id="newer"),
        pytest.param("cuda_ext:sm_80", 1, 2048, 64, torch.float16, False, id="no clusters"),
        pytest.param("cuda_ext:cpp", 1, 2048, 64, torch.float16, False, id="CPU"),
        pytest.param("triton", 1, 2048, 64, torch.float16, False, id="another implementation"),
        pytest.param("cuda_ext:sm_90", 1, 2048, 64, torch.float32, False, id="fp32"),
        pytest.param("cuda_ext:sm_90", 33, 2048, 64, torch.float16, False, id="T=33"),
        pytest.param("cuda_ext:sm_90", 65536, 4096, 8, torch.bfloat16, True, id="Mixtral, many tokens"),
        pytest.param("cuda_ext:sm_90", 33, 4096, 9, torch.bfloat16, False, id="T=33, nine experts"),
        pytest.param("cuda_ext:sm_90", 1, 2040, 64, torch.float16, False, id="D=2040"),
    ],
)
def test_when_the_gate_is_multiplied(computes: str, T: int, D: int, E: int, dtype: torch.dtype, expected: bool) -> None:
    """Elsewhere cuBLAS does it, and the record does not name a gate."""
    assert multiplies_gate(computes, T, D, E, dtype) is expected


def launches() -> None:
    """Few experts and many, and sizes of 1, which Triton takes for constants of the kernel."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        route(normal(3, 65).to(dtype), Selection(6), "triton")
        route(normal(3, 1).to(dtype), Selection(1, renormalize=False), "triton")
    route(normal(3, 300), Selection(30), "triton", gate_bias_E=normal(1, 300)[0])
    route(normal(3, 32), DSV3, "triton", bias_E=normal(1, 32)[0])
    route(normal(3, 32), Selection(2, "sqrt_softplus", 4, 2), "triton")


@pytest.mark.slow
def test_the_triton_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Which its interpreter does not ask."""
    assert_compiles(launches, tmp_path)


@pytest.mark.slow
def test_the_table_of_routers_implementations_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed; whatever `route` can compute is reached through its router."""
    columns = [(impl, on) for impl in IMPLEMENTATIONS for on in ("cpu", "cuda")]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for path in listing.groups(None)["router"]:
        if path.stem == "native":  # a checkpoint's
            continue
        cfg = compose(["model=router", f"router={path.stem}"])
        found[path.stem] = {}
        for impl, on in columns:
            if cfg.router.name in ("torch", "triton", "cuda_ext") and impl != cfg.router.name:
                found[path.stem][impl, on] = ""  # fixed
                continue
            asked = copy.deepcopy(cfg)
            asked.router.impl = impl
            try:
                with torch.device("meta"):
                    router = build.undecided_router(asked, 64, 1)
                found[path.stem][impl, on] = router.compute_on(torch.device(on), load=False).implementation()
            except UnavailableError:
                found[path.stem][impl, on] = "-"
    with capsys.disabled():
        print("\n" + " " * 14 + "".join(f"{impl + ' ' + on:15}" for impl, on in columns))
        for name, cells in found.items():
            print(f"{name:14}" + "".join(f"{cells[column]:15}" for column in columns))
    fused = {"cuda_ext", "sinkhorn", "loss_free", "mixtral", "qwen3_moe", "granite", "olmoe", "gpt_oss", "switch"}
    fused |= {"deepseek_v2", "deepseek_v3", "deepseek_v4", "minimax_m2", "ernie4_5", "llama4"}
    by_extension = {name for name, cells in found.items() if cells["cuda_ext", "cpu"] not in ("", "-")}
    assert by_extension == (fused if extension.why_unavailable(torch.device("cpu")) is None else set())
