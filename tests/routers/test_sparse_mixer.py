"""routers/sparse_mixer.py: the formula in float64, and the function of transformers."""

from __future__ import annotations

import math

import pytest
import torch

from tests.routers.cases import make


def rederived(logits: list[float], k: int, eps: float) -> tuple[list[int], list[float]]:
    """One token, in Python's floats."""
    ids: list[int] = []
    weights = []
    for _ in range(k):
        left = [e for e in range(len(logits)) if e not in ids]
        best = max(left, key=lambda e: (logits[e], -e))
        near = [
            e
            for e in left
            if logits[best] == logits[e] or (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * eps
        ]
        weights.append(1 / sum(math.exp(logits[e] - logits[best]) for e in near))
        ids.append(best)
    return ids, weights


@pytest.mark.parametrize("k", [pytest.param(k, id=f"k={k}") for k in (1, 2, 3, 7)])
@pytest.mark.parametrize("eps", [pytest.param(eps, id=f"eps={eps}") for eps in (0.0, 0.01, 0.2, 5.0)])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199)])
def test_it_is_its_formula(T: int, eps: float, k: int) -> None:
    """For few and many experts near the best, positive and negative ones."""
    E = 7
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T), dtype=torch.float32)
    router = make("sparse_mixer", E, k, jitter_eps=eps)
    routing = router.select(logits_TE)
    assert routing.expert_ids_TK.shape == (T, k)
    for t, row in enumerate(logits_TE.tolist()):
        ids, weights = rederived(row, k, eps)
        assert routing.expert_ids_TK[t].tolist() == ids
        assert routing.weights_TK[t].tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("eps", [pytest.param(eps, id=f"eps={eps}") for eps in (0.0, 0.01, 0.3)])
def test_it_is_transformers_function(eps: float) -> None:
    """Weights and experts of its module in evaluation."""
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits_TE = torch.randn(199, 8, generator=torch.Generator().manual_seed(0))
    weights_TK, ids_TK = modeling.sparsemixer(logits_TE, jitter_eps=eps, training=False)
    routing = make("sparse_mixer", 8, 2, jitter_eps=eps).select(logits_TE)
    assert torch.equal(routing.expert_ids_TK.long(), ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK)


def test_equal_logits_go_to_the_lowest_ids_and_share_the_weight() -> None:
    """All of them are rivals, and fewer are left for the second."""
    routing = make("sparse_mixer", 4, 2).select(torch.zeros(1, 4))
    assert routing.expert_ids_TK.tolist() == [[0, 1]]
    assert routing.weights_TK.tolist() == [pytest.approx([1 / 4, 1 / 3])]


def test_an_unused_slot_weighs_nothing_and_takes_no_expert_away() -> None:
    """As verification may ask."""
    router, logits_TE = make("sparse_mixer", 4, 2), torch.tensor([[1.0, 1.0, -5.0, -5.0]])
    weights_TK = router.weigh(logits_TE, torch.tensor([[-1, 0]], dtype=torch.int32))
    assert weights_TK.tolist() == [pytest.approx([0.0, 0.5])]


@pytest.mark.parametrize("eps", [pytest.param(eps, id=str(eps)) for eps in (-0.1, math.nan, math.inf)])
def test_a_share_that_is_none_is_refused(eps: float) -> None:
    """By its key."""
    with pytest.raises(ValueError, match=r"router\.jitter_eps=.*: must be at least 0"):
        make("sparse_mixer", 4, 2, jitter_eps=eps)
