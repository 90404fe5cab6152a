"""models/soft_moe.py: the layer against its formula, what depends on what, and whole runs with and without a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import Tensor

import moe_lab
from moe_lab import marks as phases
from moe_lab.errors import MismatchError
from moe_lab.experts.base import Experts, FunctionExperts
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models.layer_kinds import make_moe_layer
from moe_lab.models.moe_layer import MoELayer, SharedExpert, moe_layers
from moe_lab.models.parameters import initialize
from moe_lab.models.soft_moe import SoftMoELayer
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Routing
from moe_lab.runs.run import Run
from tests import quick, tiny
from tests.conftest import needs_cxx
from tests.routers.cases import make
from tests.tiny import D, E
from tests.tiny import F as HIDDEN

ONE_SEQUENCE = RouteContext()
BOTH = pytest.mark.parametrize("experts", [pytest.param(Loop(), id="loop"), pytest.param(Grouped(), id="grouped")])
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16")])
MODELS = pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("decoder_moe", "moe_layer")])


def layer_of(
    experts: Experts | None = None, n_experts: int = E, shared: SharedExpert | None = None, seed: int = 4
) -> SoftMoELayer:
    layer = make_moe_layer(
        ExpertWeights(n_experts, D, HIDDEN), make("soft", n_experts, 1), experts or Grouped(), shared
    )
    assert isinstance(layer, SoftMoELayer)
    initialize(layer, seed)
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(B: int, S: int) -> RouteContext:
    """The context of B sequences of S tokens."""
    return RouteContext(seq_start_B1=torch.arange(B + 1, dtype=torch.int32) * S)


def expert_output(layer: MoELayer, expert: int, x_D: Tensor) -> Tensor:
    gate, up = layer.weights.w_gate_up_E2FD[expert].double().chunk(2)
    return layer.weights.w_down_EDF[expert].double() @ (F.silu(gate @ x_D) * (up @ x_D))


def by_formula(layer: MoELayer, x_TD: Tensor, B: int = 1) -> Tensor:
    """One sequence, one expert and one token at a time, in float64."""
    rows = []
    for x_SD in x_TD.double().tensor_split(B):
        logits_SE = x_SD @ layer.weights.gate_ED.double().T
        outputs = []
        for expert in range(layer.weights.n_experts):
            e_S = logits_SE[:, expert].exp()
            slot_D = sum(((e / e_S.sum()) * x_D for e, x_D in zip(e_S, x_SD, strict=True)), torch.zeros(D).double())
            outputs.append(expert_output(layer, expert, slot_D))
        for logits_E in logits_SE:
            e_E = logits_E.exp()
            rows.append(sum((e / e_E.sum()) * o_D for e, o_D in zip(e_E, outputs, strict=True)))
    return torch.stack(rows) if rows else torch.zeros(0, D).double()


@BOTH
@pytest.mark.parametrize("n_experts", [pytest.param(n, id=f"E={n}") for n in (1, 5)])
@pytest.mark.parametrize("S", [pytest.param(n, id=f"S={n}") for n in (0, 1, 37)])
@pytest.mark.parametrize("B", [pytest.param(n, id=f"B={n}") for n in (1, 2, 3)])
def test_the_output_is_that_of_algorithm_1(experts: Experts, n_experts: int, S: int, B: int) -> None:
    """Sequence by sequence in float64; the routing is C, and x keeps its values."""
    layer, x_TD = layer_of(experts, n_experts), random(B * S, D)
    before_TD = x_TD.clone()
    y_TD, routing = layer(x_TD, of(B, S))
    assert y_TD.shape == x_TD.shape and y_TD.dtype == x_TD.dtype
    torch.testing.assert_close(y_TD.double(), by_formula(layer, x_TD, B), rtol=1e-4, atol=1e-5)
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (B * S, n_experts)
    C_TE = (x_TD.double() @ layer.weights.gate_ED.double().T).softmax(-1)
    torch.testing.assert_close(routing.weights_TK.double(), C_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(x_TD, before_TD)


def test_without_starts_all_tokens_are_one_sequence() -> None:
    """As model=moe_layer feeds them; no sequences are none."""
    layer, x_TD = layer_of(), random(14, D)
    y_TD, _ = layer(x_TD, ONE_SEQUENCE)
    assert torch.equal(y_TD, layer(x_TD, of(1, 14))[0])
    assert not torch.allclose(y_TD, layer(x_TD, of(2, 7))[0], rtol=1e-2)
    assert layer(random(0, D), of(0, 3))[0].shape == (0, D)


@BOTH
def test_grouped_computes_what_the_loop_computes(experts: Experts) -> None:
    """Up to rounding; a reference twin's layer is the loop's."""
    layer, x_TD = layer_of(experts), random(74, D)
    y_TD, _ = layer(x_TD, of(2, 37))
    layer.use_reference()
    assert isinstance(layer.experts, Loop)
    torch.testing.assert_close(y_TD, layer(x_TD, of(2, 37))[0], rtol=1e-5, atol=1e-6)


def test_a_sequence_does_not_depend_on_another() -> None:
    """Alone it comes out as in the batch, whatever stands in the other."""
    layer, x_TD, other_TD = layer_of(), random(14, D), random(14, D, seed=1)
    other_TD[:7] = x_TD[:7]
    y_TD, _ = layer(x_TD, of(2, 7))
    assert torch.equal(layer(other_TD, of(2, 7))[0][:7], y_TD[:7])
    torch.testing.assert_close(layer(x_TD[:7], of(1, 7))[0], y_TD[:7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(other_TD, of(2, 7))[0][7:], y_TD[7:], rtol=1e-2)


def test_what_the_router_declares_is_true_of_the_layer() -> None:
    """Later tokens change earlier ones, and a token alone comes out otherwise than in the batch."""
    layer, x_TD = layer_of(), random(9, D)
    y_TD, _ = layer(x_TD, ONE_SEQUENCE)
    later = torch.allclose(layer(x_TD[:5], ONE_SEQUENCE)[0], y_TD[:5], rtol=1e-2)
    alone = torch.allclose(layer(x_TD[:1], ONE_SEQUENCE)[0], y_TD[:1], rtol=1e-2)
    assert (layer.router.causal, layer.router.batch_invariant) == (later, alone) == (False, False)


@BOTH
def test_a_token_alone_is_a_mixture_of_the_experts_outputs(experts: Experts) -> None:
    """D is 1, so y = sum_e C_e f_e(x)."""
    layer, x_TD = layer_of(experts), random(3, D)
    C_TE = (x_TD.double() @ layer.weights.gate_ED.double().T).softmax(-1)
    want = [
        sum(C * expert_output(layer, e, x_D) for e, C in enumerate(C_E))
        for x_D, C_E in zip(x_TD.double(), C_TE, strict=True)
    ]
    torch.testing.assert_close(layer(x_TD, of(3, 1))[0].double(), torch.stack(want), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), S=st.integers(1, 9))
def test_neither_the_tokens_order_nor_the_experts_names_matter(seed: int, S: int) -> None:
    """Permuting a sequence's tokens permutes the outputs; renaming the experts changes none."""
    layer, renamed, x_TD = layer_of(), layer_of(), random(S, D, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order_S, order_E = torch.randperm(S, generator=generator), torch.randperm(E, generator=generator)
    for name in ("gate_ED", "w_gate_up_E2FD", "w_down_EDF"):
        getattr(renamed.weights, name).copy_(getattr(layer.weights, name)[order_E])
    y_TD, _ = layer(x_TD, ONE_SEQUENCE)
    torch.testing.assert_close(layer(x_TD[order_S], ONE_SEQUENCE)[0], y_TD[order_S], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(renamed(x_TD, ONE_SEQUENCE)[0], y_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [pytest.param(False, id="plain"), pytest.param(True, id="gated")])
def test_the_shared_expert_is_added(gated: bool) -> None:
    """To what the layer is without one."""
    shared = SharedExpert(D, 11, gated=gated)
    layer, x_TD = layer_of(shared=shared), random(14, D)
    y_TD, routing = layer(x_TD, of(2, 7))
    alone_TD = layer.routed(x_TD, routing, of(2, 7))
    torch.testing.assert_close(alone_TD.double(), by_formula(layer, x_TD, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y_TD, alone_TD + shared(x_TD))


def test_a_forced_routing_changes_nothing() -> None:
    """It comes back as it is, whatever it says."""
    layer, x_TD = layer_of(), random(4, D)
    forced = Routing(torch.full((4, 2), -1, dtype=torch.int32), torch.zeros(4, 2))
    y_TD, routing = layer(x_TD, ONE_SEQUENCE, forced)
    assert routing is forced
    assert torch.equal(y_TD, layer(x_TD, ONE_SEQUENCE)[0])


def test_sequences_of_different_lengths_are_not_silently_cut() -> None:
    """Our own models have none; what cannot be equally long is an error."""
    with pytest.raises(AssertionError, match="7 tokens cannot be split into 2 sequences"):
        layer_of()(random(7, D), of(2, 3))


@BOTH
def test_logits_and_softmaxes_are_fp32_in_bf16(experts: Experts) -> None:
    """The output is bf16, C is not; both are as near to the formula as bf16 allows."""
    layer, x_TD = layer_of(experts).to(torch.bfloat16), random(74, D).to(torch.bfloat16)
    y_TD, routing = layer(x_TD, of(2, 37))
    assert (y_TD.dtype, routing.weights_TK.dtype) == (torch.bfloat16, torch.float32)
    C_TE = (x_TD.double() @ layer.weights.gate_ED.double().T).softmax(-1)
    torch.testing.assert_close(routing.weights_TK.double(), C_TE, rtol=1e-5, atol=1e-6)
    want_TD = by_formula(layer, x_TD, 2)
    assert float((y_TD.double() - want_TD).norm() / want_TD.norm()) < 0.01


def test_what_verification_looks_at_is_what_the_layer_computes() -> None:
    """The logits in fp32, of which C is the softmax to the last bit, and the slots that the experts are given."""
    layer, x_TD, ctx = layer_of().to(torch.bfloat16), random(74, D).to(torch.bfloat16), of(2, 37)
    _, routing = layer(x_TD, ctx)
    assert torch.equal(layer.logits(x_TD).softmax(-1), routing.weights_TK)
    given: list[tuple[Tensor, Routing]] = []
    right = layer.experts
    layer.experts = FunctionExperts(lambda x, r, w, **keys: given.append((x, r)) or right(x, r, w, **keys))
    layer(x_TD, ctx)
    slots_ND, slots = layer.rows(x_TD, routing, ctx)
    assert torch.equal(slots_ND, given[0][0]) and slots_ND.shape == (2 * E, D)
    assert slots.expert_ids_TK.tolist() == given[0][1].expert_ids_TK.tolist() == [[e] for e in range(E)] * 2
    assert slots.weights_TK.unique().tolist() == [1.0]


def test_both_softmaxes_are_of_the_logits_that_the_router_computes() -> None:
    """Whoever replaces its `route` (a fused kernel, a pass in float64) replaces D and C; scores only if asked for."""
    layer, other, x_TD = layer_of(seed=4), layer_of(seed=5), random(14, D)
    route = layer.router.route
    layer.router.route = lambda x_TD, gate_ED, ctx=None: route(x_TD, other.weights.gate_ED, ctx)  # type: ignore[method-assign]
    y_TD, routing = layer(x_TD, of(2, 7)._replace(want_scores=True))
    assert routing.scores_TE is not None and torch.equal(routing.scores_TE, x_TD @ other.weights.gate_ED.T)
    assert layer(x_TD, of(2, 7))[1].scores_TE is None
    layer.weights.gate_ED.copy_(other.weights.gate_ED)
    torch.testing.assert_close(y_TD.double(), by_formula(layer, x_TD, 2), rtol=1e-4, atol=1e-5)


def test_the_router_chooses_the_layer() -> None:
    """In both models, but for the dense layers; another router has the usual one."""
    weights = ExpertWeights(E, D, HIDDEN)
    assert type(make_moe_layer(weights, make("soft", E, 2), Loop())) is SoftMoELayer
    assert type(make_moe_layer(weights, make("mixtral", E, E), Loop())) is MoELayer
    decoder = tiny.built(tiny.decoder_moe("router=soft", "model.n_dense_layers=1")).built.model
    assert [type(layer) for layer in moe_layers(decoder)] == [SoftMoELayer]
    assert type(tiny.built(tiny.moe_layer("router=soft")).built.model.moe) is SoftMoELayer


def test_the_decoder_tells_the_layer_its_sequences() -> None:
    """Another sequence in the batch changes no logit of the first."""
    run = tiny.built(tiny.decoder_moe("router=soft"))
    other_BS = run.built.x.clone()
    other_BS[1] = other_BS[1].flip(0)
    torch.testing.assert_close(run.built.model(other_BS).y[0], run.built.model(run.built.x).y[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(run.built.model(other_BS).y[1], run.built.model(run.built.x).y[1], rtol=1e-2)


def test_the_layer_is_one_graph() -> None:
    """Nothing is read on the host, so it compiles whole."""
    layer, x_TD, ctx = layer_of(), random(14, D), of(2, 7)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x_TD, ctx)[0], layer(x_TD, ctx)[0])


def test_the_phases_are_marked_one_after_another() -> None:
    """The mixtures are dispatch, and the weighted sum is combine, beside what the experts mark as such."""
    marks: list[str] = []

    class Listener:
        def start(self, name: str) -> None:
            marks.append(name)

        def stop(self, name: str) -> None:
            assert marks[-1] == name, "phases do not nest"

    phases.listen(Listener())
    try:
        layer_of()(random(14, D), of(2, 7))
    finally:
        phases.listen(None)
    assert marks == ["router", "dispatch", "dispatch", "experts", "combine", "combine"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("S", [pytest.param(n, id=f"S={n}") for n in (0, 1, 37)])
def test_a_captured_graph_follows_the_input(S: int, dtype: torch.dtype, device: torch.device) -> None:
    """On CUDA no step waits for the device, and a replay computes what an eager pass does."""
    layer, x_TD = layer_of().to(device, dtype), random(2 * S, D).to(device, dtype)
    ctx = RouteContext(seq_start_B1=torch.arange(3, dtype=torch.int32, device=device) * S)
    static_TD = torch.zeros_like(x_TD)
    layer(static_TD, ctx)
    torch.cuda.set_sync_debug_mode("error")
    try:
        want_TD, _ = layer(x_TD, ctx)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD, _ = layer(static_TD, ctx)
    static_TD.copy_(x_TD)
    graph.replay()
    torch.testing.assert_close(y_TD, want_TD)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    want_TD = by_formula(layer.cpu(), x_TD.cpu(), 2)
    assert float((y_TD.cpu().double() - want_TD).norm()) <= tolerance * float(want_TD.norm())


# --- whole runs -------------------------------------------------------------------------------------------------------


def config(model: str, *more: str) -> DictConfig:
    make = tiny.decoder_moe if model == "decoder_moe" else tiny.moe_layer
    return make("router=soft", *more)


def assert_verified(cfg: DictConfig) -> None:
    """`verify` raises for a mismatch; its check says so, too."""
    run = tiny.built(cfg)
    run.verify()
    assert run.verification is not None and run.verification.check.passed


@pytest.mark.thinned(1)
@MODELS
@DTYPES
@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, id=f"seed{seed}", marks=[pytest.mark.slow] if seed else []) for seed in range(3)]
)
def test_a_correct_run_passes(model: str, dtype: str, experts: str, seed: int) -> None:
    """There are no near-ties and no changed sets, for nothing is chosen; so forced and free are the same pass."""
    run = tiny.built(config(model, f"dtype={dtype}", f"experts={experts}", f"seed={seed}"))
    run.verify()
    assert run.verification is not None
    check = run.verification.check
    assert check.passed and (check.near_ties, check.changed_sets) == (0, 0)
    assert check.rel_error == check.free_rel_error


@pytest.mark.gpu
@MODELS
@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "fp16", "bf16")])
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph", "compile")])
def test_a_correct_run_passes_on_cuda(model: str, dtype: str, execution: str) -> None:
    """In every dtype and execution."""
    assert_verified(config(model, "device=cuda", f"dtype={dtype}", f"execution={execution}"))


