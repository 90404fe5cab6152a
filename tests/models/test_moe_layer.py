"""models/moe_layer.py: one MoE layer against its formula, forced routing, shared experts."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models.moe_layer import MoELayer, OwnNorms, SharedExpert
from moe_lab.models.parameters import initialize
from moe_lab.ops.library import asked_of
from moe_lab.routers.base import RouteContext, Router, Routing
from moe_lab.routers.softmax_topk import SoftmaxTopK
from tests import tiny
from tests.tiny import D, E, K
from tests.tiny import F as HIDDEN

CTX = RouteContext()
BOTH = [pytest.param(Loop(), id="loop"), pytest.param(Grouped(), id="grouped")]


class InputScaling(SoftmaxTopK):
    """A router whose weight multiplies the expert's input, as in Llama-4."""

    scales_input = True


def layer_of(
    experts: Experts | None = None,
    shared: SharedExpert | None = None,
    router: type[Router] = SoftmaxTopK,
    norms: OwnNorms | None = None,
    **more: Any,
) -> MoELayer:
    weights, chooses = ExpertWeights(E, D, HIDDEN, **more), router(E, K, **tiny.keys_of("router", "mixtral"))
    layer = MoELayer(weights, chooses, experts or Grouped(), shared, norms)
    initialize(layer, seed=4)
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert_output(layer: MoELayer, expert: int, x_D: Tensor) -> Tensor:
    gate, up = layer.weights.w_gate_up_E2FD[expert].double().chunk(2)
    return layer.weights.w_down_EDF[expert].double() @ (F.silu(gate @ x_D) * (up @ x_D))


