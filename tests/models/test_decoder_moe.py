"""models/decoder_moe.py: the decoder with MoE layers, against its properties and transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab import marks
from moe_lab.models import Output
from moe_lab.models.decoder_moe import DecoderMoE
from moe_lab.models.layers import AddLayerNorm, GatedMLP
from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.models.transformer_decoder import Block
from moe_lab.ops import add_rms_norm, gemv
from moe_lab.routers.base import RouteContext, Router, Routing, gate_logits
from tests import tiny
from tests.models.peers import copy_decoder, decoder_settings, peer_model
from tests.tiny import LAYERS, VOCAB, D, E, F, K


def decoder(*overrides: str) -> DecoderMoE:
    model = moe_lab.build_model(tiny.decoder_moe(*overrides))
    assert isinstance(model, DecoderMoE)
    return model


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def moved(routing: Routing) -> Routing:
    """The same weights at the next experts."""
    return routing._replace(expert_ids_TK=(routing.expert_ids_TK + 1) % E)


@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("torch", "sinkhorn")])
@pytest.mark.parametrize(
    ("batch", "length"),
    [pytest.param(1, 1, id="b1_s1"), pytest.param(1, 5, id="b1_s5"), pytest.param(3, 7, id="b3_s7")],
)
def test_there_are_logits_for_each_token_and_a_routing_for_each_layer(router: str, batch: int, length: int) -> None:
    """T = B S tokens are routed in each layer, in int32 and float32."""
    output = decoder(f"router={router}")(ids(batch, length))
    assert output.y.shape == (batch, length, VOCAB) and output.y.isfinite().all()
    assert len(output.routings) == LAYERS
    for routing in output.routings:
        assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (batch * length, K)
        assert routing.expert_ids_TK.dtype == torch.int32 and routing.weights_TK.dtype == torch.float32


@pytest.mark.thinned(2)
@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("torch", "sinkhorn")])
@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16")])
def test_forced_with_its_own_routing_the_model_computes_the_same(router: str, experts: str, dtype: str) -> None:
    """Bit for bit: forcing replaces the router and nothing else."""
    model = decoder(f"router={router}", f"experts={experts}", f"dtype={dtype}")
    free = model(ids(2, 7))
    again = model(ids(2, 7), forced_routing=free.routings)
    assert torch.equal(again.y, free.y)
    assert all(one is other for one, other in zip(again.routings, free.routings, strict=True))


@pytest.mark.parametrize("layer", [pytest.param(index, id=f"layer{index}") for index in range(LAYERS)])
def test_forced_with_another_routing_in_one_layer_the_model_computes_something_else(layer: int) -> None:
    """Each layer reads its own routing."""
    model = decoder()
    free = model(ids(2, 7))
    routings = list(free.routings)
    routings[layer] = moved(routings[layer])
    assert not torch.allclose(model(ids(2, 7), forced_routing=routings).y, free.y, atol=1e-3)


@pytest.mark.parametrize("at", [pytest.param(t, id=f"t{t}") for t in (0, 3, 6)])
def test_with_the_softmax_router_a_token_changes_no_earlier_logits_or_routes(at: int) -> None:
    """A causal router keeps the decoder causal."""
    model, one_BS = decoder("router=torch"), ids(1, 7)
    other_BS = one_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % VOCAB
    one, other = model(one_BS), model(other_BS)
    torch.testing.assert_close(one.y[:, :at], other.y[:, :at], rtol=1e-5, atol=1e-6)
    for routing, changed in zip(one.routings, other.routings, strict=True):
        assert torch.equal(routing.expert_ids_TK[:at], changed.expert_ids_TK[:at])
    assert (one.y[:, at:] - other.y[:, at:]).abs().amax(-1).gt(1e-4).all()


def as_one_kernel(model: DecoderMoE) -> list[Tensor]:
    """From now on routers say that they norm single tokens, and do, in torch; what they normed is added to the list."""
    normed_by_routers: list[Tensor] = []

    def norm_and_route(router: Router, x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Any:
        normed, total = add_rms_norm.reference(x, residual, weight, eps)
        normed_by_routers.append(normed)
        return normed, total, router.select(gate_logits(normed, gate))

    for block in model.layers:
        router = block.mlp.router
        router.multiplies_gate = router.norms_input = lambda n_tokens, *_: n_tokens == 1
        router.norm_and_route = partial(norm_and_route, router)
        block.mlp_norm.implementation = "triton"
    return normed_by_routers


def test_where_one_kernel_norms_and_routes_the_model_computes_the_same() -> None:
    """One token and nothing forced: the layer is still given what was normed, and the time is the router's."""
    model = decoder("experts=loop")
    free, two = model(ids(1, 1)), model(ids(1, 2))
    normed, given, told = as_one_kernel(model), [], []

    class Listener:
        def start(self, name: str) -> None:
            told.append(name)

        def stop(self, name: str) -> None:
            pass

    marks.listen(Listener())
    with hooked(moe_layers(model), lambda _, arguments, result: given.append(arguments[0])):
        fused = model(ids(1, 1))
    marks.listen(None)
    assert torch.equal(fused.y, free.y) and len(normed) == LAYERS and told.count("router") == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(normed, given, strict=True))
    for one, other in zip(fused.routings, free.routings, strict=True):
        assert torch.equal(one.expert_ids_TK, other.expert_ids_TK) and torch.equal(one.weights_TK, other.weights_TK)
    torch.testing.assert_close(model(ids(1, 1), forced_routing=free.routings).y, free.y)
    torch.testing.assert_close(model(ids(1, 2)).y, two.y)
    assert len(normed) == LAYERS


