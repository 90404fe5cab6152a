"""runs/counterfactual.py: other routes of one token, against whole passes in which only that token's route differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_lab.measure.tolerances import exact_products
from moe_lab.models.moe_layer import moe_layers
from moe_lab.records.trace import Trace
from moe_lab.routers.base import NO_CONTEXT, Routing
from moe_lab.routers.contract import check_contract
from moe_lab.runs import build, counterfactual
from moe_lab.runs.counterfactual import log_probabilities, sampled_routing
from moe_lab.runs.trace import record
from tests import quick
from tests.routers.cases import make

N, B, S = 3, 2, 7


def of_target(y_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    return y_BSV.float().log_softmax(-1).gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tiny-olmoe", id="tiny-olmoe"),
        pytest.param("tiny-qwen3-moe", id="tiny-qwen3-moe", marks=pytest.mark.slow),
    ],
)
def test_a_route_is_that_of_one_token_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole pass with the native routes, but for one row of every layer, makes the token that follows."""
    sampled: list[Routing] = []

    def spy(*arguments: object) -> Routing:
        sampled.append(sampled_routing(*arguments))  # type: ignore[arg-type]
        return sampled[-1]

    monkeypatch.setattr(counterfactual, "sampled_routing", spy)
    model = build.build_model(quick.compose("checkpoint", f"model.path={quick.ASSETS / name}"))
    ids_BS = torch.randint(256, (B, S + 1), generator=torch.Generator().manual_seed(0))
    ids_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    with exact_products():
        log_p = log_probabilities(model, ids_BS, targets_BS, N, seed=3).view(B, S, 2 + N)  # type: ignore[arg-type]
        own = model(ids_BS)
        torch.testing.assert_close(log_p[:, :, 0], own.y.log_softmax(-1).amax(-1), rtol=0, atol=1e-4)
        torch.testing.assert_close(log_p[:, :, 1], of_target(own.y, targets_BS), rtol=0, atol=1e-4)
        assert len(sampled) == len(own.routings) == 4
        for b, t, n in ((0, 0, 0), (1, 3, 2), (0, 6, 1)):
            forced = []
            for routing, others in zip(own.routings, sampled, strict=True):
                ids_TK, weights_TK = routing.expert_ids_TK.clone(), routing.weights_TK.clone()
                row = (b * N + n) * S + t
                ids_TK[b * S + t], weights_TK[b * S + t] = others.expert_ids_TK[row], others.weights_TK[row]
                forced.append(Routing(ids_TK, weights_TK))
            wanted = of_target(model(ids_BS, forced).y, targets_BS)[b, t]
            torch.testing.assert_close(log_p[b, t, 2 + n], wanted, rtol=0, atol=1e-4)
            assert abs(float(wanted - log_p[b, t, 1])) > 1e-3  # another route, another probability


def test_routes_are_drawn_by_the_routers_probabilities() -> None:
    """One of four experts: shares within four standard deviations. Of two, the second by what is left."""
    p_E, T = torch.tensor([0.4, 0.3, 0.2, 0.1]), 40_000
    logits_TE, generator = p_E.log().expand(T, 4) + 2, torch.Generator().manual_seed(0)
    first = sampled_routing(make("mixtral", 4, 1), logits_TE, NO_CONTEXT, generator).expert_ids_TK[:, 0]
    share_E = first.bincount(minlength=4) / T
    assert bool(((share_E - p_E).abs() < 4 * (p_E * (1 - p_E) / T).sqrt()).all())
    pair = sampled_routing(make("olmoe", 4, 2), logits_TE, NO_CONTEXT, generator)
    check_contract(pair, T, 4, 0)
    torch.testing.assert_close(pair.weights_TK, p_E[pair.expert_ids_TK.long()])  # weighed without the noise
    after_0 = pair.expert_ids_TK[pair.expert_ids_TK[:, 0] == 0, 1]
    assert abs(float((after_0 == 1).float().mean()) - 0.3 / 0.6) < 0.02


@pytest.mark.slow
def test_a_trace_has_them_and_is_the_same_again(tmp_path: Path) -> None:
    """With and without guesses, whose columns the other passes do not touch; the routes are the native ones."""
    cfg = quick.compose("checkpoint")
    record(cfg, tmp_path / "a.trace", 64, guesses=True)
    record(cfg, tmp_path / "b.trace", 64, guesses=True, routes=2)
    record(cfg, tmp_path / "c.trace", 64, routes=2)
    with Trace(tmp_path / "a.trace") as a, Trace(tmp_path / "b.trace") as b, Trace(tmp_path / "c.trace") as c:
        first, second = b.of_tokens("log_p"), c.of_tokens("log_p")
        assert not a.token_columns
        assert first.shape == (64, 4) and (first == second).all() and (first[:, 0] >= first[:, 1]).all()
        for index in range(4):
            assert (a.ids(index) == b.ids(index)).all()
            for name in ("ahead", "logits", "weights"):
                if name in a.columns:
                    pair = zip(a.pieces_of(index, name), b.pieces_of(index, name), strict=True)
                    assert all((left == right).all() for left, right in pair)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(("router=oea",), "OpportunisticActivation does not give each token", id="looks-at-the-batch"),
        pytest.param(("router=top_p",), "with a fixed number of experts; use router=native", id="varies-in-cost"),
        pytest.param(("workload.phase=decode", "workload.context_len=4"), "remove workload.phase=decode", id="decode"),
    ],
)
def test_what_has_no_such_routes_is_named(more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """One line, and no file."""
    with pytest.raises(ValueError, match=f"--routes: .*{message}"):
        record(quick.compose("checkpoint", *more), tmp_path / "x.trace", 64, routes=2)
    assert not list(tmp_path.iterdir())


def test_a_model_with_states_is_refused() -> None:
    """Its steps cannot be repeated in another order."""
    model = build.build_model(quick.compose("decoder_moe"))
    assert [layer.router.static_k for layer in moe_layers(model)] == [True, True]
    counterfactual.require_own_routes(model, "forward")
    cache = model.make_cache(1, 1)  # type: ignore[operator]

    class InOrder:
        in_order = True

    model.make_cache = lambda *_: InOrder()
    assert not cache.in_order
    with pytest.raises(ValueError, match="--routes: this model keeps states"):
        counterfactual.require_own_routes(model, "forward")