def by_formula(layer: MoELayer, x_TD: Tensor, routing: Routing, scale: str = "output") -> Tensor:
    """One token and one slot at a time, in float64."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, (ids, weights) in enumerate(
        zip(routing.expert_ids_TK.tolist(), routing.weights_TK.double().tolist(), strict=True)
    ):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                x_D = x_TD[t].double()
                inner = expert_output(layer, expert, x_D * weight if scale == "input" else x_D)
                y_TD[t] += inner if scale == "input" else weight * inner
    return y_TD


def forced_routing() -> Routing:
    """A token with all slots, one with a dropped slot, one with none, one with weights that do not sum to 1."""
    ids_TK = torch.tensor([[0, 4], [3, -1], [-1, -1], [2, 1]], dtype=torch.int32)
    return Routing(ids_TK, torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [1.5, -0.5]]))


@pytest.mark.parametrize("experts", BOTH)
@pytest.mark.parametrize("tokens", [pytest.param(n, id=f"t{n}") for n in (1, 2, 13)])
def test_output_is_the_weighted_sum_of_the_chosen_experts(experts: Experts, tokens: int) -> None:
    """Router, dispatch, experts and combine against the formula in float64."""
    layer, x_TD = layer_of(experts), random(tokens, D)
    y_TD, routing = layer(x_TD, CTX)
    torch.testing.assert_close(y_TD.double(), by_formula(layer, x_TD, routing), rtol=1e-4, atol=1e-5)
    want = layer.router.select(x_TD @ layer.weights.gate_ED.T)
    assert torch.equal(routing.expert_ids_TK, want.expert_ids_TK)


@pytest.mark.parametrize("experts", BOTH)
def test_forced_routing_is_used_instead_of_the_routers_own(experts: Experts) -> None:
    """Dropped slots add nothing, a token without a slot comes out as zero, weights are taken as they are."""
    layer, x_TD, forced = layer_of(experts), random(4, D), forced_routing()
    y_TD, routing = layer(x_TD, CTX, forced)
    assert routing is forced
    torch.testing.assert_close(y_TD.double(), by_formula(layer, x_TD, forced), rtol=1e-4, atol=1e-5)
    assert not y_TD[2].any()


@pytest.mark.parametrize("experts", BOTH)
def test_a_router_that_scales_the_input_scales_it_before_the_expert(experts: Experts) -> None:
    """The expert is not linear: w * f(x) is not f(w * x)."""
    layer, x_TD = layer_of(experts, router=InputScaling), random(5, D)
    y_TD, routing = layer(x_TD, CTX)
    want_TD = by_formula(layer, x_TD, routing, scale="input")
    torch.testing.assert_close(y_TD.double(), want_TD, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want_TD, by_formula(layer, x_TD, routing), rtol=1e-2)


@pytest.mark.parametrize("gated", [pytest.param(False, id="plain"), pytest.param(True, id="gated")])
def test_the_shared_expert_is_added_for_every_token(gated: bool) -> None:
    """Also for one whose routed slots were all dropped; gated by sigmoid(x w)."""
    shared = SharedExpert(D, 11, gated=gated)
    layer, x_TD = layer_of(shared=shared), random(4, D)
    gate, up = shared.mlp.gate_up.weight.double().chunk(2)
    x = x_TD.double()
    want_TD = (F.silu(x @ gate.T) * (x @ up.T)) @ shared.mlp.down.weight.double().T
    if gated:
        assert shared.gate is not None
        want_TD = want_TD * torch.sigmoid(x @ shared.gate.weight.double().T)
    y_TD, _ = layer(x_TD, CTX, forced_routing())
    extra_TD = y_TD - layer.routed(x_TD, forced_routing(), CTX)
    torch.testing.assert_close(extra_TD.double(), want_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", BOTH)
def test_equal_experts_are_one_dense_mlp(experts: Experts) -> None:
    """With weights that sum to 1 it does not matter who computes it."""
    layer, x_TD = layer_of(experts), random(9, D)
    for weight in (layer.weights.w_gate_up_E2FD, layer.weights.w_down_EDF):
        weight.copy_(weight[:1].expand_as(weight).clone())
    want_TD = torch.stack([expert_output(layer, 0, x_D.double()) for x_D in x_TD])
    torch.testing.assert_close(layer(x_TD, CTX)[0].double(), want_TD, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9))
def test_names_of_the_experts_change_no_output(seed: int, tokens: int) -> None:
    """Renaming the experts, gate rows and matrices alike, is the same layer."""
    layer, renamed, x_TD = layer_of(), layer_of(), random(tokens, D, seed=seed)
    order_E = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    for name in ("gate_ED", "w_gate_up_E2FD", "w_down_EDF"):
        getattr(renamed.weights, name).copy_(getattr(layer.weights, name)[order_E])
    (y_TD, routing), (renamed_TD, renamed_routing) = layer(x_TD, CTX), renamed(x_TD, CTX)
    torch.testing.assert_close(renamed_TD, y_TD, rtol=1e-5, atol=1e-6)
    assert torch.equal(order_E[renamed_routing.expert_ids_TK.long()], routing.expert_ids_TK.long())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9))
def test_order_of_the_tokens_is_the_order_of_the_outputs(seed: int, tokens: int) -> None:
    """Softmax top-k treats each token alone."""
    layer, x_TD = layer_of(), random(tokens, D, seed=seed)
    order_T = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x_TD[order_T], CTX)[0], layer(x_TD, CTX)[0][order_T], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", BOTH)
def test_no_tokens_give_no_output(experts: Experts) -> None:
    """T = 0 keeps shape and dtype."""
    y_TD, routing = layer_of(experts)(torch.zeros(0, D), CTX)
    assert y_TD.shape == (0, D) and routing.expert_ids_TK.shape == (0, K)


def test_use_reference_computes_one_expert_at_a_time() -> None:
    """The layer of a reference twin."""
    layer = layer_of(Grouped())
    layer.use_reference()
    assert isinstance(layer.experts, Loop)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


@pytest.mark.parametrize("experts", BOTH)
def test_experts_have_a_scale_whoever_chose_them(experts: Experts) -> None:
    """Of the output, beside the routing weight; an unused slot is none."""
    layer = layer_of(experts, scaled=True)
    layer.weights.scale_E.copy_(torch.rand(E, generator=torch.Generator().manual_seed(6)) + 0.5)
    x_TD, forced = random(4, D), forced_routing()
    y_TD, routing = layer(x_TD, CTX, forced)
    assert routing is forced
    scale_TK = layer.weights.scale_E[forced.expert_ids_TK.clamp(min=0).long()]
    scaled = forced._replace(weights_TK=forced.weights_TK * scale_TK)
    torch.testing.assert_close(y_TD.double(), by_formula(layer, x_TD, scaled), rtol=1e-5, atol=1e-6)


def test_a_scale_of_outputs_needs_weights_of_outputs() -> None:
    """A weight on the input is not one of the output; `runs.build` refuses such a router."""
    layer = layer_of(router=InputScaling, scaled=True)
    with pytest.raises(AssertionError, match="no place among weights of inputs"):
        layer(random(4, D), CTX)


@pytest.mark.parametrize("experts", BOTH)
def test_gate_experts_and_shared_expert_may_each_have_norms(experts: Experts) -> None:
    """The layer is then given what nobody has normed."""
    shared = SharedExpert(D, 7, gated=True, activation="gelu_tanh", norm_eps=1e-6)
    layer, x_TD = layer_of(experts, shared, norms=OwnNorms(D, 1e-6)), 3 * random(13, D)
    norms, x = layer.norms, x_TD.double()
    y_TD, routing = layer(x_TD, CTX)
    logits_TE = rms(x, norms.gate_norm.weight) @ layer.weights.gate_ED.double().T
    torch.testing.assert_close(layer.logits(x_TD).double(), logits_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.expert_ids_TK.long(), logits_TE.topk(K).indices)
    routed_TD = rms(by_formula(layer, rms(x, norms.norm_before.weight), routing), norms.norm_after.weight)
    gate, up = (rms(x, shared.norm_before.weight) @ shared.mlp.gate_up.weight.double().T).chunk(2, -1)
    inner_TD = (F.gelu(gate, approximate="tanh") * up) @ shared.mlp.down.weight.double().T
    beside_TD = torch.sigmoid(shared.gate.double()(rms(x, shared.norm_before.weight)))
    want_TD = routed_TD + beside_TD * rms(inner_TD, shared.norm_after.weight)
    torch.testing.assert_close(y_TD.double(), want_TD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.routed(x_TD, routing, CTX).double(), routed_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [pytest.param(n, id=f"t{n}") for n in (1, 14)])
def test_the_model_is_the_layer(tokens: int) -> None:
    """model=moe_layer: [T, D] in and out, one routing, no vocabulary."""
    run = tiny.built(tiny.moe_layer(tokens=tokens))
    output = run.built.step()
    assert run.built.model.input_shape(1, tokens) == tuple(run.built.x.shape) == output.y.shape == (tokens, D)
    assert len(output.routings) == 1 and run.built.model.vocab_size is None
    y_TD, _ = run.built.model.moe(run.built.x, CTX)
    assert torch.equal(output.y, y_TD)


def test_the_model_forced_with_its_own_routing_computes_the_same() -> None:
    """And with another routing something else."""
    run = tiny.built(tiny.moe_layer(tokens=4))
    free = run.built.step()
    assert torch.equal(run.built.model(run.built.x, forced_routing=free.routings).y, free.y)
    assert not torch.allclose(run.built.model(run.built.x, forced_routing=(forced_routing(),)).y, free.y)


class Multiplying(SoftmaxTopK):
    """Says that it multiplies by the gate, up to 16 tokens of fp32."""

    def multiplies_gate(self, n_tokens: int, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        return n_tokens <= 16 and dtype == torch.float32 and gate_ED.shape == (E, D)


def test_who_sorts_for_the_experts_does_not_multiply_by_the_gate() -> None:
    """Sorted slots are made from logits; what the record says of the gate follows that."""
    assert layer_of(Loop(), router=Multiplying).multiplies_gate(random(9, D))
    assert not layer_of(Loop(), router=Multiplying).multiplies_gate(random(17, D))
    assert not layer_of(Loop(), router=Multiplying).multiplies_gate(random(9, D).double())
    assert not layer_of(Loop()).multiplies_gate(random(9, D))
    grouping = layer_of(Grouped(), router=Multiplying)
    assert not grouping.experts.reads_dispatch(random(9, D)) and grouping.multiplies_gate(random(9, D))
    with asked_of("compile"):
        assert grouping.experts.reads_dispatch(random(9, D)) and not grouping.multiplies_gate(random(9, D))


class Telling(Loop):
    """Notes whether no slot of its layer will be unused."""

    def for_layer(self, weights: ExpertWeights, top_k: int, *, static_k: bool = False) -> Self:
        self.told = static_k
        return self


@pytest.mark.parametrize("static_k", [pytest.param(value, id=str(value)) for value in (True, False, None)])
def test_experts_are_told_that_no_slot_is_unused(static_k: bool | None) -> None:
    """Where the router declares it."""

    declares = type("Declares", (SoftmaxTopK,), {"static_k": static_k})
    layer_of(experts := Telling(), router=declares)
    assert experts.told == (static_k is True)