def test_where_one_kernel_norms_and_projects_the_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before attention and before the head, of one token; the first is attention's time. In torch, on a CPU."""
    model = tiny.built(tiny.decoder_moe("experts=loop", "dtype=bf16")).built.model
    free, rows, told = model(ids(1, 1)), [], []

    class Listener:
        def start(self, name: str) -> None:
            told.append((name, len(rows)))

        def stop(self, name: str) -> None:
            told.append((name, len(rows)))

    monkeypatch.setattr(gemv, "is_faster", lambda device: True)
    monkeypatch.setattr(gemv, "norm_gemv", lambda x, *rest, of=gemv.norm_gemv: rows.append(x.shape) or of(x, *rest))
    assert model.joined_norms(torch.empty(1, D, dtype=torch.bfloat16)) == set()  # torch norms
    for norm in (model.norm, *(block.attention_norm for block in model.layers)):
        norm.implementation = "triton"
    marks.listen(Listener())
    joined = model(ids(1, 1))
    marks.listen(None)
    assert rows == [(1, D)] * (LAYERS + 1)
    assert [counts for name, counts in told if name == "attention"] == [n for i in range(LAYERS) for n in (i, i + 1)]
    torch.testing.assert_close(joined.y, free.y, rtol=2e-2, atol=2e-2)
    assert len(model.joined_norms(torch.empty(1, D, dtype=torch.bfloat16))) == LAYERS + 1
    assert not model.joined_norms(torch.empty(1, D))  # fp32
    model.layers[0].attention_norm.asked = "triton"
    assert model.layers[0].attention_norm not in model.joined_norms(torch.empty(1, D, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda block: setattr(block.mlp_norm, "asked", "triton"), id="a norm asked for by name"),
        pytest.param(lambda block: setattr(block, "mlp_norm", AddLayerNorm(D, 1e-6)), id="another norm"),
        pytest.param(lambda block: setattr(block.mlp.router, "multiplies_gate", lambda *_: False), id="no gate"),
        pytest.param(lambda block: setattr(block.mlp.weights, "gate_bias_E", torch.zeros(E)), id="a biased gate"),
    ],
)
def test_what_one_kernel_cannot_do_takes_two(change: Callable[[Block], None]) -> None:
    """Layer by layer."""
    model = decoder("experts=loop")
    normed = as_one_kernel(model)
    change(model.layers[0])
    x_1D = torch.zeros(1, D)
    assert [block.mlp.norms_input(x_1D, block.mlp_norm) for block in model.layers] == [False] + [True] * (LAYERS - 1)
    assert not normed


def test_sinkhorn_couples_the_tokens_of_a_batch() -> None:
    """It declares itself not causal, and rightly: the last token changes earlier logits in some of ten batches."""
    model = decoder("router=sinkhorn")
    assert model.layers[0].mlp.router.causal is False
    changes = []
    for seed in range(10):
        one_BS = ids(1, 7, seed)
        other_BS = one_BS.clone()
        other_BS[:, -1] = (other_BS[:, -1] + 1) % VOCAB
        changes.append(float((model(one_BS).y - model(other_BS).y)[:, :-1].abs().max()))
    assert max(changes) > 1e-3


@pytest.mark.parametrize("n_dense", [pytest.param(n, id=f"dense{n}") for n in range(LAYERS + 1)])
@pytest.mark.parametrize("width", [pytest.param(None, id="same_width"), pytest.param(40, id="own_width")])
def test_the_first_layers_stay_dense(n_dense: int, width: int | None) -> None:
    """They route nothing, have a width of their own, and forced routings skip them."""
    model = decoder(f"model.n_dense_layers={n_dense}", f"model.dense_hidden_dim={'null' if width is None else width}")
    kinds = [type(block.mlp) for block in model.layers]
    assert kinds == [GatedMLP] * n_dense + [MoELayer] * (LAYERS - n_dense)
    assert all(block.mlp.down.weight.shape[1] == (width or F) for block in model.layers[:n_dense])
    free: Output = model(ids(1, 5))
    assert len(free.routings) == LAYERS - n_dense
    assert torch.equal(model(ids(1, 5), forced_routing=free.routings).y, free.y)


