"""The seam: what `Router`, `Routing` and the checks promise, and what every router must keep of it."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.softmax_topk import top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, check_finite, gate_logits, require_finite
from moe_lab.routers.contract import check_contract
from tests.routers.cases import EVERY, EVERY_WHOSE_TOKENS_STAY_APART, NewRouter, context, make

ROUTERS = pytest.mark.parametrize(
    "new_router",
    [
        pytest.param(partial(make, "mixtral"), id="softmax"),
        pytest.param(partial(make, "olmoe"), id="softmax-plain"),
        pytest.param(partial(make, "sinkhorn"), id="sinkhorn"),
    ],
)

SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(37, 1, 1, id="E=1"),
        pytest.param(199, 12, 2, id="T=199"),
        pytest.param(199, 33, 4, id="topk path"),
    ],
)

SMALL = ("T=0", "T=1", "k=E", "E=1")  # says little of one router


def random_logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded logits without ties."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E), dtype=torch.float64).to(dtype)


def assert_same_route(routing: Routing, expected: Routing) -> None:
    """Equal ids, and weights equal up to rounding."""
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(routing.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-7)


@pytest.mark.thinned(2, empty=("T=0", "E=1"))
@ROUTERS
@SIZES
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
def test_a_routing_fills_every_slot_with_a_different_expert(
    new_router: NewRouter, T: int, E: int, K: int, dtype: torch.dtype
) -> None:
    """int32 ids in range and unique per token, float32 weights that are not negative, T*K slots in all."""
    logits_TE = random_logits(T, E, dtype)
    before_TE = logits_TE.clone()
    router = new_router(E, K)
    routing = router.select(logits_TE)
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    assert router.static_k
    assert ids_TK.shape == weights_TK.shape == (T, K)
    assert (ids_TK.dtype, weights_TK.dtype) == (torch.int32, torch.float32)
    assert bool(((ids_TK >= 0) & (ids_TK < E)).all())
    assert bool((ids_TK.sort(-1).values.diff(dim=-1) > 0).all())
    assert bool((weights_TK >= 0).all())
    assert int(dispatch(ids_TK, E).counts_E.sum()) == T * K
    assert torch.equal(logits_TE, before_TE)


@ROUTERS
@SIZES
def test_renormalised_weights_sum_to_one(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """Rows sum to 1 where the router renormalises or every expert is chosen, else to less."""
    router = new_router(E, K)
    total_T = router.select(random_logits(T, E)).weights_TK.sum(-1)
    if getattr(router, "renormalize", True) or K == E:
        torch.testing.assert_close(total_T, torch.ones(T))
    else:
        assert bool((total_T < 1).all())


@ROUTERS
@SIZES
def test_the_route_does_not_depend_on_the_experts_order(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """Permuting the experts' columns renames the chosen experts and keeps their weights."""
    router, logits_TE = new_router(E, K), random_logits(T, E)
    perm_E = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    permuted = router.select(logits_TE[:, perm_E])
    renamed_TK = perm_E[permuted.expert_ids_TK.long()].to(torch.int32)
    assert_same_route(permuted._replace(expert_ids_TK=renamed_TK), router.select(logits_TE))


@ROUTERS
@SIZES
def test_the_route_does_not_depend_on_the_tokens_order(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """Permuting the tokens permutes the routing."""
    router, logits_TE = new_router(E, K), random_logits(T, E)
    perm_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    routing = router.select(logits_TE)
    expected = Routing(routing.expert_ids_TK[perm_T], routing.weights_TK[perm_T])
    assert_same_route(router.select(logits_TE[perm_T]), expected)


@ROUTERS
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(37, id="T=37"), pytest.param(700, id="T=700")])
@pytest.mark.parametrize(
    "value", [pytest.param(0.0, id="0"), pytest.param(3e4, id="3e4"), pytest.param(-3e4, id="-3e4")]
)
def test_equal_logits_choose_the_lowest_ids(new_router: NewRouter, T: int, value: float) -> None:
    """A tie of all experts goes to the first K, with equal weights."""
    routing = new_router(7, 3).select(torch.full((T, 7), value))
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2]] * T
    assert routing.weights_TK.unique().numel() == 1


