"""measure/router_properties.py: who declares what is not true is found out; who declares nothing is not asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.errors import MismatchError
from moe_lab.measure.router_properties import check_properties
from moe_lab.models.moe_layer import moe_layers
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, PROPERTIES, RouteContext, Router, Routing
from tests import tiny
from tests.routers.cases import CASES

E, K = 7, 2
WEIGHED = ("causal", "batch_invariant", "static_k")
Change = Callable[[Tensor, RouteContext], Tensor]


class Ranked(Router):
    """Top-k of logits that were changed by what it should not look at."""

    def __init__(self, change: Change, **declared: bool):
        super().__init__(E, K)
        self.change = change
        for name, value in declared.items():
            setattr(self, name, value)

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        scores_TE = self.change(logits_TE.float(), ctx)
        ids_TK = top_k(scores_TE, self.top_k)
        return Routing(ids_TK, weights_of(scores_TE, ids_TK, renormalize=True), scores_TE=scores_TE)


class Weighing(Ranked):
    """Chooses truthfully; the weights are what was changed."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        ids_TK = top_k(logits_TE, self.top_k)
        weights_TK = weights_of(self.change(logits_TE, ctx), ids_TK, renormalize=True)
        return Routing(ids_TK, weights_TK, scores_TE=logits_TE)


class Dropping(Ranked):
    """Slots of little weight stay unused."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        ids_TK, weights_TK, _, scores_TE = super().select(logits_TE, ctx)
        drops_TK = weights_TK < 0.1
        return Routing(ids_TK.masked_fill(drops_TK, -1), weights_TK.masked_fill(drops_TK, 0), scores_TE=scores_TE)


class Widening(Ranked):
    """Two experts for a single token, three for more."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        self.top_k = 3 if len(logits_TE) > 1 else 2
        return super().select(logits_TE, ctx)


class Counting(Ranked):
    """Goes by how often it was asked."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        self.calls = getattr(self, "calls", 0) + 1
        return super().select(logits_TE.roll(self.calls, -1), ctx)


def less_mean(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE - logits_TE.mean(0)


def less_next(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    """Looks one token ahead, in its own sequence."""
    ahead_TE = logits_TE.roll(-1, 0)
    ends = [len(logits_TE)] if ctx.seq_start_B1 is None else ctx.seq_start_B1[1:].tolist()
    ahead_TE[[end - 1 for end in ends]] = 0
    return logits_TE - ahead_TE


def less_next_from_the_fifth(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    """No prefix of one token shows it."""
    return torch.cat([logits_TE[:4], less_next(logits_TE, NO_CONTEXT)[4:]])


def less_mean_so_far(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    """Causal in a batch of one; sequences before it count too."""
    return logits_TE - logits_TE.cumsum(0) / torch.arange(1, len(logits_TE) + 1).unsqueeze(1)


def by_place(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE + 9.0 * torch.nn.functional.one_hot(torch.arange(len(logits_TE)) % E, E)


def as_it_is(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE


def logits(T: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T))


def sequences(B: int, S: int) -> RouteContext:
    return RouteContext(
        token_ids_T=torch.arange(B * S) * 7 % 101, seq_start_B1=torch.arange(B + 1, dtype=torch.int32) * S
    )


def by_the_number_of_tokens(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE if len(logits_TE) <= 600 else -logits_TE


def less_mean_from_the_three_hundredth(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return torch.cat([logits_TE[:300], logits_TE[300:] - logits_TE.mean(0)])


class Silent(Ranked):
    """All experts have the same score, whatever it chooses."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        return super().select(logits_TE, ctx)._replace(scores_TE=torch.zeros_like(logits_TE))


@pytest.mark.parametrize("change", [by_the_number_of_tokens, less_mean_from_the_three_hundredth])
@pytest.mark.parametrize(("B", "S"), [pytest.param(1, 800, id="one-sequence"), pytest.param(8, 100, id="eight")])
def test_what_shows_only_with_many_tokens_is_found(change: Change, B: int, S: int) -> None:
    """All tokens of the run are in the selection that others are compared with."""
    name = "causal" if B == 1 else "batch_invariant"
    with pytest.raises(MismatchError, match=name):
        check_properties(Ranked(change, **{name: True}), logits(B * S), sequences(B, S), 0)


@pytest.mark.parametrize("name", ["causal", "batch_invariant"])
def test_scores_that_rank_nothing_excuse_nothing(name: str) -> None:
    """Where all are equal every choice would be a near-tie."""
    change = less_next if name == "causal" else less_mean
    with pytest.raises(MismatchError, match=name):
        check_properties(Silent(change, **{name: True}), logits(30), sequences(3, 10), 0)
    check_properties(Silent(as_it_is, **{name: True}), logits(30), sequences(3, 10), 0)


def test_what_does_not_hold_is_found_beside_what_does() -> None:
    """The record names both."""
    found: dict[str, str] = {}
    router = Ranked(less_mean_so_far, causal=True, batch_invariant=True, static_k=True)
    with pytest.raises(MismatchError):
        check_properties(router, logits(30), sequences(3, 10), 0, found=found)
    assert found == {"causal": "verified", "batch_invariant": "does not hold"}


