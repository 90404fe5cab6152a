"""routers/around.py: a router around another is the other one, but for what it defines itself."""

from __future__ import annotations

from typing import Self

import pytest
import torch
from torch import Tensor

from moe_lab.routers.around import Around
from moe_lab.routers.base import PROPERTIES, Router

DECLARED = (*PROPERTIES, "looks_ahead", "not_exportable")


class Inner(Router):
    """Notes what it is told, and declares what no router does by default."""

    causal = batch_invariant = static_k = graph_safe = True
    needs_token_ids = scales_input = looks_ahead = calibrates = True
    not_exportable = "a reason"
    told: tuple[object, ...] = ()

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        return logits_TE.gather(1, expert_ids_TK)

    def at_layer(self, layer: int) -> Self:
        self.told += ("layer", layer)
        return self

    def fit(self, logits_TE: Tensor) -> None:
        self.told += ("logits", len(logits_TE))

    def implementation(self) -> str:
        return "its own"

    def warnings(self, n_tokens: int) -> list[str]:
        return [f"{n_tokens} tokens"]


def test_what_it_does_is_what_the_inner_router_does() -> None:
    """Each method that a layer or a run calls, `select` apart."""
    inner = Inner(7, 3)
    router, logits_TE = Around(7, 3, inner=inner, impl="auto"), torch.randn(5, 7)
    assert router.at_layer(4) is router
    router.fit(logits_TE)
    assert inner.told == ("layer", 4, "logits", 5)
    assert (router.implementation(), router.warnings(9)) == ("its own", ["9 tokens"])
    ids_TK = torch.tensor([[0, 2, 6]] * 5)
    weights_TK = router.weigh(logits_TE, ids_TK)
    assert weights_TK is not None and torch.equal(weights_TK, logits_TE.gather(1, ids_TK))
    with pytest.raises(NotImplementedError):
        router.select(logits_TE)


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in DECLARED])
def test_it_declares_what_the_inner_router_declares(name: str) -> None:
    """Also what it does not declare."""
    assert getattr(Inner, name) != getattr(Router, name)
    for inner in (Inner(7, 3), Router(7, 3)):
        assert getattr(Around(7, 3, inner=inner, impl="auto"), name) == getattr(inner, name)