@ROUTERS
def test_the_best_expert_comes_first(new_router: NewRouter) -> None:
    """Within a row the ids stand by falling score."""
    scores_TE = new_router(12, 4).select(random_logits(199, 12), RouteContext(want_scores=True)).scores_TE
    routing = new_router(12, 4).select(random_logits(199, 12))
    assert scores_TE is not None
    assert bool((scores_TE.gather(1, routing.expert_ids_TK.long()).diff(dim=-1) <= 0).all())


@ROUTERS
@SIZES
def test_scores_are_given_when_asked_for(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """want_scores adds [T, E] float32 scores whose k largest are the chosen; without it there are none."""
    router, logits_TE = new_router(E, K), random_logits(T, E, torch.float16)
    asked = router.select(logits_TE, RouteContext(want_scores=True))
    assert asked.scores_TE is not None
    assert asked.scores_TE.shape == (T, E) and asked.scores_TE.dtype == torch.float32
    assert torch.equal(top_k(asked.scores_TE, K), asked.expert_ids_TK)
    for ctx in (NO_CONTEXT, RouteContext(layer=1)):
        plain = router.select(logits_TE, ctx)
        assert plain.scores_TE is None
        assert_same_route(plain, asked)


@ROUTERS
@pytest.mark.parametrize(
    "bad_row",
    [
        pytest.param([0.0, math.nan, 1.0, 2.0, 3.0], id="NaN"),
        pytest.param([math.nan] * 5, id="all NaN"),
        pytest.param([0.0, math.inf, 1.0, 2.0, 3.0], id="+inf"),
        pytest.param([math.inf, -math.inf, 1.0, 2.0, 3.0], id="both infinities"),
        pytest.param([-math.inf] * 5, id="all -inf"),
    ],
)
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(37, id="T=37"), pytest.param(1000, id="T=1000")])
def test_a_row_without_a_softmax_names_its_layer(new_router: NewRouter, bad_row: list[float], T: int) -> None:
    """NaN, +inf or nothing but -inf in one token is a ValueError with the layer of the context."""
    logits_TE = random_logits(T, 5)
    logits_TE[-1] = torch.tensor(bad_row)
    with pytest.raises(ValueError, match=r"layer 13\b"):
        new_router(5, 2).select(logits_TE, RouteContext(layer=13))
    with pytest.raises(ValueError, match=r"layer 0\b"):
        new_router(5, 2).select(logits_TE)


@ROUTERS
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(37, id="T=37")])
def test_finite_logits_beyond_float32_give_no_nan(new_router: NewRouter, T: int) -> None:
    """float64 logits that overflow float32 are routed with finite weights, or refused by a ValueError."""
    logits_TE = random_logits(T, 5, torch.float64)
    logits_TE[:, 1], logits_TE[:, 4] = 1e39, 2e39
    routing = None
    with contextlib.suppress(ValueError):
        routing = new_router(5, 2).select(logits_TE)
    assert routing is None or routing.weights_TK.isfinite().all()


@ROUTERS
def test_the_route_of_hidden_states_is_that_of_their_logits(new_router: NewRouter) -> None:
    """route(x, gate) equals select(x @ gate.T), passing the context on."""
    x_TD, gate_ED, router = random_logits(37, 9), random_logits(7, 9), new_router(7, 3)
    ctx = RouteContext(layer=3, want_scores=True)
    routing = router.route(x_TD, gate_ED, ctx)
    assert_same_route(routing, router.select(x_TD @ gate_ED.T, ctx))
    assert routing.scores_TE is not None


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float64, id="fp64")])
def test_gate_logits_are_in_the_dtype_of_the_hidden_states(dtype: torch.dtype) -> None:
    """The gate is cast to x's dtype, whatever its own."""
    x_TD, gate_ED = random_logits(37, 9, dtype), random_logits(7, 9)
    logits_TE = gate_logits(x_TD, gate_ED)
    assert logits_TE.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        logits_TE.double(), x_TD.double() @ gate_ED.to(dtype).double().T, rtol=tolerance, atol=tolerance
    )


