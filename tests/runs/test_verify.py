"""verify.py: correct runs pass, planted faults fail with the right cause, near-ties are counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from moe_lab.errors import MismatchError
from moe_lab.experts.base import FunctionExperts
from moe_lab.experts.weights import ExpertWeights
from moe_lab.measure.tolerances import TOLERANCES, Tolerance
from moe_lab.models import Output
from moe_lab.models.moe_layer import MoELayer, moe_layers
from moe_lab.models.parameters import reference_twin
from moe_lab.ops.dispatch import dispatch
from moe_lab.records.schema import Check
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.runs.run import Run
from moe_lab.runs.verify import Verification, judged, nothing_known, verify
from tests import tiny
from tests.measure.test_tolerances import high_precision as high_precision
from tests.tiny import LAYERS, E, T

Tamper = Callable[[Routing], Routing]

DTYPES = [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")]
ROUTERS = [pytest.param(router, id=router) for router in ("torch", "sinkhorn")]
MODELS = [pytest.param(name, id=name) for name in ("decoder_moe", "moe_layer")]


class Tampering(Router):
    """Another router whose routing is changed before anybody sees it."""

    def __init__(self, inner: Router, tamper: Tamper):
        super().__init__(inner.n_experts, inner.top_k)
        self.inner, self.tamper = inner, tamper

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        return self.tamper(self.inner.select(logits_TE, ctx))


class OtherWayRound(Router):
    """Softmax top-k in which ties go to the highest expert id."""

    def __init__(self, inner: Router):
        super().__init__(inner.n_experts, inner.top_k)
        self.inner = inner

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        flipped = self.inner.select(logits_TE.flip(-1), ctx)
        return flipped._replace(expert_ids_TK=self.n_experts - 1 - flipped.expert_ids_TK, scores_TE=None)


class Blind(Router):
    """Takes logits that are not finite for zero."""

    def __init__(self, inner: Router):
        super().__init__(inner.n_experts, inner.top_k)
        self.inner = inner

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        return self.inner.select(logits_TE.nan_to_num(0, 0, 0), ctx)


def config(model: str, *overrides: str) -> DictConfig:
    return tiny.decoder_moe(*overrides) if model == "decoder_moe" else tiny.moe_layer(*overrides)


def layers_of(run: Run) -> list[MoELayer]:
    return moe_layers(run.built.model)


def in_router(run: Run, tamper: Tamper, layer: int = -1) -> None:
    """Plant a fault in what the router says."""
    chosen = layers_of(run)[layer]
    chosen.router = Tampering(chosen.router, tamper)


def in_experts(run: Run, tamper: Tamper, layer: int = -1) -> None:
    """Plant a fault in how the experts read the routing, which itself stays right."""
    chosen = layers_of(run)[layer]
    inner = chosen.experts

    def faulty(x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Any = "output") -> Tensor:
        return inner(x_TD, tamper(routing), weights, scale=scale)

    chosen.experts = FunctionExperts(faulty)


def scaled(expert: int, by: float) -> Tamper:
    """As if the expert's output came out `by` times as large."""

    def tamper(routing: Routing) -> Routing:
        at_TK = routing.expert_ids_TK == expert
        return routing._replace(weights_TK=torch.where(at_TK, by * routing.weights_TK, routing.weights_TK))

    return tamper


def decided_token(routing: Routing) -> int:
    """The token whose weights differ most."""
    return int((routing.weights_TK.amax(-1) - routing.weights_TK.amin(-1)).argmax())


def swapped_ids(routing: Routing) -> Routing:
    """Two ids of one token change places, their weights do not."""
    ids_TK, token = routing.expert_ids_TK.clone(), decided_token(routing)
    ids_TK[token, :2] = ids_TK[token, :2].flip(0)
    return routing._replace(expert_ids_TK=ids_TK)


def zeroed_weight(routing: Routing) -> Routing:
    """The largest weight of one token is lost."""
    weights_TK = routing.weights_TK.clone()
    weights_TK[decided_token(routing), 0] = 0
    return routing._replace(weights_TK=weights_TK)


