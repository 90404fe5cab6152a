"""measure/layer_probe.py: which differences of a routing are near-ties, and its hooks. Faults: runs/test_verify.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_lab.errors import MismatchError
from moe_lab.measure.layer_probe import LayerProbe, compare_routes
from moe_lab.measure.tolerances import TOLERANCES
from tests import tiny
from tests.routers.test_contract import routing


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in TOLERANCES])
@pytest.mark.parametrize("size", [pytest.param(1.0, id="small"), pytest.param(300.0, id="large")])
def test_a_near_tie_is_a_share_of_the_largest_score(dtype: torch.dtype, size: float) -> None:
    """Below the dtype's rounding it is counted, above it fails the route."""
    tolerance = TOLERANCES[dtype]
    ran = routing([[1]], [[1.0]])
    for share, counted in ((0.5, True), (2.0, False)):
        scores_TE = size * torch.tensor([[1.0, 1.0 - share * tolerance.score, 0.0]])
        reference = routing([[0]], [[1.0]])._replace(scores_TE=scores_TE)
        if counted:
            assert compare_routes(ran, reference, 3, 0, tolerance) == 1
        else:
            with pytest.raises(MismatchError, match="the experts differ"):
                compare_routes(ran, reference, 3, 0, tolerance)


def test_a_lost_slot_is_no_near_tie() -> None:
    """However close the scores, another number of experts is another selection."""
    reference = routing([[0, 1]], [[0.5, 0.5]])._replace(scores_TE=torch.ones(1, 3))
    with pytest.raises(MismatchError, match="the experts differ"):
        compare_routes(routing([[0, -1]], [[1.0, 0.0]]), reference, 3, 0, TOLERANCES[torch.float32])


def test_the_order_of_a_tokens_slots_does_not_matter() -> None:
    """An expert and its weight may stand in any slot."""
    scores_TE = torch.tensor([[3.0, 2.0, 1.0]])
    reference = routing([[0, 1]], [[0.75, 0.25]])._replace(scores_TE=scores_TE)
    assert compare_routes(routing([[1, 0]], [[0.25, 0.75]]), reference, 3, 0, TOLERANCES[torch.float32]) == 0
    with pytest.raises(MismatchError, match="weight of token 0"):
        compare_routes(routing([[1, 0]], [[0.75, 0.25]]), reference, 3, 0, TOLERANCES[torch.float32])


@pytest.mark.parametrize("masked", [pytest.param(-torch.inf, id="-inf"), pytest.param(-1e9, id="-1e9")])
def test_masked_experts_do_not_make_everything_a_tie(masked: float) -> None:
    """A score of -inf, or a very low one, is no measure of the others."""
    scores_TE = torch.tensor([[3.0, 2.0, masked]])
    reference = routing([[0]], [[1.0]])._replace(scores_TE=scores_TE)
    for other in (1, 2):
        with pytest.raises(MismatchError, match="the experts differ"):
            compare_routes(routing([[other]], [[1.0]]), reference, 3, 0, TOLERANCES[torch.bfloat16])


def test_logits_that_are_not_the_runs_own_widen_the_tie_by_their_typical_size() -> None:
    """For an execution that fuses a gap of a few percent of the logits is a near-tie, a gap of their size is not."""
    tolerance = replace(TOLERANCES[torch.bfloat16], logit=0.04)
    for gap, near in ((0.03, True), (0.5, False)):
        scores_TE = torch.tensor([[0.1 + gap, 0.1, -1.0, -2.0]])
        reference = routing([[0]], [[1.0]])._replace(scores_TE=scores_TE)
        other = routing([[1]], [[1.0]])
        with pytest.raises(MismatchError):
            compare_routes(other, reference, 4, 0, TOLERANCES[torch.bfloat16], None, scores_TE * 10)
        if near:
            assert compare_routes(other, reference, 4, 0, tolerance, None, scores_TE * 10) == 1
        else:
            with pytest.raises(MismatchError):
                compare_routes(other, reference, 4, 0, tolerance, None, scores_TE * 10)


def test_scores_that_are_all_equal_rank_nothing() -> None:
    """Of unequal logits they are no tie; of equal ones they are."""
    reference = routing([[0]], [[1.0]])._replace(scores_TE=torch.zeros(1, 3))
    other, tolerance = routing([[1]], [[1.0]]), TOLERANCES[torch.float32]
    with pytest.raises(MismatchError):
        compare_routes(other, reference, 3, 0, tolerance, None, torch.tensor([[1.0, 2.0, 3.0]]))
    assert compare_routes(other, reference, 3, 0, tolerance, None, torch.ones(1, 3)) == 1


@pytest.mark.parametrize("tied", [pytest.param(False, id="same experts"), pytest.param(True, id="near-tie")])
def test_weights_that_are_nan_in_the_reference_are_no_agreement(tied: bool) -> None:
    """A comparison with NaN is false: neither the worst token nor any other may be taken for right."""
    scores_TE = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    weights = [[1.0], [1.0]] if tied else [[float("nan")], [1.0]]
    reference = routing([[0], [0]], weights)._replace(scores_TE=scores_TE)
    ran = routing([[1 if tied else 0], [0]], [[1.0], [1.0]])
    given_TK = torch.tensor([[float("nan")], [1.0]]) if tied else None
    with pytest.raises(MismatchError, match="a routing weight of token 0 differs by nan"):
        compare_routes(ran, reference, 3, 0, TOLERANCES[torch.float32], given_TK, scores_TE)


def test_closing_a_probe_twice_is_harmless() -> None:
    """A probe takes its hooks with it."""
    run = tiny.built(tiny.decoder_moe())
    probe = LayerProbe(run.built.model, run.built.twin, TOLERANCES[torch.float32])
    probe.close()
    probe.close()
    run.built.step()
    assert (probe.near_ties, probe.expert_error) == (0, 0.0)
