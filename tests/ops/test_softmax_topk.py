"""top_k and weights_of: order, ties, extreme values, weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops.softmax_topk import top_k, weights_of

SIZES = pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(37, 5, 5, id="small, k=E"),
        pytest.param(585, 7, 2, id="4095 scores"),
        pytest.param(1, 4096, 8, id="4096 scores in one row"),
        pytest.param(199, 65, 6, id="large"),
        pytest.param(819, 12, 12, id="large, k=E"),
        pytest.param(4099, 1, 1, id="large, E=1"),
    ],
)


def normal(T: int, E: int) -> Tensor:
    """Seeded scores without ties."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E))


def few_levels(T: int, E: int) -> Tensor:
    """Seeded scores of three values: ties everywhere."""
    return torch.randint(-1, 2, (T, E), generator=torch.Generator().manual_seed(T + E)).float()


def expected_ids(scores_TE: Tensor, k: int) -> list[list[int]]:
    """The k first of a stable sort by falling score, by numpy."""
    return np.argsort(-scores_TE.double().numpy(), axis=-1, kind="stable")[:, :k].tolist()


@SIZES
@pytest.mark.parametrize("scores", [pytest.param(normal, id="no ties"), pytest.param(few_levels, id="ties")])
def test_the_largest_come_first_and_ties_go_to_the_lowest_id(
    scores: Callable[[int, int], Tensor], T: int, E: int, k: int
) -> None:
    """Both the sorting path (below 4096 scores) and the topk path equal a stable sort."""
    scores_TE = scores(T, E)
    ids_TK = top_k(scores_TE, k)
    assert ids_TK.dtype == torch.int32 and ids_TK.shape == (T, k)
    assert ids_TK.tolist() == expected_ids(scores_TE, k)


@pytest.mark.parametrize("repeats", [pytest.param(1, id="sorting path"), pytest.param(4096, id="topk path")])
@settings(max_examples=40, deadline=None, database=None)
@given(
    row=st.lists(st.sampled_from([-np.inf, -3e4, -1.0, -0.0, 0.0, 1e-40, 1.0, 3e4]), min_size=1, max_size=12),
    data=st.data(),
)
def test_any_row_of_few_values_is_sorted_stably(repeats: int, row: list[float], data: st.DataObject) -> None:
    """Ties of -inf, of the two zeros and of huge values go to the lowest id on either path."""
    k = data.draw(st.integers(1, len(row)))
    scores_TE = torch.tensor([row]).repeat(repeats, 1)
    ids_TK = top_k(scores_TE, k)
    assert ids_TK[0].tolist() == expected_ids(scores_TE[:1], k)[0]
    assert bool((ids_TK == ids_TK[0]).all())


