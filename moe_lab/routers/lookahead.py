"""router=lookahead: the experts that a layer's gate guesses from the layer before are computed (2603.19289).

    S = the experts that `inner` selects from W_l x_{l-1}; x_{l-1} is what the MLP of the layer before read (Fate,
        2502.12224)
    w = what `inner` gives to the experts of S by W_l x_l: when the layer is computed, its own gate has its input

So the experts of a layer are known one layer ahead, and loading them may overlap with that layer. The first layer of a
model has none before it and selects by its own input.
"""

from __future__ import annotations

from torch import Tensor

from moe_lab.routers.around import Around
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.soft import SoftMoE


class Lookahead(Around):
    """The weights are the layer's own, the choice is the guess's."""

    def __init__(self, n_experts: int, top_k: int, *, inner: Router, impl: str):
        super().__init__(n_experts, top_k, inner=inner, impl=impl)
        if isinstance(inner, SoftMoE):
            raise ValueError("router.inner: router=soft chooses no experts to guess; wrap another router.")
        self.looks_ahead = True

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` are those of the guess."""
        if ctx.guess_TE is None:
            return self.inner.select(logits_TE, ctx)
        routing = self.inner.select(ctx.guess_TE.to(logits_TE.dtype), ctx)
        weights_TK = self.inner.weigh(logits_TE, routing.expert_ids_TK)
        if weights_TK is None:
            raise ValueError(
                f"router.inner: {type(self.inner).__name__}.weigh(logits, ids) must return the weights of experts that "
                "were guessed; wrap another router."
            )
        return routing._replace(weights_TK=weights_TK)

    def warnings(self, n_tokens: int) -> list[str]:
        """See `Router.warnings`."""
        text = "router=lookahead: the first layer has no layer before it and selects by its own hidden states."
        return [text, *super().warnings(n_tokens)]
