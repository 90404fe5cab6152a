"""routers/lookahead.py: the guess of the layer before is executed, with the weights of the layer's own gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.routers.base import RouteContext, Routing, gate_logits
from moe_lab.routers.contract import check_contract
from moe_lab.runs import build
from tests import quick
from tests.routers.cases import looking_ahead, make


def test_a_case_by_hand() -> None:
    """The guess chooses experts 2 and 0; the layer's own logits ln 4 and ln 1 weigh them 4/5 and 1/5."""
    own_TE = torch.tensor([[0.0, 9.0, 4.0]]).clamp(min=1).log()
    routing = looking_ahead(3, 2).select(own_TE, RouteContext(guess_TE=torch.tensor([[1.0, 0.0, 2.0]])))
    assert routing.expert_ids_TK.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.8, 0.2]]))


@pytest.mark.parametrize("inner", [pytest.param(name, id=name) for name in ("mixtral", "olmoe", "top_p", "xshare")])
@pytest.mark.parametrize(("T", "E", "K"), [pytest.param(*s, id=str(s)) for s in ((0, 5, 2), (37, 12, 3), (8, 4, 4))])
def test_the_experts_are_those_of_the_guess_and_the_weights_are_not(inner: str, T: int, E: int, K: int) -> None:
    """The ids are the inner router's for the guess, the weights what it gives to them by the layer's logits."""
    own_TE, guess_TE = torch.randn(2, T, E, generator=torch.Generator().manual_seed(T + E))
    routing = looking_ahead(E, K, inner).select(own_TE, RouteContext(guess_TE=guess_TE, want_scores=True))
    check_contract(routing, T, E, 0)
    guessed = make(inner, E, K).select(guess_TE, RouteContext(want_scores=True))
    assert torch.equal(routing.expert_ids_TK, guessed.expert_ids_TK)
    assert routing.scores_TE is not None and guessed.scores_TE is not None
    assert torch.equal(routing.scores_TE, guessed.scores_TE)
    weights_TK = make(inner, E, K).weigh(own_TE, guessed.expert_ids_TK)
    assert weights_TK is not None and torch.equal(routing.weights_TK, weights_TK)


@torch.inference_mode()
@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="all-MoE"),
        pytest.param(("model.n_dense_layers=1", "model.n_layers=3"), id="a-dense-layer-first"),
    ],
)
def test_a_layer_is_given_what_the_mlp_before_it_read(more: tuple[str, ...]) -> None:
    """Its experts are the top k of its own gate on that; those of layer 0, if it has any, of its own input."""
    cfg = quick.compose("decoder_moe", "router=lookahead", *more)
    model = build.build_model(cfg)
    read: list[tuple[Tensor, Tensor | None, Routing]] = []
    before: list[Tensor] = []
    for block in model.layers:  # type: ignore[union-attr]
        block.mlp.register_forward_pre_hook(lambda _, arguments: before.append(arguments[0].flatten(0, -2)))
    with hooked(moe_layers(model), lambda _, args, result: read.append((args[0], args[1].previous_TD, result[1]))):
        model(build.build_input(cfg, model, torch.device("cpu")))
    first = len(before) - len(read)
    for index, (layer, (x_TD, previous_TD, routing)) in enumerate(zip(moe_layers(model), read, strict=True), first):
        if index:
            assert previous_TD is not None and torch.equal(previous_TD, before[index - 1])
        guess_TE = gate_logits(x_TD if index == 0 else before[index - 1], layer.weights.gate_ED)
        assert torch.equal(routing.expert_ids_TK, make("mixtral", 5, 2).select(guess_TE).expert_ids_TK)


def test_other_routers_are_not_told() -> None:
    """Without a router that looks ahead nothing is carried from layer to layer."""
    model = build.build_model(quick.compose("decoder_moe"))
    told = []
    with hooked(moe_layers(model), lambda _, args, result: told.append(args[1].previous_TD)):
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert told == [None, None] and not model.looks_ahead


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("decoder_moe", ("workload.phase=prefill",), id="prefill"),
        pytest.param("decoder_moe", ("workload.phase=decode", "workload.context_len=3"), id="decode"),
        pytest.param("decoder_moe", ("dtype=bf16",), id="bf16", marks=pytest.mark.slow),
        pytest.param("checkpoint", ("router@router.inner=native",), id="tiny-olmoe"),
        pytest.param(
            "checkpoint",
            (f"model.path={quick.ASSETS / 'tiny-qwen3-moe'}", "router@router.inner=native"),
            id="tiny-qwen3-moe",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_is_verified_and_says_what_the_first_layer_does(
    model: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    """In every phase; of a checkpoint with its quality."""
    record = moe_lab.run(quick.compose(model, "router=lookahead", *more), tmp_path)
    assert record.status == "ok" and record.check is not None and record.check.passed
    assert any("the first layer has no layer before it" in text for text in record.warnings)
    if model == "checkpoint":
        assert record.quality is not None and record.quality["kl_to_native"] > 0


def test_a_wrong_guess_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: layers that are told something else while they run than while they are checked."""
    right = MoELayer.forward

    def forward(layer: MoELayer, x_TD: Tensor, ctx: RouteContext, forced: Routing | None = None) -> object:
        told = None if ctx.previous_TD is None else ctx.previous_TD.flip(0)
        return right(layer, x_TD, ctx._replace(previous_TD=told), forced)

    monkeypatch.setattr(MoELayer, "forward", forward)
    record = moe_lab.run(quick.compose("decoder_moe", "router=lookahead"), tmp_path)
    assert (record.status, record.reason) == ("failed", "mismatch: route")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("moe_layer", (), id="one-layer-alone"),
        pytest.param("decoder_moe", ("model.n_layers=1",), id="a-decoder-of-one-layer"),
    ],
)
def test_a_model_without_a_layer_before_is_refused(model: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """One line with the router, the model and the remedy."""
    with pytest.raises(UnavailableError, match=rf"router=lookahead needs .* model={model}.*with two layers or more"):
        moe_lab.run(quick.compose(model, "router=lookahead", *more), tmp_path)


def test_an_inner_router_that_cannot_weigh_or_chooses_nothing_is_named() -> None:
    """A capacity that drops tokens, and Soft MoE."""
    inner = make("capacity", 5, 2, inner=make("mixtral", 5, 2))
    guess_TE = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"router\.inner: Capacity\.weigh.*wrap another router"):
        make("lookahead", 5, 2, inner=inner).select(guess_TE, RouteContext(guess_TE=guess_TE))
    with pytest.raises(ValueError, match=r"router\.inner: router=soft"):
        make("lookahead", 5, 2, inner=make("soft", 5, 2))


def test_it_cannot_be_the_reference_of_another_router(tmp_path: Path) -> None:
    """The run's layers are not told what it would need: a warning says so, and nothing is compared."""
    cfg = quick.compose("decoder_moe", "measure.reference_router=lookahead")
    record = moe_lab.run(cfg, tmp_path)
    assert record.agreement is None and any("swap the two routers" in text for text in record.warnings)
