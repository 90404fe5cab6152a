"""Run `python -m pytest` in this folder."""

from __future__ import annotations

import torch
from my_routers import Sharpened

from moe_lab.routers.base import RouteContext
from moe_lab.routers.contract import check_contract


def test_the_weights_are_the_formula() -> None:
    """In float64, and the seam's contract is kept."""
    logits_TE = torch.randn(37, 7, generator=torch.Generator().manual_seed(0))
    routing = Sharpened(7, 3, sharpness=3.0).select(logits_TE, RouteContext(want_scores=True))
    check_contract(routing, 37, 7, layer=0)
    p_TK = logits_TE.double().softmax(-1).gather(1, routing.expert_ids_TK.long()) ** 3
    torch.testing.assert_close(routing.weights_TK.double(), p_TK / p_TK.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_it_is_what_it_declares() -> None:
    """A token alone has the route that it has in a batch."""
    router, logits_TE = Sharpened(7, 3), torch.randn(5, 7, dtype=torch.float64)
    together = router.select(logits_TE)
    for token in range(5):
        alone = router.select(logits_TE[token : token + 1])
        assert torch.equal(alone.expert_ids_TK[0], together.expert_ids_TK[token])
        assert torch.equal(alone.weights_TK[0], together.weights_TK[token])