def exchanged_tokens(routing: Routing) -> Routing:
    """Two tokens that go to different experts have each other's routes."""
    sets = [set(ids) for ids in routing.expert_ids_TK.tolist()]
    other = next((token for token, ids in enumerate(sets) if ids != sets[0]), 0)
    order_T = list(range(len(sets)))
    order_T[0], order_T[other] = other, 0
    return routing._replace(expert_ids_TK=routing.expert_ids_TK[order_T], weights_TK=routing.weights_TK[order_T])


def another_expert(routing: Routing) -> Routing:
    """The last token's last slot goes to an expert that the token had not chosen."""
    ids_TK = routing.expert_ids_TK.clone()
    ids_TK[-1, -1] = next(expert for expert in range(E) if expert not in ids_TK[-1].tolist())
    return routing._replace(expert_ids_TK=ids_TK)


def verified(run: Run, **options: bool) -> Verification:
    return verify(run.built.model, run.built.twin, run.built.x, run.built.step(), run.built.dtype, **options)


def fault_found(run: Run) -> MismatchError:
    """The mismatch that `Run.verify` raises; the check is kept and says the same."""
    with pytest.raises(MismatchError) as caught:
        run.verify()
    assert run.verification is not None and run.verification.check.passed is False
    assert run.peak_bytes is None, "a run that computes something else is not measured"
    return caught.value