@needs_cxx
@MODELS
@pytest.mark.slow
def test_a_correct_run_compiles(model: str) -> None:
    """Captured whole, and verified like the others."""
    assert_verified(config(model, "execution=compile", "dtype=bf16"))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["batch=1", "seq_len=1"], id="one_token"),
        pytest.param(["model.n_experts=1", "model.top_k=1"], id="one_expert"),
        pytest.param(["model.shared_expert_hidden_dim=9", "model.shared_expert_gate=true"], id="shared"),
        pytest.param(["batch=3", "seq_len=37", "model.n_experts=12"], id="longer"),
    ],
)
@DTYPES
@pytest.mark.slow
def test_every_size_of_the_decoder_is_verified(more: list[str], dtype: str) -> None:
    """The reference follows the model's options."""
    assert_verified(config("decoder_moe", f"dtype={dtype}", *more))


def test_the_record_says_what_its_load_is(tmp_path: Path) -> None:
    """Every token in every expert: an even load by construction, and a warning that it is no load of rows."""
    record = moe_lab.run(quick.compose("decoder_moe", "router=soft", "measure.roofline=true"), tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.routing is not None and record.routing["pooled"]["load_max_over_mean"] == 1
    assert len([text for text in record.warnings if "one row per sequence and expert" in text]) == 1
    assert record.implementation["router"] == "torch"
    assert record.phases_share is not None and record.roofline is not None
    assert None not in [record.phases_share[name] for name in phases.NAMES]


def over_the_wrong_axis(layer: SoftMoELayer) -> None:
    """D is C, whose columns do not sum to 1."""
    right = layer._weights

    def faulty(x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, Routing]:
        D_BSE, routing = right(x_TD, ctx)
        return routing.weights_TK.view_as(D_BSE), routing

    layer._weights = faulty  # type: ignore[method-assign]


def over_all_sequences(layer: SoftMoELayer) -> None:
    """The starts are overlooked."""
    right = layer._mixed
    layer._mixed = lambda x_TD, ctx: right(x_TD, ctx._replace(seq_start_B1=None))  # type: ignore[method-assign]


def with_another_expert(layer: SoftMoELayer) -> None:
    """One expert's matrix is another than the reference's."""
    right = layer.experts

    def faulty(x_TD: Tensor, routing: Routing, weights: ExpertWeights, **keys: Any) -> Tensor:
        changed = ExpertWeights(E, D, HIDDEN).to(weights.w_down_EDF.dtype)
        changed.load_state_dict(weights.state_dict())
        changed.w_down_EDF[3] *= 1.05
        return right(x_TD, routing, changed, **keys)

    layer.experts = FunctionExperts(faulty)


def with_the_weights_of_another_token(layer: SoftMoELayer) -> None:
    """C is shifted by one token."""
    right = layer.router.select

    def faulty(logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = right(logits_TE, ctx)
        return routing._replace(weights_TK=routing.weights_TK.roll(1, 0))

    layer.router.select = faulty  # type: ignore[method-assign]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("plant", "where"),
    [
        pytest.param(over_the_wrong_axis, "layers", id="wrong_axis"),
        pytest.param(over_all_sequences, "layers", id="all_sequences"),
        pytest.param(with_another_expert, "layers", id="one_expert_5_percent_off"),
        pytest.param(with_the_weights_of_another_token, "route", id="weights_of_another_token"),
    ],
)
@pytest.mark.parametrize("at", [pytest.param(n, id=f"layer{n}") for n in (0, 1)])
@DTYPES
def test_a_planted_fault_is_found(plant: Callable[[SoftMoELayer], None], where: str, at: int, dtype: str) -> None:
    """In either layer of the run's model; its reference twin is right."""
    run: Run = tiny.built(config("decoder_moe", f"dtype={dtype}"))
    layer = moe_layers(run.built.model)[at]
    assert isinstance(layer, SoftMoELayer)
    plant(layer)
    with pytest.raises(MismatchError) as caught:
        run.verify()
    assert caught.value.where == where
