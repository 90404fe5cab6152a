"""runs/allocate.py: distances against the formula, and the search against every list."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.runs import build
from moe_lab.runs.allocate import allocate, sensitivity
from moe_lab.workloads import text
from tests import quick, tiny

CPU = torch.device("cpu")
TEXT = ["router=native", "workload=text", f"workload.path={quick.TEXTS}", "seq_len=32", "batch=3"]


def by_hand(layer: MoELayer, x_TD: Tensor, k: int) -> Tensor:
    """softmax over the k largest logits, and SwiGLU experts, in float64."""
    w = layer.weights
    logits_TE = x_TD.double() @ w.gate_ED.double().T
    values_TK, ids_TK = logits_TE.topk(k, dim=-1)
    y_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(ids_TK, values_TK.softmax(-1), strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            gate, up = (w.w_gate_up_E2FD[e].double() @ x_TD[t].double()).chunk(2)
            y_TD[t] += weight * (w.w_down_EDF[e].double() @ (torch.nn.functional.silu(gate) * up))
    return y_TD


def test_the_distance_on_noise_is_the_formula() -> None:
    """Of every layer and k, and the norm of the output itself."""
    cfg = tiny.decoder_moe("model.top_k=3", "seed=4", "router=mixtral", "model.n_dense_layers=1", "model.n_layers=3")
    found = sensitivity(cfg, 37)
    assert (found.layers, found.tokens, found.left_out) == ([1, 2], 37, ())
    x_TD = torch.randn(37, tiny.D, generator=torch.Generator().manual_seed(4))
    for layer, norm, distances in zip(moe_layers(build.build_model(cfg)), found.norm_L, found.distance_LK, strict=True):
        y_TD = by_hand(layer, x_TD, 3)
        assert norm == pytest.approx(float(y_TD.norm()), rel=1e-4)
        expected = [float((by_hand(layer, x_TD, k) - y_TD).norm()) for k in (1, 2)]
        assert distances[:2] == pytest.approx(expected, rel=1e-4) and distances[2] == 0
    assert found.lost_LK[1][0] == pytest.approx((found.distance_LK[1][0] / found.norm_L[1]) ** 2)
    assert found._replace(norm_L=[0.0, 1.0], distance_LK=[[0.0, 0.0]] * 2).lost_LK[0] == [0, 0]  # of experts that are 0


def test_the_distance_on_text_is_what_a_model_with_fewer_in_that_layer_has() -> None:
    """The layers before it have all of theirs, so the layer reads what it reads in the model itself."""
    cfg = tiny.compose("checkpoint", *TEXT)
    found = sensitivity(cfg, 160)
    assert found.tokens == 160
    model = build.build_model(cfg)
    domains = text.read_domains(cfg.workload.path, 256, None)
    ids_WS = text.windows(domains, 32, 5, int(cfg.seed)).ids_WS

    def outputs(overrides: list[str], index: int) -> Tensor:
        changed = build.build_model(tiny.compose("checkpoint", *TEXT, *overrides), CPU, shareable(model))
        seen: list[Tensor] = []

        def look(_: Any, __: Any, result: Any) -> None:
            seen.append(result[0])

        with hooked([moe_layers(changed)[index]], look):
            changed(ids_WS)
        return seen[0].double()

    for index in range(4):
        ks = [1 if layer == index else 2 for layer in range(4)]
        distance = outputs([f"model.top_k=[{','.join(map(str, ks))}]"], index) - outputs([], index)
        assert found.distance_LK[index] == pytest.approx([float(distance.norm()), 0], rel=1e-4)


def test_the_list_is_the_best_of_all() -> None:
    """Every list within the budget, for costs of any shape; a tie has the least sum all the same."""
    draw = random.Random(3)
    for _ in range(200):
        L, K = draw.randint(1, 4), draw.randint(1, 4)
        cost_LK = [[draw.choice([0.0, 0.5, draw.random()]) for _ in range(K)] for _ in range(L)]
        budget = draw.randint(L, L * K + 2)
        ks = allocate(cost_LK, budget)
        assert len(ks) == L and sum(ks) <= budget and all(1 <= k <= K for k in ks)
        least = min(
            sum(costs[k - 1] for costs, k in zip(cost_LK, every, strict=True))
            for every in itertools.product(range(1, K + 1), repeat=L)
            if sum(every) <= budget
        )
        assert sum(costs[k - 1] for costs, k in zip(cost_LK, ks, strict=True)) == pytest.approx(least)


def test_experts_go_where_they_matter() -> None:
    """By hand: one expert to spare, and the second layer loses most without it."""
    assert allocate([[3.0, 0.0], [5.0, 0.0], [4.0, 0.0]], 4) == [1, 2, 1]
    assert allocate([[3.0, 1.0, 0.0], [5.0, 4.0, 0.0]], 4) == [1, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["router=switch"], "router.top_k=1: the router has its own", id="own-k"),
        pytest.param(["model.top_k=[2,1]"], "is what is looked for; remove it", id="list"),
        pytest.param(["router=hash"], "router=hash: reads token ids, and noise has none", id="ids"),
        pytest.param(["model.n_dense_layers=2"], "has no list of MoE layers", id="dense"),
    ],
)
def test_what_has_no_list_is_refused(overrides: list[str], message: str) -> None:
    """One line with the key."""
    with pytest.raises(ValueError) as raised:
        sensitivity(tiny.decoder_moe(*overrides), 8)
    assert message in str(raised.value)


def test_a_budget_below_one_expert_each_is_refused() -> None:
    """No layer can have none."""
    with pytest.raises(ValueError, match="budget=1: must be >= 2"):
        allocate([[1.0, 0.0]] * 2, 1)