# --- correct runs -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_run_passes(model: str, router: str, experts: str, dtype: str) -> None:
    """Every number of the check is there and below its tolerance."""
    run = tiny.built(config(model, f"router={router}", f"experts={experts}", f"dtype={dtype}"))
    run.verify()
    assert run.verification is not None
    check, tolerance = run.verification.check, TOLERANCES[run.built.dtype]
    assert check.passed is True and run.verification.mismatch is None
    assert check.rel_error <= tolerance.model
    assert check.expert_rel_error is not None and check.expert_rel_error <= tolerance.expert
    assert check.token_rel_error is not None and check.token_rel_error <= tolerance.token
    assert check.near_ties == 0
    assert run.peak_bytes is None or run.peak_bytes > 0


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("minimal", "transformer_decoder")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_without_experts_is_checked_as_a_whole(model: str, dtype: str) -> None:
    """What it has no layers for is null; forced and free are then the same reference."""
    run = tiny.built(tiny.compose(model, f"dtype={dtype}"))
    check = verified(run).check
    assert check.passed is True
    assert (check.expert_rel_error, check.token_rel_error, check.near_ties, check.changed_sets) == (None,) * 4
    assert check.rel_error == check.free_rel_error


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model.shared_expert_hidden_dim=9", "model.shared_expert_gate=true"], id="shared"),
        pytest.param(["model.n_dense_layers=1"], id="dense_layer"),
        pytest.param(["model.qk_norm=head", "model.n_kv_heads=2"], id="grouped_queries"),
        pytest.param(["model.top_k=5"], id="all_experts"),
        pytest.param(["model.n_experts=1", "model.top_k=1"], id="one_expert"),
        pytest.param(["model.top_k=[3,1]"], id="k_by_layer"),
        pytest.param(["batch=1", "seq_len=1"], id="one_token"),
        pytest.param(["router.renormalize=false"], id="not_renormalised"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_of_the_decoder_is_verified(overrides: list[str], dtype: str) -> None:
    """The reference follows the model's options."""
    assert verified(tiny.built(tiny.decoder_moe(*overrides, f"dtype={dtype}"))).check.passed is True


@pytest.mark.parametrize(
    "field", [pytest.param(field, id=field) for field in ("rel_error", "expert_rel_error", "token_rel_error")]
)
@pytest.mark.slow
def test_correct_bf16_runs_stay_below_half_of_each_tolerance(field: str, correct_bf16: list[Check]) -> None:
    """The table is not so tight that rounding fails a correct run."""
    tolerance = getattr(TOLERANCES[torch.bfloat16], field.removesuffix("rel_error").rstrip("_") or "model")
    assert max(getattr(check, field) for check in correct_bf16) < tolerance / 2


@pytest.mark.parametrize(
    "field", [pytest.param(field, id=field) for field in ("rel_error", "expert_rel_error", "token_rel_error")]
)
@pytest.mark.slow
def test_correct_bf16_runs_reach_a_fifteenth_of_each_tolerance(field: str, correct_bf16: list[Check]) -> None:
    """Nor so loose that it measures nothing."""
    tolerance = getattr(TOLERANCES[torch.bfloat16], field.removesuffix("rel_error").rstrip("_") or "model")
    assert max(getattr(check, field) for check in correct_bf16) > tolerance / 15


@pytest.fixture(scope="module")
def correct_bf16() -> list[Check]:
    """The checks of correct bf16 runs: two models, both routers, four seeds."""
    checks = []
    for seed in range(4):
        for router in ("torch", "sinkhorn"):
            for model in ("decoder_moe", "moe_layer"):
                checks.append(
                    verified(tiny.built(config(model, "dtype=bf16", f"router={router}", f"seed={seed}"))).check
                )
    return checks


@pytest.mark.slow
def test_free_error_and_changed_sets_decide_nothing() -> None:
    """A correct bf16 run whose near-ties flip experts in fp32 is far from the free reference, and passes."""
    sizes = ("dtype=bf16", "batch=4", "seq_len=16")
    checks = [verified(tiny.built(tiny.decoder_moe(*sizes, f"seed={seed}"))).check for seed in range(4)]
    flipped = [check for check in checks if check.changed_sets]
    assert flipped, "no seed of these shows the effect"
    assert max(check.free_rel_error for check in flipped) > TOLERANCES[torch.bfloat16].model
    assert all(check.passed for check in checks)


def test_counted_operations_are_of_the_reference() -> None:
    """The same for every dtype and implementation."""
    counts = {
        verified(tiny.built(tiny.moe_layer(f"dtype={dtype}", f"experts={experts}"))).flops
        for dtype in ("fp32", "bf16")
        for experts in ("loop", "grouped")
    }
    assert len(counts) == 1 and counts.pop() > 0


# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_experts", "top_k", "tokens"),
    [
        pytest.param(5, 2, 14, id="few_experts"),
        pytest.param(64, 8, 128, id="many_experts", marks=pytest.mark.slow),
        pytest.param(64, 8, 16, id="many_experts_few_tokens"),
        pytest.param(64, 1, 16, id="many_experts_top_1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "dtype", [pytest.param("fp32", id="fp32"), pytest.param("bf16", id="bf16", marks=pytest.mark.slow)]
)
def test_one_expert_5_percent_off_fails_whichever_it_is(n_experts: int, top_k: int, tokens: int, dtype: str) -> None:
    """No expert in use hides in an average, or behind the larger weights of the others."""
    run = tiny.built(
        tiny.moe_layer(f"dtype={dtype}", n_experts=n_experts, top_k=top_k, d_model=64, hidden=48, tokens=tokens)
    )
    (layer,) = layers_of(run)
    used = run.built.step().routings[0].expert_ids_TK.unique().tolist()
    right, missed = layer.experts, []
    for expert in used[:: max(1, len(used) // 16)]:
        layer.experts = right
        in_experts(run, scaled(expert, 1.05))
        mismatch = verified(run).mismatch
        if mismatch is None or mismatch.where != "layers":
            missed.append(expert)
    assert missed == []


@pytest.mark.parametrize("layer", [pytest.param(index, id=f"layer{index}") for index in range(LAYERS)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_5_percent_off_fails_in_any_layer_of_a_decoder(layer: int, dtype: str) -> None:
    """The first layer's fault is not washed out by what follows."""
    run = tiny.built(tiny.decoder_moe(f"dtype={dtype}"))
    busiest = int(run.built.step().routings[layer].expert_ids_TK.flatten().bincount().argmax())
    in_experts(run, scaled(busiest, 1.05), layer)
    assert fault_found(run).where == "layers"


@pytest.mark.parametrize("by", [pytest.param(0.99, id="too small"), pytest.param(1.01, id="too large")])
@pytest.mark.parametrize("model", MODELS)
def test_experts_1_percent_off_fail_in_bf16(model: str, by: float) -> None:
    """Below the rounding of a single output, but all of them are off the same way."""
    run = tiny.built(config(model, "dtype=bf16"))
    in_experts(run, lambda routing: routing._replace(weights_TK=by * routing.weights_TK))
    assert "scale of the experts" in str(fault_found(run))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("plant", "tamper", "where"),
    [
        pytest.param(in_router, swapped_ids, "route", id="ids_swapped_in_the_router"),
        pytest.param(in_experts, swapped_ids, "layers", id="ids_swapped_in_the_experts"),
        pytest.param(in_router, zeroed_weight, "route", id="weight_zeroed_in_the_router"),
        pytest.param(in_experts, zeroed_weight, "layers", id="weight_zeroed_in_the_experts"),
        pytest.param(in_router, exchanged_tokens, "route", id="tokens_exchanged_in_the_router"),
        pytest.param(in_experts, exchanged_tokens, "layers", id="tokens_exchanged_in_the_experts"),
        pytest.param(in_router, another_expert, "route", id="another_expert_in_the_router"),
        pytest.param(in_experts, another_expert, "layers", id="another_expert_in_the_experts"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_fault_fails_where_it_was_planted(
    plant: Callable[[Run, Tamper], None], tamper: Tamper, where: str, model: str, dtype: str
) -> None:
    """One token's fault in one layer, in the router or behind it."""
    run = tiny.built(config(model, f"dtype={dtype}"))
    plant(run, tamper)
    assert fault_found(run).where == where


@pytest.mark.parametrize(
    "tamper", [pytest.param(f, id=f.__name__) for f in (swapped_ids, zeroed_weight, another_expert)]
)
@pytest.mark.parametrize("layer", [pytest.param(index, id=f"layer{index}") for index in range(LAYERS)])
def test_a_fault_of_a_router_names_its_layer(tamper: Tamper, layer: int) -> None:
    """So does a fault of sinkhorn, whose scores are not the logits."""
    run = tiny.built(tiny.decoder_moe("router=sinkhorn"))
    in_router(run, tamper, layer)
    found = fault_found(run)
    assert found.where == "route"
    assert f"layer {layer}:" in str(found)


def test_a_dispatch_that_does_not_fit_its_ids_fails() -> None:
    """A router may hand over the slots sorted already; the experts then read those, so they must be of the ids."""
    run = tiny.built(tiny.moe_layer("experts=grouped"))
    in_router(run, lambda routing: routing._replace(dispatch=dispatch(routing.expert_ids_TK, E)))
    run.verify()
    wrong = tiny.built(tiny.moe_layer("experts=grouped"))
    in_router(wrong, lambda routing: routing._replace(dispatch=dispatch(swapped_ids(routing).expert_ids_TK, E)))
    found = fault_found(wrong)
    assert found.where == "route" and "not sorted by expert" in str(found.clause)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_one_output_fails(model: str, dtype: str) -> None:
    """One element of one token of the last layer."""
    run = tiny.built(config(model, f"dtype={dtype}"))
    layer = layers_of(run)[-1]
    inner = layer.experts

    def faulty(*arguments: Any, **options: Any) -> Tensor:
        y_TD = inner(*arguments, **options)
        y_TD[3, 1] = float("nan")
        return y_TD

    layer.experts = FunctionExperts(faulty)
    assert fault_found(run).where == "layers"
    assert run.verification is not None
    assert run.verification.check.rel_error == float("inf")


def another_rotary_base(model: Any) -> None:
    """Of the run's model alone: the twin has tables of its own."""
    model.ropes[0].theta = 100.0
    model.ropes[0].reserve(tiny.SEQ, torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "break_it"),
    [
        pytest.param("minimal", lambda model: setattr(model.norm, "eps", 0.3), id="eps_of_minimal"),
        pytest.param("transformer_decoder", another_rotary_base, id="rotary_base"),
        pytest.param("decoder_moe", lambda model: setattr(model.norm, "eps", 0.3), id="last_norm"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_outside_the_experts_fails(model: str, break_it: Callable[[Any], None], dtype: str) -> None:
    """The whole model is compared, not only its MoE layers."""
    run = tiny.built(tiny.compose(model, f"dtype={dtype}"))
    break_it(run.built.model)
    assert fault_found(run).where == "layers"


def test_a_fault_that_only_the_measured_execution_has_fails() -> None:
    """The step's own output is compared, not that of another pass of the model."""
    run = tiny.built(tiny.moe_layer())
    ran = run.built.step()
    wrong = ran._replace(y=ran.y * 1.01)
    mismatch = verify(run.built.model, run.built.twin, run.built.x, wrong, run.built.dtype).mismatch
    assert mismatch is not None and mismatch.where == "layers"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fusing_execution_may_round_a_route_and_nothing_more(dtype: str) -> None:
    """A weight off by what the logits may be off passes there alone; a lost weight fails everywhere."""
    run = tiny.built(tiny.moe_layer(f"dtype={dtype}"))
    tolerance = TOLERANCES[run.built.dtype]
    off = tolerance.weight + 0.8 * tolerance.model
    in_router(run, lambda routing: routing._replace(weights_TK=routing.weights_TK + off))
    assert verified(run).mismatch is not None
    assert verified(run, fuses=True).mismatch is None
    for plant, where in ((in_router, "route"), (in_experts, "layers")):
        faulty = tiny.built(tiny.moe_layer(f"dtype={dtype}"))
        plant(faulty, zeroed_weight)
        mismatch = verified(faulty, fuses=True).mismatch
        assert mismatch is not None and mismatch.where == where


@pytest.mark.parametrize("model", MODELS)
def test_an_id_of_no_expert_is_a_mismatch_and_nothing_else_is_claimed(model: str) -> None:
    """The contract is looked at before anything is computed with the routing; what was not measured is None."""
    run = tiny.built(config(model))
    ran = run.built.step()
    wrong = [one._replace(expert_ids_TK=one.expert_ids_TK + 100) for one in ran.routings]
    verification = verify(
        run.built.model, run.built.twin, run.built.x, ran._replace(routings=tuple(wrong)), run.built.dtype
    )
    assert verification.mismatch is not None and "outside" in str(verification.mismatch)
    check = verification.check
    assert check.passed is False
    assert (check.rel_error, check.expert_rel_error, check.near_ties, check.free_rel_error) == (None,) * 4


@pytest.mark.parametrize("model", MODELS)
def test_a_routing_of_too_few_tokens_is_a_mismatch(model: str) -> None:
    """The number of tokens is the input's, not what the routings agree on among themselves."""
    run = tiny.built(config(model))
    ran = run.built.step()
    short = tuple(Routing(one.expert_ids_TK[1:], one.weights_TK[1:]) for one in ran.routings)
    mismatch = verify(
        run.built.model, run.built.twin, run.built.x, ran._replace(routings=short), run.built.dtype
    ).mismatch
    assert mismatch is not None and "must both be" in str(mismatch)


def test_after_a_wrong_route_the_errors_of_the_layers_are_unknown() -> None:
    """Null, not 0, for what the eager pass did not get to."""
    run = tiny.built(tiny.decoder_moe())
    in_router(run, swapped_ids, layer=0)
    check = verified(run).check
    assert (check.expert_rel_error, check.token_rel_error, check.near_ties) == (None, None, None)
    assert check.rel_error is not None


def test_a_model_that_has_no_fp32_reference_is_refused() -> None:
    """Comparing bf16 with itself proves nothing."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 5, dtype=torch.bfloat16)

        def forward(self, ids: Tensor, forced_routing: Any = None) -> Output:
            return Output(self.embed(ids))

    model, ids = Plain(), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"reference pass computes in torch\.bfloat16"):
        verify(model, reference_twin(model), ids, model(ids), torch.bfloat16)


# --- the contract of a router -----------------------------------------------------------------------------------------


def repeated_expert(routing: Routing) -> Routing:
    ids_TK = routing.expert_ids_TK.clone()
    ids_TK[0, 1] = ids_TK[0, 0]
    return routing._replace(expert_ids_TK=ids_TK)


def emptied_slot(routing: Routing) -> Routing:
    ids_TK = routing.expert_ids_TK.clone()
    ids_TK[0, 1] = -1
    return routing._replace(expert_ids_TK=ids_TK)


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(repeated_expert, id="an_expert_twice"),
        pytest.param(emptied_slot, id="weight_without_an_expert"),
        pytest.param(lambda r: r._replace(expert_ids_TK=r.expert_ids_TK.long()), id="int64_ids"),
        pytest.param(lambda r: r._replace(weights_TK=r.weights_TK.double()), id="float64_weights"),
    ],
)
def test_a_router_that_breaks_its_contract_fails_the_route(tamper: Tamper) -> None:
    """Also where the experts could make something of it."""
    run = tiny.built(tiny.moe_layer("experts=loop"))
    in_router(run, tamper)
    found = fault_found(run)
    assert found.where == "route"
    assert "contract" in str(found)


# --- near-ties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_broken_the_other_way_are_counted_and_pass(dtype: str) -> None:
    """All experts tie for every token: each token's set differs from the reference's, and each is a near-tie."""
    run = tiny.built(tiny.moe_layer(f"dtype={dtype}"))
    (layer,) = layers_of(run)
    layer.weights.gate_ED.zero_()
    layer.router = OtherWayRound(layer.router)
    run.verify()
    assert run.verification is not None
    assert run.verification.check.near_ties == T
    assert run.verification.check.changed_sets == T


def test_only_tokens_with_a_tie_at_the_boundary_are_counted() -> None:
    """Two of five experts tie; the others decide for themselves."""
    run = tiny.built(tiny.moe_layer(tokens=60))
    (layer,) = layers_of(run)
    layer.weights.gate_ED[3] = layer.weights.gate_ED[1]
    layer.router = OtherWayRound(layer.router)
    run.verify()
    assert run.verification is not None
    check = run.verification.check
    assert check.near_ties is not None and 0 < check.near_ties < 60
    assert check.near_ties == check.changed_sets


def test_a_lost_weight_in_a_near_tie_fails() -> None:
    """Which of the tied experts was chosen is open; how much weight they get is not."""
    run = tiny.built(tiny.moe_layer())
    (layer,) = layers_of(run)
    layer.weights.gate_ED.zero_()
    layer.router = OtherWayRound(layer.router)
    in_router(run, zeroed_weight)
    assert fault_found(run).where == "route"


# --- logits that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("layer", [pytest.param(index, id=f"layer{index}") for index in range(LAYERS)])
def test_nan_in_a_gate_is_an_error_that_names_the_layer(router: str, layer: int) -> None:
    """A broken checkpoint, say."""
    run = tiny.built(tiny.decoder_moe(f"router={router}"))
    layers_of(run)[layer].weights.gate_ED[2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"layer {layer}: the router's logits"):
        run.verify()


def test_logits_that_a_router_does_not_look_at_are_looked_at_here() -> None:
    """A user's router need not check them, and on CUDA none does."""
    run = tiny.built(tiny.decoder_moe())
    layers_of(run)[1].weights.gate_ED[2, 3] = float("nan")
    for layer in layers_of(run):
        layer.router = Blind(layer.router)
    with pytest.raises(ValueError, match="layer 1: the router's logits"):
        run.verify()


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("high_precision")
def test_every_product_of_the_reference_is_exact() -> None:
    """Each pass of the twin, whole or layer by layer, is made with TF32 off."""
    run, seen = tiny.built(tiny.moe_layer()), []
    layer = moe_layers(run.built.twin)[0]
    inner = layer.experts

    def noting(*arguments: Any, **options: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return inner(*arguments, **options)

    layer.experts = FunctionExperts(noting)
    verified(run)
    assert len(seen) >= 3
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("faulty", [pytest.param(False, id="passed"), pytest.param(True, id="failed")])
def test_no_hooks_are_left_on_the_model(faulty: bool) -> None:
    """What is timed afterwards is the model alone."""
    run = tiny.built(tiny.decoder_moe())
    if faulty:
        in_router(run, another_expert, 0)
    assert (verified(run).mismatch is not None) is faulty
    assert not any(module._forward_hooks for module in run.built.model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "fp16", "bf16")])
def test_a_correct_run_passes_on_cuda_and_a_faulty_one_fails(model: str, router: str, dtype: str) -> None:
    """Every dtype, with the kernels that the GPU has."""
    cfg = config(model, "device=cuda", f"router={router}", f"dtype={dtype}")
    run = tiny.built(cfg)
    run.verify()
    assert run.verification is not None and run.verification.check.passed
    for plant, where in ((in_router, "route"), (in_experts, "layers")):
        faulty = tiny.built(cfg)
        plant(faulty, zeroed_weight)
        assert fault_found(faulty).where == where


LIMITS = {"rel_error": "model", "expert_rel_error": "expert", "token_rel_error": "token", "cache_rel_error": "cache"}


@pytest.mark.parametrize("field", [pytest.param(field, id=name) for field, name in LIMITS.items()])
def test_each_error_has_a_limit_of_its_own(field: str) -> None:
    """At the limit it passes; above it, or not a number, it does not, and the message names it alone."""
    tolerance = Tolerance(model=0.1, expert=0.2, token=0.3, score=0.0, weight=0.0, cache=0.4)
    most = getattr(tolerance, LIMITS[field])
    for error, passes in ((most, True), (None, True), (most * 1.001, False), (math.nan, False), (math.inf, False)):
        result = Verification(dataclasses.replace(nothing_known(), **{field: error}))
        mismatch = judged(result, tolerance, torch.float32).mismatch
        assert result.check.passed is passes is (mismatch is None)
        assert mismatch is None or str(mismatch).endswith(f"{LIMITS[field]} {error:.2e} > {most:.1e}")


@pytest.mark.parametrize(("n_outputs", "most"), [(1, 0.2), (4, 0.1), (10000, 0.05)], ids=str)
def test_the_more_outputs_the_less_they_may_be_off_together(n_outputs: int, most: float) -> None:
    """Down to a quarter of what one may be off."""
    tolerance = Tolerance(model=0.1, expert=0.2, token=0.3, score=0.0, weight=0.0)
    for error, passes in ((0.999 * most, True), (1.001 * most, False), (math.nan, False)):
        result = Verification(dataclasses.replace(nothing_known(), expert_scale_error=error), n_outputs=n_outputs)
        assert judged(result, tolerance, torch.float32).check.passed is passes


@pytest.mark.slow
def test_correct_bf16_runs_stay_below_half_of_what_their_experts_may_be_off_together() -> None:
    """Of few outputs and of many."""
    tolerance = TOLERANCES[torch.bfloat16]
    for seed, tokens in itertools.product(range(8), (1, 3, 37, 199)):
        run = tiny.built(tiny.moe_layer("dtype=bf16", f"seed={seed}", n_experts=8, top_k=2, tokens=tokens))
        result = verified(run)
        assert tokens / 2 < result.n_outputs <= 2.001 * tokens and result.check.expert_scale_error is not None
        assert result.check.expert_scale_error < tolerance.scale(result.n_outputs) / 2


@pytest.mark.parametrize("seed", range(4), ids=str)
def test_one_large_output_counts_as_one(seed: int) -> None:
    """Its largest element is rounded by more than many may be off together, and the run is correct."""
    run = tiny.built(
        tiny.moe_layer("dtype=bf16", f"seed={seed}", n_experts=8, top_k=2, d_model=64, hidden=64, tokens=256)
    )
    (model,), (twin,) = layers_of(run), moe_layers(run.built.twin)
    token_D = run.built.x.view(-1, 64)[0].float()
    for gate_up_FD, down_DF in zip(model.weights.w_gate_up_E2FD, model.weights.w_down_EDF, strict=True):
        gate_up_FD[0] = gate_up_FD[64] = 3 * token_D / token_D.norm()
        down_DF[5, 0] = 20
    run.built.x.view(-1, 64)[0] *= 20
    for name in ("w_gate_up_E2FD", "w_down_EDF"):
        getattr(twin.weights, name).copy_(getattr(model.weights, name))
    result = verified(run)
    assert result.check.passed and result.n_outputs < 4


def test_what_failed_before_stays_the_reason() -> None:
    """Errors within their limits do not make good a route that is wrong."""
    first = MismatchError("route", "planted")
    result = judged(Verification(nothing_known(), first), TOLERANCES[torch.float32], torch.float32)
    assert result.mismatch is first and not result.check.passed


@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
def test_an_id_that_is_too_large_names_the_clause(experts: str, tmp_path: Path) -> None:
    """Before the experts fail of it."""
    run = tiny.built(tiny.decoder_moe(f"experts={experts}"))
    for layer in moe_layers(run.built.model):
        layer.router = Tampering(
            layer.router, lambda routing: routing._replace(expert_ids_TK=routing.expert_ids_TK + E)
        )
    with pytest.raises(
        MismatchError, match="layer 0: the router breaks its contract: an expert id is outside"
    ) as raised:
        run.verify()
    assert raised.value.clause is not None
