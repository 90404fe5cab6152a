"""models/router_only.py: what a router alone gives, sorted slots, verification and its faults, a run and a sweep."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.errors import MismatchError
from moe_lab.models.router_only import RouterModel
from moe_lab.ops import cxx, extension
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.contract import check_contract
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs.verify import verify
from tests import tiny
from tests.routers.cases import SCORED, make
from tests.sweep import faulty

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
IMPLEMENTATION = pytest.mark.parametrize(
    "impl", [pytest.param("torch", id="torch"), pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx)]
)


def model_of(new_router: Callable[..., Router], impl: str, *, sort: bool = False, gate: bool = False) -> RouterModel:
    """A router of 12 experts, k = 3, and where there is a gate of width 32."""
    shape = {"n_experts": 12, "top_k": 3, "d_model": 32}
    return RouterModel(
        make_router=lambda E, K: new_router(E, K, impl=impl).compute_on(torch.device("cpu")),
        shape=shape,
        gate=gate,
        sort=sort,
    )


def logits(T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E))


@IMPLEMENTATION
@pytest.mark.parametrize("sort", [pytest.param(False, id="route"), pytest.param(True, id="route and sort")])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199)])
def test_the_model_is_the_routers_selection(T: int, sort: bool, impl: str) -> None:
    """The weights are the output; with `sort` the slots are sorted, by the router or after it."""
    model = model_of(partial(make, "mixtral"), impl, sort=sort)
    x_TE = logits(*model.input_shape(1, T))
    output = model(x_TE)
    (routing,) = output.routings
    wanted = make("torch", 12, 3).select(x_TE, RouteContext())
    assert torch.equal(routing.expert_ids_TK, wanted.expert_ids_TK) and torch.equal(output.y, routing.weights_TK)
    torch.testing.assert_close(output.y, wanted.weights_TK)
    assert (routing.dispatch is not None) == sort
    if routing.dispatch is not None:
        for found, expected in zip(routing.dispatch, dispatch(wanted.expert_ids_TK, 12), strict=True):
            assert torch.equal(found, expected)


@IMPLEMENTATION
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37)])
def test_with_a_gate_its_product_is_part_of_it(T: int, impl: str) -> None:
    """The selection of x times the gate."""
    model = model_of(partial(make, "mixtral"), impl, gate=True)
    gate_ED = model.moe.weights.gate_ED
    gate_ED.data.copy_(logits(12, 32))
    x_TD = logits(*model.input_shape(1, T))
    output = model(x_TD)
    wanted = make("torch", 12, 3).select(x_TD @ gate_ED.t())
    assert torch.equal(output.routings[0].expert_ids_TK, wanted.expert_ids_TK)
    torch.testing.assert_close(output.y, wanted.weights_TK)
    assert not model.moe.multiplies_gate(x_TD)


@pytest.mark.parametrize("sort", [pytest.param(True, id="sorts"), pytest.param(False, id="does not sort")])
def test_it_names_the_extension_where_that_sorts(sort: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked to sort, and the extension takes so many experts."""
    model, x_TE = model_of(partial(make, "mixtral"), "torch", sort=sort), logits(37, 8)
    assert model.moe.experts.implementation(x_TE, model.moe.weights) == {"experts": "none"}
    asked: list[int] = []
    monkeypatch.setattr(extension, "sorts", lambda device, n_experts: not asked.append(n_experts))  # type: ignore[func-returns-value]
    expected = {"dispatch": "cuda_ext:cpp"} if sort else {}
    assert model.moe.experts.implementation(x_TE, model.moe.weights) == {"experts": "none"} | expected
    assert asked == [model.moe.weights.n_experts] * sort


@pytest.mark.gpu
def test_a_run_names_who_multiplied_by_the_gate(tmp_path: Path) -> None:
    """The router's own kernels for few tokens, else nobody is named."""
    for seq_len, gate in ((16, True), (64, False)):
        changes = ["model=router", "router=cuda_ext", "model.gate=true", "device=cuda", "dtype=bf16"]
        cfg = moe_lab.compose([*changes, "batch=1", f"seq_len={seq_len}", "measure.max_time_s=0.1"])
        record = moe_lab.run(cfg, tmp_path / str(seq_len))
        assert (record.status, record.reason) == ("ok", None)
        expected = extension.label(torch.device("cuda", 0))
        assert record.implementation == {"router": expected, "experts": "none"} | ({"gate": expected} if gate else {})