LAYOUTS = [
    pytest.param(30, NO_CONTEXT, id="tokens"),
    pytest.param(30, sequences(3, 10), id="sequences"),
    pytest.param(600, sequences(6, 100), id="more-than-is-looked-at"),
]


@pytest.mark.parametrize(("T", "ctx"), LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "change", "lies"),
    [
        pytest.param(Ranked, less_mean, "causal", id="mean"),
        pytest.param(Ranked, less_mean, "batch_invariant", id="mean-batch"),
        pytest.param(Weighing, less_mean, "causal", id="mean-of-weights"),
        pytest.param(Weighing, less_mean, "batch_invariant", id="mean-of-weights-batch"),
        pytest.param(Ranked, less_next, "causal", id="next"),
        pytest.param(Ranked, less_next_from_the_fifth, "causal", id="next-later"),
        pytest.param(Ranked, less_mean_so_far, "batch_invariant", id="mean-so-far"),
        pytest.param(Ranked, by_place, "batch_invariant", id="place"),
        pytest.param(Counting, as_it_is, "causal", id="state"),
        pytest.param(Dropping, as_it_is, "static_k", id="drops"),
        pytest.param(Widening, as_it_is, "static_k", id="widens"),
    ],
)
def test_a_router_that_lies_is_found_out(kind: Any, change: Change, lies: str, T: int, ctx: RouteContext) -> None:
    """By the name of the property; the line names the layer and the class."""
    router = kind(change, **{lies: True})
    with pytest.raises(MismatchError, match=rf"^layer 3: {kind.__name__} declares {lies}, but ") as raised:
        check_properties(router, logits(T), ctx, 3)
    assert raised.value.where == lies
    assert check_properties(kind(change), logits(T), ctx, 3) == {}
    assert check_properties(kind(change, **{lies: False}), logits(T), ctx, 3) == {}


@pytest.mark.parametrize(("T", "ctx"), LAYOUTS)
@pytest.mark.parametrize(
    "change", [pytest.param(change, id=change.__name__) for change in (by_place, less_mean_so_far)]
)
def test_what_is_causal_and_not_batch_invariant_may_say_so(change: Change, T: int, ctx: RouteContext) -> None:
    """A prefix is not taken of a batch."""
    assert check_properties(Ranked(change, causal=True), logits(T), ctx, 0) == {"causal": "verified"}


@pytest.mark.parametrize(
    ("T", "ctx", "not_verified"),
    [
        pytest.param(30, sequences(3, 10), {}, id="sequences"),
        pytest.param(30, NO_CONTEXT, {}, id="tokens"),
        pytest.param(10, sequences(1, 10), {"batch_invariant": "one sequence only"}, id="one-sequence"),
        pytest.param(3, sequences(3, 1), {"causal": "no sequence of two tokens"}, id="a-token-each"),
        pytest.param(
            1, NO_CONTEXT, {"causal": "no sequence of two tokens", "batch_invariant": "one token only"}, id="one-token"
        ),
        pytest.param(0, NO_CONTEXT, dict.fromkeys(WEIGHED, "no token"), id="none"),
        pytest.param(0, sequences(3, 0), dict.fromkeys(WEIGHED, "no token"), id="empty-sequences"),
    ],
)
def test_what_there_is_nothing_to_check_with_is_said(T: int, ctx: RouteContext, not_verified: dict[str, str]) -> None:
    """It is not counted as verified."""
    router = Ranked(as_it_is, causal=True, batch_invariant=True, static_k=True)
    expected = {name: f"not verified: {not_verified[name]}" if name in not_verified else "verified" for name in WEIGHED}
    assert check_properties(router, logits(T), ctx, 0) == expected


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("T", "ctx"), LAYOUTS)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in CASES])
def test_our_own_routers_declare_all_and_hold_it(name: str, T: int, ctx: RouteContext) -> None:
    """What is not declared of them is False, not unknown."""
    router = CASES[name](E, K)
    ctx = ctx._replace(token_ids_T=torch.arange(T) * 7 % 101)
    assert all(getattr(router, name) is not None for name in PROPERTIES)
    found = check_properties(router, logits(T), ctx, 0)
    assert found == {name: "verified" for name in WEIGHED if getattr(router, name)}


def test_nan_of_a_token_alone_is_found_out() -> None:
    """Weights divided by a deviation over the batch, which a single token has not."""

    class ByDeviation(Weighing):
        def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
            routing = super().select(logits_TE, ctx)
            return routing._replace(weights_TK=routing.weights_TK / logits_TE.std(0).mean())

    with pytest.raises(MismatchError, match="a weight is NaN or infinite"):
        check_properties(ByDeviation(as_it_is, batch_invariant=True), logits(8), sequences(8, 1), 0)