@pytest.mark.thinned(2, empty=("T=0", "E=1"))
@EVERY
@SIZES
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_every_router_keeps_the_contract(new_router: NewRouter, T: int, E: int, K: int, dtype: torch.dtype) -> None:
    """Shapes, dtypes, ids in range and unique, finite weights, none on an unused slot; all slots used if declared."""
    logits_TE = random_logits(T, E, dtype)
    before_TE = logits_TE.clone()
    router = new_router(E, K)
    routing = router.select(logits_TE, context(T))
    check_contract(routing, T, E, 0)
    assert bool((routing.weights_TK >= 0).all())
    if router.static_k:
        assert routing.expert_ids_TK.shape[1] == router.top_k
        assert bool((routing.expert_ids_TK >= 0).all())
    assert torch.equal(logits_TE, before_TE)


@pytest.mark.thinned(1, empty=SMALL)
@EVERY
@SIZES
def test_every_score_says_who_is_chosen(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """With a fixed number the chosen have the largest scores, else those above 0; nobody asks, nobody is told."""
    router, logits_TE = new_router(E, K), random_logits(T, E)
    routing = router.select(logits_TE, context(T)._replace(want_scores=True))
    scores_TE = routing.scores_TE
    assert scores_TE is not None and scores_TE.shape == (T, E) and scores_TE.dtype == torch.float32
    assert not bool(scores_TE.isnan().any())
    ids_TK = routing.expert_ids_TK
    chosen_TE = torch.zeros(T, E + 1, dtype=torch.bool).scatter_(1, torch.where(ids_TK < 0, E, ids_TK).long(), True)
    chosen_TE = chosen_TE[:, :E]
    if router.static_k:
        least_T = scores_TE.masked_fill(~chosen_TE, torch.inf).amin(-1)
        best_of_others_T = scores_TE.masked_fill(chosen_TE, -torch.inf).amax(-1)
        assert bool((best_of_others_T <= least_T + 1e-6).all())
    else:
        assert bool((scores_TE[chosen_TE] >= 0).all())
        assert bool((scores_TE[~chosen_TE] <= 0).all())
    plain = router.select(logits_TE, context(T))
    assert plain.scores_TE is None
    assert_same_route(plain, routing)


@pytest.mark.thinned(1, empty=SMALL)
@EVERY
@SIZES
def test_weights_of_chosen_experts_are_those_of_the_route(new_router: NewRouter, T: int, E: int, K: int) -> None:
    """`weigh` agrees with `select`, and an unused slot weighs nothing, or the router cannot tell."""
    router, logits_TE = new_router(E, K), random_logits(T, E)
    routing = router.select(logits_TE, context(T))
    weights_TK = router.weigh(logits_TE, routing.expert_ids_TK)
    if weights_TK is not None:
        torch.testing.assert_close(weights_TK, routing.weights_TK, rtol=1e-5, atol=1e-7)


@EVERY
def test_all_tokens_the_same_keep_the_contract(new_router: NewRouter) -> None:
    """Equal rows, and equal entries: whoever is chosen, nothing is NaN and nobody is chosen twice."""
    for logits_TE in (torch.zeros(37, 7), torch.arange(7.0).expand(37, 7), torch.full((37, 7), -3e4)):
        check_contract(new_router(7, 3).select(logits_TE, context(37)), 37, 7, 0)


@EVERY_WHOSE_TOKENS_STAY_APART
@pytest.mark.parametrize("T", [pytest.param(12, id="T=12"), pytest.param(37, id="T=37")])
def test_later_tokens_change_no_route_exactly_where_causal_is_declared(new_router: NewRouter, T: int) -> None:
    """Tokens added at the end leave the earlier routes bitwise as they were, or `causal` is False."""
    E = 24  # many beside few tokens, so that what one wants is not there anyway
    router, logits_TE = new_router(E, 2), random_logits(99, E, torch.float64)
    longer, shorter = router.select(logits_TE, context(99)), router.select(logits_TE[:T], context(T))
    assert torch.equal(by_expert(longer, E)[:T], by_expert(shorter, E)) is router.causal


@EVERY_WHOSE_TOKENS_STAY_APART
@pytest.mark.parametrize("E", [pytest.param(24, id="E=24"), pytest.param(65, id="E=65")])
def test_a_token_alone_keeps_its_route_exactly_where_batch_invariance_is_declared(
    new_router: NewRouter, E: int
) -> None:
    """A token alone gets bitwise the route that it gets in the batch, or `batch_invariant` is False."""
    router, logits_TE, ctx = new_router(E, 2), random_logits(13, E, torch.float64), context(13)
    together = router.select(logits_TE, ctx)
    assert ctx.token_ids_T is not None
    alone = [
        by_expert(router.select(logits_1E, RouteContext(token_ids_T=id_1)), E)
        for logits_1E, id_1 in zip(logits_TE.split(1), ctx.token_ids_T.split(1), strict=True)
    ]
    assert torch.equal(torch.cat(alone), by_expert(together, E)) is router.batch_invariant


def by_expert(routing: Routing, E: int) -> Tensor:
    """[T, E]: each expert's weight, -1 where it is not used; rows of another width can be compared."""
    ids_TK = torch.where(routing.expert_ids_TK < 0, E, routing.expert_ids_TK).long()
    return torch.full((len(ids_TK), E + 1), -1.0).scatter_(1, ids_TK, routing.weights_TK)[:, :E]


@EVERY
@pytest.mark.slow
def test_a_router_declared_graph_safe_compiles_as_one_graph(new_router: NewRouter) -> None:
    """Where `graph_safe` is declared, no step looks at a value: tracing finds one whole graph with the same route."""
    router, logits_TE, ctx = new_router(7, 3), random_logits(37, 7), context(37)._replace(layer=1)
    torch.compiler.reset()
    if not router.graph_safe:
        pytest.skip("not declared graph_safe")
    compiled = torch.compile(router.select, backend="eager", fullgraph=True, dynamic=False)
    assert_same_route(compiled(logits_TE, ctx), router.select(logits_TE, ctx))


@pytest.mark.gpu
@EVERY
@SIZES
def test_no_router_waits_for_the_device(new_router: NewRouter, T: int, E: int, K: int, device: torch.device) -> None:
    """On CUDA select makes no host synchronisation exactly where `graph_safe`, and routes as on the CPU."""
    router, logits_TE, ctx = new_router(E, K), random_logits(T, E), context(T)
    assert ctx.token_ids_T is not None
    on_device_TE, on_device = logits_TE.to(device), ctx._replace(token_ids_T=ctx.token_ids_T.to(device))
    moved = new_router(E, K).to(device)
    routing = moved.select(on_device_TE, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with contextlib.nullcontext() if moved.graph_safe or not T else pytest.raises(RuntimeError, match="synchroniz"):
            routing = moved.select(on_device_TE, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Routing(routing.expert_ids_TK.cpu(), routing.weights_TK.cpu())
    assert_same_route(on_cpu, router.select(logits_TE, ctx))


@pytest.mark.gpu
@EVERY
def test_a_captured_graph_routes_new_logits(new_router: NewRouter, device: torch.device) -> None:
    """Replaying a graph captured on other logits gives the route of the present ones."""
    router, logits_TE, ctx = new_router(7, 3).to(device), random_logits(199, 7).to(device), context(199)
    if not router.graph_safe:
        pytest.skip("not declared graph_safe")
    assert ctx.token_ids_T is not None
    ctx = ctx._replace(token_ids_T=ctx.token_ids_T.to(device))
    static_TE = torch.zeros_like(logits_TE)
    router.select(static_TE, ctx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = router.select(static_TE, ctx)
    static_TE.copy_(logits_TE)
    graph.replay()
    assert_same_route(routing, router.select(logits_TE, ctx))


@ROUTERS
@pytest.mark.parametrize("k", [pytest.param(0, id="0"), pytest.param(-1, id="-1"), pytest.param(8, id="E+1")])
def test_a_wrong_top_k_is_a_value_error(new_router: NewRouter, k: int) -> None:
    """top_k lies between 1 and the number of experts, and the message says so."""
    with pytest.raises(ValueError, match=rf"top_k={k}.*n_experts=7"):
        new_router(7, k)


@ROUTERS
def test_a_router_says_who_computes_it(new_router: NewRouter) -> None:
    """What stands in the record is the torch reference, before and after use_reference, and nothing needs saying."""
    router = new_router(7, 3)
    assert router.implementation() == "torch"
    router.use_reference()
    assert router.implementation() == "torch"
    assert router.warnings(2) == []
    assert (router.n_experts, router.top_k) == (7, 3)


@ROUTERS
def test_a_router_owns_no_gate(new_router: NewRouter) -> None:
    """Selection only: these routers have no parameters, need no token ids and weight the output."""
    router = new_router(7, 3)
    assert list(router.parameters()) == []
    assert not router.needs_token_ids and not router.scales_input


def test_use_reference_leaves_another_implementation() -> None:
    """From then on a router computes by torch."""

    class Two(Router):
        implementations = ("torch", "fast")

    router = Two(7, 3, impl="fast").compute_on(torch.device("cpu"))
    assert router.implementation() == "fast"
    router.use_reference()
    assert router.implementation() == "torch"


def test_a_router_without_select_names_itself() -> None:
    """The message names the class and the method that is missing."""

    class Mine(Router):
        """A router of a user's own."""

    with pytest.raises(NotImplementedError, match=r"Mine.*select\(logits_TE, ctx\)"):
        Mine(7, 3).route(torch.ones(2, 9), torch.ones(7, 9))


def test_what_a_routing_and_a_context_leave_out() -> None:
    """By default a routing carries no dispatch and no scores, a context no tokens, and the first layer."""
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    assert routing.dispatch is None and routing.scores_TE is None
    assert RouteContext() == (None, None, None, 0, "forward", False, False, None, None)


@pytest.mark.parametrize(
    ("row", "has_softmax", "all_finite"),
    [
        pytest.param([0.0, 1.0, 2.0], True, True, id="finite"),
        pytest.param([3e38, -3e38, 0.0], True, True, id="near the limit"),
        pytest.param([0.0, -math.inf, 2.0], True, False, id="one -inf"),
        pytest.param([-math.inf, -math.inf, 2.0], True, False, id="all but one -inf"),
        pytest.param([-math.inf] * 3, False, False, id="all -inf"),
        pytest.param([0.0, math.inf, 2.0], False, False, id="+inf"),
        pytest.param([0.0, math.nan, -math.inf], False, False, id="NaN"),
    ],
)
@pytest.mark.parametrize("every_entry", [pytest.param(True, id="every entry"), pytest.param(False, id="a softmax")])
def test_rows_are_refused_for_what_they_hold(
    row: list[float], has_softmax: bool, all_finite: bool, every_entry: bool
) -> None:
    """A row needs a softmax, or with every_entry only finite values; the message counts tokens and names the first."""
    logits_TE = torch.zeros(5, 3)
    logits_TE[2] = logits_TE[4] = torch.tensor(row)
    if all_finite if every_entry else has_softmax:
        assert check_finite(logits_TE, 4, every_entry=every_entry) is None
    else:
        with pytest.raises(ValueError, match=r"layer 4.*2 of 5 tokens.*first: token 2"):
            check_finite(logits_TE, 4, every_entry=every_entry)


@pytest.mark.parametrize("every_entry", [pytest.param(True, id="every entry"), pytest.param(False, id="a softmax")])
def test_no_tokens_are_no_error(every_entry: bool) -> None:
    """An empty table of logits passes the check."""
    assert check_finite(torch.empty(0, 7), 0, every_entry=every_entry) is None


def test_a_compiled_router_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """While compiling the check is silent; outside it is not."""
    logits_TE = torch.full((1, 3), math.nan)
    with pytest.raises(ValueError, match="layer 0"):
        require_finite(logits_TE, RouteContext())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert require_finite(logits_TE, RouteContext()) is None


@pytest.mark.gpu
def test_on_cuda_only_the_explicit_check_looks(device: torch.device) -> None:
    """require_finite is silent on CUDA, check_finite is not."""
    logits_TE = torch.full((2, 3), math.nan, device=device)
    assert require_finite(logits_TE, RouteContext(layer=2)) is None
    with pytest.raises(ValueError, match="layer 2"):
        check_finite(logits_TE, 2)