class Swapping(SoftmaxTopK):
    """Names the experts of the first two slots in the wrong order."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        return routing._replace(expert_ids_TK=routing.expert_ids_TK.flip(-1))


class Missorting(SoftmaxTopK):
    """Gives the slots as sorted that are not."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        order = dispatch(routing.expert_ids_TK, self.n_experts)
        return routing._replace(dispatch=order._replace(perm_N=order.perm_N.flip(0)))


def test_a_wrong_router_is_found_out() -> None:
    """Weights that go to other experts, and slots in another order."""
    x_TE = logits(37, 12)
    twin = model_of(partial(make, "mixtral"), "torch")
    right = verify(twin, twin, x_TE, twin(x_TE), torch.float32)
    assert right.mismatch is None and right.check.passed
    for fault, clause in ((Swapping, "a routing weight"), (Missorting, "are not sorted by expert")):
        model = model_of(partial(fault, **tiny.keys_of("router", "torch")), "torch", sort=True)
        found = verify(model, twin, x_TE, model(x_TE), torch.float32)
        assert found.mismatch is not None and clause in str(found.mismatch)


@pytest.mark.parametrize("field", [pytest.param(f, id=f) for f in ("counts_E", "offsets_E1", "perm_N", "inverse_N")])
def test_every_part_of_a_dispatch_is_checked(field: str) -> None:
    """One number off is enough."""
    routing = make("torch", 12, 3).select(logits(37, 12))
    order = dispatch(routing.expert_ids_TK, 12)
    check_contract(routing._replace(dispatch=order), 37, 12, 0)
    wrong = getattr(order, field).clone()
    wrong[-1] += 1
    with pytest.raises(MismatchError, match="are not sorted by expert"):
        check_contract(routing._replace(dispatch=order._replace(**{field: wrong})), 37, 12, 0)


@IMPLEMENTATION
def test_a_run_is_verified_and_measured(impl: str, tmp_path: Path) -> None:
    """Grouped scores: ok, by whom it was asked for, without experts; logits and bias read, five arrays written."""
    changes = ["model=router", "router=deepseek_v3", f"router.impl={impl}", "model.shape.n_experts=64"]
    changes += ["model.sort=true", "device=cpu", "batch=1", "seq_len=37", "measure.max_time_s=0.1"]
    cfg = moe_lab.compose(changes)
    record = moe_lab.run(cfg, tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert record.implementation == {"router": {"cuda_ext": "cuda_ext:cpp"}.get(impl, impl), "experts": "none"}
    assert record.routing is not None and record.routing["pooled"]["unused_slots_fraction"] == 0
    assert record.roofline is not None and record.roofline["bytes"] == 4 * (37 * 64 + 64 + 4 * 37 * 8 + 64 + 65)


@needs_cxx
@pytest.mark.slow
def test_the_experiment_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """With the device and the execution said otherwise; two of the shapes."""
    changes = ["router=torch,cuda_ext", "experiment=router_kernels", "device=cpu", "execution=eager"]
    changes += ["measure.cache=natural"]
    changes += ["seq_len=37", "model/shape=mixtral_8x7b,olmoe_1b_7b", "sweep.report=false", "measure.max_time_s=0.05"]
    done = subprocess.run([*faulty.MOE_LAB, "-m", *changes], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = faulty.records_list(tmp_path, "router_kernels")
    shapes = [r.config["model"]["shape"] for r in records if r.status == "ok"]
    assert sorted((shape["n_experts"], shape["top_k"]) for shape in shapes) == [(8, 2), (8, 2), (64, 8), (64, 8)]


def test_bias_of_a_scored_router_stays_out_of_the_output() -> None:
    """The output is what the experts would be weighed by."""
    model = model_of(partial(SCORED, bias=True), "auto")
    model.moe.router.bias_E.data = torch.linspace(-1, 1, 12)
    x_TE = logits(37, 12)
    y_TK, (routing,) = model(x_TE)
    chosen_TK = x_TE.sigmoid().gather(-1, routing.expert_ids_TK.long())
    torch.testing.assert_close(y_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True))


def test_it_is_listed_and_composes() -> None:
    """Experts are nothing to it."""
    assert moe_lab.compose(["model=router"]).model.ignores == ["experts"]