@pytest.mark.parametrize("gate", [pytest.param("false", id="plain"), pytest.param("true", id="gated")])
def test_a_shared_expert_of_zero_is_no_shared_expert(gate: str) -> None:
    """It is added and replaces nothing."""
    without = decoder()
    model = decoder("model.shared_expert_hidden_dim=9", f"model.shared_expert_gate={gate}")
    assert not torch.allclose(model(ids(1, 5)).y, without(ids(1, 5)).y)
    for block in model.layers:
        block.mlp.shared.mlp.down.weight.zero_()
        assert (block.mlp.shared.gate is not None) == (gate == "true")
    torch.testing.assert_close(model(ids(1, 5)).y, without(ids(1, 5)).y)


def test_a_decoder_of_one_expert_is_the_dense_decoder() -> None:
    """E = K = 1 with the expert's matrices as the MLP's."""
    moe = decoder("model.n_experts=1", "model.top_k=1")
    dense = moe_lab.build_model(tiny.transformer_decoder())
    for block, plain in zip(moe.layers, dense.layers, strict=True):
        plain.mlp.gate_up.weight.copy_(block.mlp.weights.w_gate_up_E2FD[0])
        plain.mlp.down.weight.copy_(block.mlp.weights.w_down_EDF[0])
    torch.testing.assert_close(moe(ids(2, 7)).y, dense(ids(2, 7)).y, rtol=1e-5, atol=1e-5)


def test_each_layer_may_have_a_k_of_its_own() -> None:
    """In order, dense layers left out; and a layer computes what it does in a model where all have its k."""
    model = decoder("model.n_layers=4", "model.n_dense_layers=1", "model.top_k=[3,1,2]")
    assert [routing.expert_ids_TK.shape[1] for routing in model(ids(2, 7)).routings] == [3, 1, 2]
    x_TD = torch.randn(37, tiny.D, generator=torch.Generator().manual_seed(3))
    for k, block in zip((3, 1, 2), list(model.layers)[1:], strict=True):
        alike = decoder("model.n_layers=4", "model.n_dense_layers=1", f"model.top_k={k}")
        other = alike.get_submodule(f"layers.{list(model.layers).index(block)}.mlp")
        assert torch.equal(block.mlp(x_TD, RouteContext())[0], other(x_TD, RouteContext())[0])


def test_each_layer_has_a_router_and_experts_of_its_own() -> None:
    """State in one layer's router (a bias, say) is not another's."""
    layers = [block.mlp for block in decoder("model.n_layers=3").layers]
    assert len({id(layer.router) for layer in layers}) == 3
    assert len({layer.weights.w_down_EDF.data_ptr() for layer in layers}) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model.tie_embeddings=true"], id="tied"),
        pytest.param(["model.qk_norm=head", "model.n_kv_heads=2"], id="normed_heads"),
        pytest.param(["model.qk_norm=full", "model.head_dim=6"], id="normed_projection"),
        pytest.param(["model.top_k=5"], id="all_experts"),
        pytest.param(["dtype=bf16", "model.shared_expert_hidden_dim=9"], id="bf16_shared"),
    ],
)
def test_options_of_the_decoder_combine(overrides: list[str]) -> None:
    """Each builds, runs and gives finite logits."""
    output = decoder(*overrides)(ids(2, 3))
    assert output.y.shape == (2, 3, VOCAB)
    assert output.y.isfinite().all()


@pytest.mark.parametrize(
    ("peer", "overrides", "settings"),
    [
        pytest.param("mixtral", [], {"num_local_experts": E, "sliding_window": None}, id="mixtral"),
        pytest.param(
            "olmoe",
            ["model.qk_norm=full", "model.n_kv_heads=2", "router.renormalize=false"],
            {"num_experts": E, "norm_topk_prob": False},
            id="olmoe",
        ),
        pytest.param(
            "qwen3_moe",
            ["model.qk_norm=head", "model.head_dim=6", "model.n_dense_layers=1", "model.dense_hidden_dim=40"],
            {"num_experts": E, "norm_topk_prob": True, "mlp_only_layers": [0], "intermediate_size": 40},
            id="qwen3_moe_with_a_dense_layer",
        ),
        pytest.param(
            "qwen2_moe",
            ["model.shared_expert_hidden_dim=9", "model.shared_expert_gate=true", "router.renormalize=false"],
            {"num_experts": E, "norm_topk_prob": False, "shared_expert_intermediate_size": 9},
            id="qwen2_moe_with_a_gated_shared_expert",
        ),
    ],
)
def test_logits_are_those_of_transformers_with_the_same_weights(
    peer: str, overrides: list[str], settings: dict[str, object]
) -> None:
    """Independent implementations of the same architectures, routing and all."""
    model = decoder(*overrides)
    experts = {"num_experts_per_tok": K, "moe_intermediate_size": F}
    other = peer_model(peer, **{**decoder_settings(model), **experts, **settings})
    copy_decoder(model, other)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids(2, 7)).y, other(ids(2, 7)).logits, rtol=1e-4, atol=1e-4)
