"""routers/soft.py: every token with every expert. The layer that it asks for: tests/models/test_soft_moe.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lab.routers.base import RouteContext
from moe_lab.routers.capacity import POLICIES
from tests import tiny
from tests.routers.cases import make


def random_logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E), dtype=torch.float64).to(dtype) * 3


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize(
    ("T", "E"),
    [
        pytest.param(0, 5, id="T=0"),
        pytest.param(1, 7, id="T=1"),
        pytest.param(37, 1, id="E=1"),
        pytest.param(199, 33, id="T=199"),
    ],
)
def test_the_weights_are_the_softmax_over_all_experts(T: int, E: int, dtype: torch.dtype) -> None:
    """Computed in float32 whatever the logits' dtype; the ids are 0 to E - 1 in every row."""
    logits_TE = random_logits(T, E, dtype)
    routing = make("soft", E, 1).select(logits_TE)
    assert routing.expert_ids_TK.tolist() == [list(range(E))] * T
    torch.testing.assert_close(routing.weights_TK.double(), logits_TE.double().softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [pytest.param(k, id=f"k={k}") for k in (1, 2, 5)])
def test_k_is_the_number_of_experts_whatever_the_model_says(top_k: int) -> None:
    """What stands as top_k and what the routing has agree."""
    router = make("soft", 5, top_k)
    assert router.top_k == router.select(random_logits(3, 5)).expert_ids_TK.shape[1] == 5


def test_its_scores_are_the_logits() -> None:
    """When asked for, in float32; the chosen are all of them."""
    logits_TE = random_logits(37, 7, torch.bfloat16)
    scores_TE = make("soft", 7, 2).select(logits_TE, RouteContext(want_scores=True)).scores_TE
    assert scores_TE is not None and torch.equal(scores_TE, logits_TE.float())


def test_some_of_the_experts_weigh_what_they_weigh_among_all() -> None:
    """`weigh` takes any ids in any order, and an unused slot weighs nothing."""
    logits_TE = random_logits(2, 5)
    weights_TK = make("soft", 5, 2).weigh(logits_TE, torch.tensor([[4, 0, -1], [-1, -1, 2]], dtype=torch.int32))
    p_TE = logits_TE.softmax(-1)
    expected_TK = torch.stack([p_TE[0, [4, 0, 0]], p_TE[1, [2, 2, 2]]]) * torch.tensor([[1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(weights_TK, expected_TK)


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (math.nan, math.inf, -math.inf)])
def test_logits_that_are_not_finite_name_their_layer(value: float) -> None:
    """A masked expert too: the softmax over its tokens would be NaN."""
    logits_TE = random_logits(3, 5)
    logits_TE[1, 2] = value
    with pytest.raises(ValueError, match=r"layer 13\b.*1 of 3 tokens"):
        make("soft", 5, 2).select(logits_TE, RouteContext(layer=13))


def test_what_the_load_is_the_load_of_is_said() -> None:
    """Every row has the warning, for its metrics count slots that no expert computes."""
    for n_tokens in (1, 37):
        (warning,) = make("soft", 5, 2).warnings(n_tokens)
        assert "one row per sequence and expert" in warning


@pytest.mark.parametrize("policy", [pytest.param(policy, id=policy) for policy in POLICIES])
def test_a_capacity_around_it_is_refused(policy: str) -> None:
    """It would be an MoE layer of another kind, with every token in every expert."""
    with pytest.raises(ValueError, match=r"router\.inner.*wrap another router"):
        make("capacity", 5, 2, inner=make("soft", 5, 2), policy=policy)


def test_a_k_of_ones_own_is_refused() -> None:
    """router.top_k would change nothing."""
    with pytest.raises(ValueError, match=r"router\.top_k=1.*remove router\.top_k"):
        tiny.built(tiny.decoder_moe("router=soft", "router.top_k=1"))
