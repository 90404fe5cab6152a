"""models/expert_statistics.py: the formulas by hand and in plain Python, over passes of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lab.experts.grouped import Grouped
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models.expert_statistics import IMPORTANCES, ExpertStatistics, gathered
from moe_lab.models.moe_layer import MoELayer
from moe_lab.routers.base import RouteContext, Routing
from moe_lab.routers.softmax_topk import SoftmaxTopK

E, K, D, F = 5, 2, 8, 6


def layer(seed: int = 0, *, scaled: bool = False, n_experts: int = E) -> MoELayer:
    weights = ExpertWeights(n_experts, D, F, scaled=scaled)
    generator = torch.Generator().manual_seed(seed)
    for parameter in weights.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return MoELayer(weights, SoftmaxTopK(n_experts, K, impl="torch", renormalize=True, gate_bias=False), Grouped())


def output(layer: MoELayer, x_D: Tensor, expert: int) -> Tensor:
    """f_j(x) in float64, times the expert's scale where it has one."""
    up, down = (getattr(layer.weights, name)[expert].double() for name in ("w_gate_up_E2FD", "w_down_EDF"))
    gate, value = (up @ x_D.double()).chunk(2)
    scale = 1.0 if layer.weights.scale_E is None else float(layer.weights.scale_E[expert])
    return scale * (down @ (torch.nn.functional.silu(gate) * value))


def test_by_hand() -> None:
    """Three tokens, one slot unused: counts, sums of weights, and REAP with norms 5, 10 and 2 of known outputs."""
    of = layer(n_experts=3)
    norms = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([6.0, 8.0]), 2: torch.tensor([0.0, 2.0])}

    def compute(x_ND: Tensor, routing: Routing) -> Tensor:
        y_ND = torch.zeros(len(x_ND), D)
        for row, expert in enumerate(routing.expert_ids_TK[:, 0].tolist()):
            if expert >= 0:
                y_ND[row, :2] = norms[expert]
        return y_ND

    of.compute = compute  # type: ignore[method-assign]
    statistics = ExpertStatistics(of, norms=True, outputs=True)
    ids = torch.tensor([[0, 1], [0, -1], [1, 0]], dtype=torch.int32)
    statistics.add(torch.zeros(3, D), Routing(ids, torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.75, 0.125]])))
    assert statistics.importance("frequency").tolist() == [3, 2, 0]
    assert statistics.importance("weight").tolist() == [1.625, 1.0, 0]
    assert statistics.importance("reap").tolist() == [1.625 * 5 / 3, 1.0 * 10 / 2, 0]
    assert statistics.mean_outputs()[:, :2].tolist() == [[3, 4], [6, 8], [0, 2]]


@pytest.mark.parametrize("scaled", [pytest.param(False, id="plain"), pytest.param(True, id="experts_with_scales")])
def test_of_a_layer_in_several_passes(scaled: bool) -> None:
    """Over 1, 37 and 6 tokens what the formulas say of all 44, by the layer's own experts."""
    of = layer(3, scaled=scaled)
    passes = [torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (1, 37, 6)]
    with gathered([of], norms=True, outputs=True) as (statistics,):
        for x_TD in passes:
            of(x_TD, RouteContext())
    chosen: list[list[tuple[float, float]]] = [[] for _ in range(E)]
    x_TD = torch.cat(passes)
    routing = of.router.select(of.logits(x_TD))
    for x_D, ids, weights in zip(x_TD, routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), strict=True):
        for expert, weight in zip(ids, weights, strict=True):
            chosen[expert].append((weight, float(output(of, x_D, expert).norm())))
    wanted = {
        "frequency": [len(slots) for slots in chosen],
        "weight": [sum(weight for weight, _ in slots) for slots in chosen],
        "reap": [np.mean([weight * norm for weight, norm in slots]) if slots else 0 for slots in chosen],
    }
    assert wanted.keys() == set(IMPORTANCES)
    for by, values in wanted.items():
        np.testing.assert_allclose(statistics.importance(by), values, rtol=1e-5)
    means = [torch.stack([output(of, x_D, expert) for x_D in x_TD]).mean(0).tolist() for expert in range(E)]
    np.testing.assert_allclose(statistics.mean_outputs(), means, rtol=1e-4, atol=1e-6)
    assert statistics.n_tokens == 44


def test_outside_nothing_is_added() -> None:
    """The hooks are gone."""
    of = layer()
    with gathered([of], norms=False, outputs=False) as (statistics,):
        of(torch.randn(3, D), RouteContext())
    of(torch.randn(3, D), RouteContext())
    assert statistics.n_tokens == 3
