"""routing_sums: the kernel against the reference, and both against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lab.ops.routing_sums import NAMES, RoutingSums, first_tokens, routing_sums

IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [pytest.param("torch", id="torch"), pytest.param("triton", id="triton")]
)
SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 1, 1, id="one of all"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(37, 12, 0, id="no slots"),
        pytest.param(199, 33, 4, id="several programs"),
        pytest.param(9, 300, 2, id="many experts"),
        pytest.param(70, 64, 8, id="olmoe"),
    ],
)


def operands(T: int, E: int, K: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random logits, ids of which a fifth is unused, weights, and three sequences."""
    generator = torch.Generator().manual_seed(T + E)
    logits_TE = 2 * torch.randn(T, E, generator=generator)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].int()
    ids_TK = ids_TK.masked_fill(torch.rand(T, K, generator=generator) < 0.2, -1)
    weights_TK = torch.rand(T, K, generator=generator).masked_fill(ids_TK < 0, 0.0)
    starts = torch.tensor([0, T // 3, T // 2, T], dtype=torch.int32) if T > 2 else None
    first_T = first_tokens(T, starts, torch.device("cpu"))
    return logits_TE.to(device), ids_TK.to(device), weights_TK.to(device), first_T.to(device)


def by_loops(logits_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, first_T: Tensor) -> tuple[Tensor, Tensor, dict]:
    """The same sums, token by token in float64."""
    (T, E), K = logits_TE.shape, ids_TK.shape[1]
    p_TE = logits_TE.double().softmax(-1)
    pairs_EE, sums = torch.zeros(E, E), dict.fromkeys(NAMES, 0.0)
    before: tuple[set[int], int] = set(), -1
    for t in range(T):
        used = [int(e) for e in ids_TK[t] if e >= 0]
        best = max(used, key=lambda e: float(weights_TK[t][ids_TK[t] == e]), default=-1)
        for one in used:
            for other in used:
                pairs_EE[one, other] += 1
        p = sorted(p_TE[t].tolist(), reverse=True)
        sums["z_loss"] += float(logits_TE[t].double().logsumexp(-1)) ** 2
        sums["token_entropy"] -= sum(x * math.log(x) for x in p if x)
        sums["top1_prob"] += p[0]
        sums["top1_margin"] += p[0] - p[1] if E > 1 else 0
        sums["boundary_margin"] += p[K - 1] - p[K] if 0 < K < E else 0
        sums["topk_mass"] += sum(float(p_TE[t, e]) for e in used)
        sums["unrouted"] += not used
        if not first_T[t]:
            sums["followers"] += 1
            sums["followed_slots"] += len(used)
            sums["shared_slots"] += len(set(used) & before[0])
            sums["repeats"] += best >= 0 and best == before[1]
        before = set(used), best
    return pairs_EE, p_TE.sum(0), sums


@pytest.mark.thinned(2, empty=("T=0", "no slots"))
@IMPLEMENTATIONS
@SIZES
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_sums_are_those_of_a_loop_over_the_tokens(
    implementation: str, T: int, E: int, K: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Counts to the last one, the rest up to fp32."""
    logits_TE, ids_TK, weights_TK, first_T = operands(T, E, K, device)
    logits_TE = logits_TE.to(dtype)
    found = routing_sums(logits_TE, ids_TK, weights_TK, first_T, implementation)
    pairs_EE, prob_E, sums = by_loops(logits_TE.cpu(), ids_TK.cpu(), weights_TK.cpu(), first_T.cpu())
    assert torch.equal(found.pairs_EE.cpu(), pairs_EE)
    torch.testing.assert_close(found.prob_E.cpu(), prob_E, rtol=1e-5, atol=1e-5)
    for name, value in zip(NAMES, found.sums.tolist(), strict=True):
        assert value == pytest.approx(float(sums[name]), rel=1e-5, abs=1e-5), name


@IMPLEMENTATIONS
def test_masked_experts_have_no_probability(implementation: str, device: torch.device) -> None:
    """A logit of -inf is 0 in every sum, not NaN."""
    logits_TE = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, -math.inf, 3.0]], device=device)
    ids_TK = torch.tensor([[2, 0], [2, 1]], dtype=torch.int32, device=device)
    first_T = first_tokens(2, None, device)
    found = routing_sums(logits_TE, ids_TK, torch.ones(2, 2, device=device), first_T, implementation)
    sums = dict(zip(NAMES, found.sums.tolist(), strict=True))
    assert all(math.isfinite(value) for value in sums.values())
    assert found.prob_E[1] == 0
    assert sums["topk_mass"] == pytest.approx(2.0)
    assert (sums["shared_slots"], sums["repeats"], sums["followers"]) == (1, 1, 1)


def test_the_first_token_follows_nobody() -> None:
    """One sequence without starts; none without tokens; an empty sequence begins where the next does."""
    cpu = torch.device("cpu")
    assert first_tokens(3, None, cpu).tolist() == [True, False, False]
    assert first_tokens(4, torch.tensor([0, 2, 2, 4]), cpu).tolist() == [True, False, True, False]
    assert first_tokens(4, torch.tensor([0, 4, 4]), cpu).tolist() == [True, False, False, False]
    assert first_tokens(3, torch.tensor([1, 3]), cpu).tolist() == [True, True, False]
    assert first_tokens(0, torch.tensor([0, 0]), cpu).tolist() == []


@pytest.mark.gpu
@SIZES
def test_nothing_is_read_on_the_host(T: int, E: int, K: int, device: torch.device) -> None:
    """No synchronisation: the sums are ready when the device gets there."""
    where = operands(T, E, K, device)
    routing_sums(*where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found: RoutingSums = routing_sums(*where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(found.pairs_EE.diagonal().sum()) == int((where[1] >= 0).sum())
