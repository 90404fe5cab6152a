"""router=lookahead: the experts that a layer's gate guesses from the layer before are computed (2603.19289).

    S = the experts that `inner` selects from W_l x_{l-1}; x_{l-1} is what the MLP of the layer before read (Fate,
        2502.12224)
    w = what `inner` gives to the experts of S by W_l x_l: when the layer is computed, its own gate has its input

So the experts of a layer are known one layer ahead, and loading them may overlap with that layer. The first layer of a
model has none before it and selects by its own input.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.soft import SoftMoE


class Lookahead(Router):
    """Wraps `inner`; its properties are those of the inner router."""

    looks_ahead = True

    def __init__(self, n_experts: int, top_k: int, *, inner: Router, impl: str):
        super().__init__(n_experts, top_k, impl)
        if isinstance(inner, SoftMoE):
            raise ValueError("router.inner: router=soft chooses no experts to guess; wrap another router.")
        self.inner = inner
        self.needs_token_ids, self.scales_input = inner.needs_token_ids, inner.scales_input
        self.causal, self.batch_invariant, self.static_k = inner.causal, inner.batch_invariant, inner.static_k
        self.graph_safe, self.calibrates = inner.graph_safe, inner.calibrates
        self.not_exportable = inner.not_exportable

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

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """See `Router.weigh`."""
        return self.inner.weigh(logits_TE, expert_ids_TK)

    def at_layer(self, layer: int) -> Self:
        """See `Router.at_layer`."""
        self.inner.at_layer(layer)
        return self

    def fit(self, logits_TE: Tensor) -> None:
        """See `Router.fit`: to the logits of the layer itself."""
        self.inner.fit(logits_TE)

    def implementation(self) -> str:
        """See `Router.implementation`."""
        return self.inner.implementation()

    def warnings(self, n_tokens: int) -> list[str]:
        """See `Router.warnings`."""
        text = "router=lookahead: the first layer has no layer before it and selects by its own hidden states."
        return [text, *self.inner.warnings(n_tokens)]