@pytest.mark.parametrize("E", [pytest.param(7, id="E=7"), pytest.param(65, id="E=65")])
@pytest.mark.parametrize("T", [pytest.param(37, id="T=37"), pytest.param(700, id="T=700")])
def test_without_a_look_at_the_values_the_ids_are_the_same(T: int, E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While compiling, where the host may not look, the result does not change."""
    scores_TE = few_levels(T, E)
    eager_TK = top_k(scores_TE, 3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(top_k(scores_TE, 3), eager_TK)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
@pytest.mark.parametrize("T", [pytest.param(37, id="small"), pytest.param(400, id="large")])
def test_scores_are_ranked_in_their_own_dtype(T: int, dtype: torch.dtype) -> None:
    """Rounding makes ties in fp16 and bf16, and fp64 keeps differences that fp32 loses."""
    scores_TE = (1 + normal(T, 12).double() * 1e-9) if dtype == torch.float64 else normal(T, 12).to(dtype)
    assert top_k(scores_TE, 5).tolist() == expected_ids(scores_TE, 5)


@pytest.mark.parametrize("T", [pytest.param(37, id="small"), pytest.param(199, id="large")])
def test_a_tie_across_the_boundary_goes_to_the_lowest_id(T: int) -> None:
    """Where the k-th and the next are equal, the lower id is in and the higher one out."""
    scores_TE = torch.zeros(T, 65)
    scores_TE[:, 40] = 1.0
    scores_TE[:, [7, 13, 64]] = 0.5
    assert top_k(scores_TE, 3).tolist() == [[40, 7, 13]] * T


def test_scores_keep_their_values_and_may_be_a_view() -> None:
    """A transposed table gives what its copy gives, and is not written to."""
    scores_TE = normal(65, 199).t()
    before_TE = scores_TE.clone()
    assert torch.equal(top_k(scores_TE, 4), top_k(before_TE.contiguous(), 4))
    assert torch.equal(scores_TE, before_TE)


def weights64(logits_TE: Tensor, ids_TK: Tensor, renormalize: bool) -> np.ndarray:
    """Softmax over the experts in float64, gathered, then divided by its sum if asked for."""
    logits = logits_TE.double().numpy()
    p_TE = np.exp(logits - logits.max(-1, keepdims=True))
    p_TE /= p_TE.sum(-1, keepdims=True)
    chosen_TK = np.take_along_axis(p_TE, ids_TK.long().numpy(), -1)
    return chosen_TK / chosen_TK.sum(-1, keepdims=True) if renormalize else chosen_TK


RENORMALIZE = pytest.mark.parametrize(
    "renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")]
)


@SIZES
@RENORMALIZE
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")])
def test_weights_are_the_softmax_of_the_chosen(T: int, E: int, k: int, renormalize: bool, dtype: torch.dtype) -> None:
    """float32 weights equal the softmax in float64; renormalised rows sum to 1, and plain ones do where k=E."""
    logits_TE = normal(T, E).to(dtype)
    ids_TK = top_k(logits_TE, k)
    weights_TK = weights_of(logits_TE, ids_TK, renormalize)
    assert weights_TK.dtype == torch.float32 and weights_TK.shape == (T, k)
    np.testing.assert_allclose(weights_TK, weights64(logits_TE, ids_TK, renormalize), rtol=1e-5, atol=1e-7)
    if renormalize or k == E:
        torch.testing.assert_close(weights_TK.sum(-1), torch.ones(T))


@RENORMALIZE
def test_any_ids_have_weights_not_only_the_largest(renormalize: bool) -> None:
    """The weights belong to the ids given, in the order given."""
    logits_TE = normal(37, 12)
    ids_TK = top_k(-logits_TE, 4).flip(-1)
    weights_TK = weights_of(logits_TE, ids_TK, renormalize)
    np.testing.assert_allclose(weights_TK, weights64(logits_TE, ids_TK, renormalize), rtol=1e-5, atol=1e-7)


@RENORMALIZE
def test_huge_logits_neither_overflow_nor_vanish(renormalize: bool) -> None:
    """Logits of +-3e4 give weights that are finite and sum to 1."""
    logits_TE = torch.tensor([[3e4, 3e4, -3e4, 0.0, -3e4], [-3e4, -3e4, -3e4, -3e4, -3e4], [3e4, 0, 0, 0, 0]])
    ids_TK = top_k(logits_TE, 2)
    weights_TK = weights_of(logits_TE, ids_TK, renormalize)
    total = [1.0, 1.0, 1.0] if renormalize else [1.0, 0.4, 1.0]
    assert ids_TK.tolist() == [[0, 1], [0, 1], [0, 1]]
    torch.testing.assert_close(weights_TK.sum(-1), torch.tensor(total))
    torch.testing.assert_close(weights_TK[:, 0], torch.tensor([0.5, total[1] / 2, 1.0]))


def test_renormalised_weights_do_not_underflow() -> None:
    """Experts whose probability is 0 in fp32 still share the weight by their logits."""
    logits_TE = torch.tensor([[0.0, -200.0, -201.0]])
    weights_TK = weights_of(logits_TE, torch.tensor([[1, 2]], dtype=torch.int32), True)
    torch.testing.assert_close(weights_TK, torch.tensor([[1.0, 0.0]]).softmax(-1))


@RENORMALIZE
def test_an_expert_at_minus_infinity_weighs_nothing(renormalize: bool) -> None:
    """-inf entries get weight 0 where they are chosen, and leave the others' weights alone."""
    logits_TE = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    ids_TK = top_k(logits_TE, 3)
    weights_TK = weights_of(logits_TE, ids_TK, renormalize)
    assert ids_TK.tolist() == [[3, 1, 0]]
    torch.testing.assert_close(weights_TK, torch.tensor([[2.0, 1.0, -torch.inf]]).softmax(-1))


def test_one_renormalised_expert_weighs_exactly_one() -> None:
    """With k=1 the weight is 1 without rounding."""
    logits_TE = normal(199, 7) * 100
    assert bool((weights_of(logits_TE, top_k(logits_TE, 1), True) == 1).all())
