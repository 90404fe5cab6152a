"""routers/balancing_bias.py: a bias fitted to even out a load, then frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.ops import cxx
from moe_lab.routers.base import RouteContext
from tests.routers.cases import make

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
ROUTERS = pytest.mark.parametrize(
    "option", [pytest.param("loss_free", id="loss-free"), pytest.param("quantile", id="quantile")]
)


def skewed(T: int, E: int, seed: int = 0) -> Tensor:
    """Seeded logits that favour the first experts."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) - torch.arange(E) * 2 / E


def most_over_mean(ids_TK: Tensor, E: int) -> float:
    return float(ids_TK.flatten().bincount(minlength=E).max()) * E / ids_TK.numel()


@ROUTERS
@pytest.mark.parametrize(("E", "K"), [pytest.param(8, 1, id="k=1"), pytest.param(13, 3, id="k=3")])
def test_the_load_of_the_calibration_becomes_even_and_that_of_its_like_nearly(option: str, E: int, K: int) -> None:
    """From twice the mean to under 1.1; on other tokens of the same kind under 1.35."""
    router = make(option, E, K)
    native = most_over_mean(make("mixtral", E, K).select(skewed(2048, E)).expert_ids_TK, E)
    router.fit(skewed(2048, E))
    assert native > 1.7
    assert most_over_mean(router.select(skewed(2048, E)).expert_ids_TK, E) < 1.1
    assert most_over_mean(router.select(skewed(2048, E, seed=1)).expert_ids_TK, E) < 1.35


@ROUTERS
def test_before_the_fit_it_is_the_plain_top_k(option: str) -> None:
    """The bias is 0; it never weighs, before or after."""
    router, logits_TE = make(option, 7, 2), skewed(37, 7)
    plain = make("mixtral", 7, 2).select(logits_TE)
    assert torch.equal(router.select(logits_TE).expert_ids_TK, plain.expert_ids_TK)
    before = router.weigh(logits_TE, plain.expert_ids_TK)
    router.fit(logits_TE)
    assert float(router.bias_E.abs().max()) > 0
    assert torch.equal(router.weigh(logits_TE, plain.expert_ids_TK), before)
    torch.testing.assert_close(before.sum(-1), torch.ones(37))


def test_the_loss_free_bias_moves_by_the_sign_of_the_load() -> None:
    """By hand: two steps of 0.1 on four tokens that all want expert 0 of three; then the load is as even as it gets."""
    logits_TE = torch.tensor([[1.0, 0.9, 0.0]] * 4)
    router = make("loss_free", 3, 1, steps=1, rate=0.5)
    router.fit(logits_TE)
    assert router.bias_E.tolist() == [0.0, 0.0, 0.0]  # all to expert 1 is no better than all to expert 0
    router = make("loss_free", 2, 1, steps=1, rate=0.05)
    router.fit(torch.tensor([[0.1, 0.0], [3.0, 0.0]]))
    assert router.bias_E.tolist() == pytest.approx([-0.05, 0.05])
    assert router.select(torch.tensor([[0.1, 0.0], [3.0, 0.0]])).expert_ids_TK.tolist() == [[1], [0]]


@ROUTERS
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [pytest.param(0, 5, 2, id="T=0"), pytest.param(1, 5, 2, id="T=1"), pytest.param(9, 4, 4, id="k=E")],
)
def test_degenerate_calibrations_give_finite_biases(option: str, T: int, E: int, K: int) -> None:
    """Nothing to even out, and nothing breaks."""
    router = make(option, E, K)
    router.fit(skewed(T, E))
    assert bool(router.bias_E.isfinite().all())


@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx), "triton"])
def test_kernels_choose_by_the_fitted_bias(impl: str, device: torch.device) -> None:
    """As the torch router of the same bias."""
    logits_TE = skewed(199, 12).to(device)
    with torch.device(device):
        routers = [make("loss_free", 12, 3, impl=name, steps=20).compute_on(device) for name in ("torch", impl)]
    for router in routers:
        router.fit(logits_TE)
    expected, found = (router.select(logits_TE, RouteContext(want_scores=True)) for router in routers)
    assert routers[1].implementation().startswith(impl) and float(routers[1].bias_E.abs().max()) > 0
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK)
    assert torch.equal(found.scores_TE, expected.scores_TE)


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(37, 6, 2, id="broken-share"),
        pytest.param(36, 6, 2, id="whole-share"),
        pytest.param(3, 8, 2, id="share-below-one"),
        pytest.param(9, 4, 3, id="k=E-1"),
    ],
)
def test_the_quantile_bias_is_that_of_the_formula(T: int, E: int, K: int) -> None:
    """In turn: alpha the (k + 1)-th largest of a token, -b the (T k / E + 1)-th largest of an expert; by sorting."""
    logits_TE = skewed(T, E)
    router = make("quantile", E, K, steps=3)
    router.fit(logits_TE)
    bias_E = [0.0] * E
    rows = logits_TE.tolist()
    for _ in range(3):
        alpha_T = [sorted((logit + b for logit, b in zip(row, bias_E, strict=True)), reverse=True)[K] for row in rows]
        less_ET = [[row[e] - alpha for row, alpha in zip(rows, alpha_T, strict=True)] for e in range(E)]
        bias_E = [-sorted(less_T, reverse=True)[T * K // E] for less_T in less_ET]
    assert router.bias_E.tolist() == pytest.approx(bias_E, abs=1e-5)


def test_unlikely_experts_share_their_weight_as_likely_ones_do() -> None:
    """Sigmoids of -12 are small, and sum to 1 all the same."""
    weights_TK = make("loss_free", 4, 2).select(torch.tensor([[-12.0, -12.0, -30.0, -30.0]])).weights_TK
    assert weights_TK[0].tolist() == pytest.approx([0.5, 0.5])