def test_who_goes_by_the_order_is_found_out() -> None:
    """Alone each token selects as beside the others; backwards it does not."""

    def rolled_where_it_falls(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        return logits_TE.roll(1, -1) if logits_TE[0, 0] > logits_TE[-1, 0] else logits_TE

    rising = logits(20)
    rising[:, 0] = torch.linspace(-1, 1, 20)
    with pytest.raises(MismatchError, match="in another order selects otherwise"):
        check_properties(Ranked(rolled_where_it_falls, batch_invariant=True), rising, NO_CONTEXT, 0)


class LateDropping(Ranked):
    """A slot of the last of many tokens stays unused."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        drops_TK = torch.zeros_like(routing.weights_TK, dtype=torch.bool)
        drops_TK[290:, 1] = True
        return routing._replace(
            expert_ids_TK=routing.expert_ids_TK.masked_fill(drops_TK, -1),
            weights_TK=routing.weights_TK.masked_fill(drops_TK, 0),
        )


def test_all_tokens_of_the_run_have_their_slots() -> None:
    """Also those beyond the part that selects again."""
    run = tiny.built(tiny.moe_layer(n_experts=E, tokens=300))
    assert run.built is not None
    for model in (run.built.model, run.built.twin):
        for layer in moe_layers(model):
            layer.router = LateDropping(as_it_is, static_k=True)
    run.built.step = run.built.make_step("natural")
    with pytest.raises(MismatchError, match="declares static_k, but 10 tokens have an unused slot"):
        run.verify()


def test_near_ties_do_not_count() -> None:
    """Two experts whose scores differ in the last bit, in whichever order a batch brings them."""

    def nudged(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        return logits_TE + 1e-7 * (len(logits_TE) % 2) * torch.arange(E)

    tied = logits(20)
    tied[:, 3] = tied[:, 2] = tied.amax(-1) + 1  # the same
    tied[:, 4] = tied[:, 2]  # ... of three, for two slots
    router = Ranked(nudged, causal=True, batch_invariant=True)
    whole, alone = router.select(tied).expert_ids_TK[:1], router.select(tied[:1]).expert_ids_TK
    assert whole.tolist() != alone.tolist()
    assert set(check_properties(router, tied, NO_CONTEXT, 0).values()) == {"verified"}


def test_who_does_not_say_what_it_ranked_cannot_be_checked() -> None:
    """Near-ties could not be told from faults."""

    class Silent(Ranked):
        def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
            return super().select(logits_TE, ctx)._replace(scores_TE=None)

    with pytest.raises(ValueError, match=r"Silent\.select must fill scores_TE"):
        check_properties(Silent(as_it_is, causal=True), logits(9), NO_CONTEXT, 0)


def test_scores_of_some_experts_cannot_be_compared() -> None:
    """They are of the slots, say."""

    class OfSlots(Ranked):
        def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
            routing = super().select(logits_TE, ctx)
            return routing._replace(scores_TE=routing.weights_TK)

    with pytest.raises(ValueError, match=r"OfSlots\.select gives scores_TE \(9, .\) of logits \(9, .\)"):
        check_properties(OfSlots(as_it_is, causal=True), logits(9), NO_CONTEXT, 0)


MODELS = [
    pytest.param(tiny.moe_layer(), id="moe_layer"),
    pytest.param(tiny.decoder_moe(), id="decoder_moe"),
    pytest.param(tiny.decoder_moe("dtype=bf16"), id="bf16"),
    pytest.param(tiny.decoder_moe("workload.phase=prefill"), id="prefill"),
    pytest.param(tiny.decoder_moe("workload.phase=decode", "workload.context_len=3"), id="decode"),
    pytest.param(tiny.decoder_moe("workload.load=zipf"), id="forced"),
    pytest.param(tiny.compose("checkpoint"), id="checkpoint"),
    pytest.param(moe_lab.compose(["model=router", "device=cpu", "seq_len=9"]), id="router"),
]


class LessMean(Router):
    """Subtracts the batch's mean, wherever it is put."""

    def __init__(self, inner: Router, declares: str | None):
        super().__init__(inner.n_experts, inner.top_k)
        self.inner, self.needs_token_ids = inner, inner.needs_token_ids
        self.static_k = None if declares == "static_k" else inner.static_k
        if declares is not None:
            setattr(self, declares, True)

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        return self.inner.select(logits_TE - logits_TE.mean(0), ctx)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("declares", [pytest.param(name, id=str(name)) for name in ("causal", "batch_invariant", None)])
@pytest.mark.parametrize("cfg", MODELS)
def test_a_run_of_a_router_that_lies_fails(cfg: Any, declares: str | None) -> None:
    """Whatever the model and the phase; who declares nothing has null in the record, and passes."""
    run = tiny.built(cfg)
    assert run.built is not None
    for model in (run.built.model, run.built.twin):
        for layer in moe_layers(model):
            layer.router = LessMean(layer.router, declares)
    run.built.step = run.built.make_step("natural")
    if declares is None:
        run.verify()
        assert run.record().status == "ok"
    else:
        with pytest.raises(MismatchError, match=f"LessMean declares {declares}"):
            run.verify()
        assert run.record("failed").check.passed is False
    properties = run.record().router
    assert properties is not None
    for name in ("causal", "batch_invariant"):
        assert properties[name] is (True if name == declares else None)
