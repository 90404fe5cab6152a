"""routers/contract.py: what every routing must keep, and which experts a routing uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lab.errors import MismatchError
from moe_lab.routers.base import Router, Routing
from moe_lab.routers.contract import changed_sets, check_contract, check_declarations, members, weights_by_expert


def routing(
    ids: list[list[int]],
    weights: list[list[float]],
    id_dtype: torch.dtype = torch.int32,
    weight_dtype: torch.dtype = torch.float32,
) -> Routing:
    return Routing(torch.tensor(ids, dtype=id_dtype), torch.tensor(weights, dtype=weight_dtype))


HALVES = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        pytest.param(routing([[0, 1]], [[0.5, 0.5]]), "must both be", id="too_few_tokens"),
        pytest.param(routing([[0, 1], [1, 2]], [[1.0], [1.0]]), "must both be", id="shapes_differ"),
        pytest.param(Routing(torch.zeros(2, dtype=torch.int32), torch.zeros(2)), "must both be", id="one_dimension"),
        pytest.param(routing([[0, 1], [1, 2]], HALVES, id_dtype=torch.int64), "int64", id="int64_ids"),
        pytest.param(routing([[0, 1], [1, 2]], HALVES, weight_dtype=torch.float64), "float64", id="float64_weights"),
        pytest.param(routing([[0, 1], [1, 2]], HALVES, weight_dtype=torch.bfloat16), "bfloat16", id="bf16_weights"),
        pytest.param(routing([[0, 1], [1, 5]], HALVES), "outside", id="id_of_no_expert"),
        pytest.param(routing([[0, 1], [1, -2]], [[0.5, 0.5], [1.0, 0.0]]), "outside", id="id_below_minus_one"),
        pytest.param(routing([[0, 1], [3, 3]], HALVES), "twice", id="an_expert_twice"),
        pytest.param(routing([[0, 1], [0, 0]], HALVES), "twice", id="the_first_expert_twice"),
        pytest.param(routing([[0, 1], [1, 2]], [[0.5, 0.5], [0.5, float("nan")]]), "NaN", id="nan_weight"),
        pytest.param(routing([[0, 1], [1, 2]], [[0.5, 0.5], [0.5, float("inf")]]), "infinite", id="inf_weight"),
        pytest.param(routing([[0, 1], [1, -1]], HALVES), "unused slot", id="weight_without_an_expert"),
        pytest.param(routing([[0, 1], [1, -1]], [[0.5, 0.5], [1.0, -0.5]]), "unused slot", id="negative_weight_too"),
    ],
)
def test_each_broken_clause_of_the_contract_is_named(broken: Routing, clause: str) -> None:
    """With the layer, as a mismatch of the route."""
    with pytest.raises(MismatchError, match=clause) as caught:
        check_contract(broken, n_tokens=2, n_experts=5, layer=7)
    assert caught.value.where == "route"
    assert "layer 7" in str(caught.value)


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(routing([[0, 1], [4, 2]], HALVES), id="all_slots"),
        pytest.param(routing([[0, -1], [-1, -1]], [[1.0, 0.0], [0.0, 0.0]]), id="unused_slots"),
        pytest.param(routing([[0, 1], [4, 2]], [[2.0, -1.0], [0.0, 0.0]]), id="any_finite_weights"),
    ],
)
def test_a_routing_that_keeps_the_contract_is_let_through(kept: Routing) -> None:
    """Weights need not sum to 1, and slots may be empty."""
    assert check_contract(kept, n_tokens=2, n_experts=5, layer=0) is None


@pytest.mark.parametrize("value", [pytest.param("no", id="text"), pytest.param(1, id="a number")])
def test_a_property_is_true_or_false_or_left_open(value: Any) -> None:
    """A text would count as declared, whatever it says."""
    router = Router(4, 2)
    check_declarations(router)
    router.causal = value
    with pytest.raises(ValueError, match=rf"^router: Router\.causal={value!r}: must be True, False or None"):
        check_declarations(router)


def test_members_and_weights_are_spread_over_the_experts() -> None:
    """In any order of the slots; an unused slot (-1) is no expert's."""
    spread = routing([[3, 0], [-1, 1], [-1, -1]], [[0.75, 0.25], [0.0, 2.0], [0.0, 0.0]])
    used = [[True, False, False, True], [False, True, False, False], [False] * 4]
    assert members(spread.expert_ids_TK, 4).tolist() == used
    weights = [[0.25, 0, 0, 0.75], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert weights_by_expert(spread, 4).tolist() == weights


def test_no_tokens_use_no_experts() -> None:
    """The shapes stay."""
    empty = Routing(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    assert members(empty.expert_ids_TK, 4).shape == weights_by_expert(empty, 4).shape == (0, 4)
    assert changed_sets([empty], [empty], [4]) == 0


def test_changed_sets_counts_layers_and_tokens() -> None:
    """Pairs of (layer, token); slots in another order are the same set."""
    one = routing([[0, 1], [2, -1]], [[0.5, 0.5], [1.0, 0.0]])
    same = routing([[1, 0], [-1, 2]], [[0.5, 0.5], [0.0, 1.0]])
    other = routing([[0, 2], [2, 3]], HALVES)
    assert changed_sets([one, one], [same, same], [5, 5]) == 0
    assert changed_sets([one, one], [same, other], [5, 5]) == 2
