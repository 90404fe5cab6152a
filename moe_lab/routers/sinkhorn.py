"""router=sinkhorn: top-k of a balanced transport plan, weights from the original softmax.

    P = Sinkhorn(l / temperature), rows summing to 1 and columns to T/E;  S = top-k of P
    w_e = p_e / sum_S p,  p = softmax(l), or p_e with renormalize=false

The iterations end early where every column is within `tolerance` of T/E (0: never).

Source of the plan: ops/sinkhorn.py. The k-th best of a balanced plan is not itself balanced; it evens out skewed
logits and can make nearly balanced ones worse.

With one token the only balanced plan is the uniform one, whatever the logits: a tie of all experts. The selection then
falls back to the logits, and a run says so in its warnings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting
from moe_lab.ops.sinkhorn import IMPLEMENTATIONS, require_computable, scores_of, sinkhorn_route, sinkhorn_scores
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import FASTEST_FIRST, NO_CONTEXT, RouteContext, Router, Routing, require_finite


class Sinkhorn(Router):
    """Balancing router; the plan couples the tokens of a batch, so neither causal nor batch invariant."""

    static_k = True
    graph_safe = True
    causal = False
    batch_invariant = False
    implementations = ("torch", *IMPLEMENTATIONS)

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        *,
        impl: str,
        iters: int,
        temperature: float,
        tolerance: float,
        renormalize: bool,
    ):
        super().__init__(n_experts, top_k, impl)
        self.iters, self.temperature, self.tolerance, self.renormalize = iters, temperature, tolerance, renormalize

    def preferred(self, device: torch.device) -> Sequence[str]:
        """See `Router.preferred`."""
        return FASTEST_FIRST[device.type]

    def require(self, impl: str, device: torch.device) -> None:
        """See `Router.require`."""
        super().require(impl, device)
        require_computable(impl, self.top_k, self.n_experts)

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`. Raises `ValueError` naming the layer for logits that are not finite."""
        require_finite(logits_TE, ctx, every_entry=True)
        wanted = ctx.want_scores
        settings = (self.iters, self.temperature, self.tolerance)
        if self.impl != "torch" and not is_exporting():
            ids_TK, weights_TK, log_b_E = sinkhorn_route(logits_TE, self.top_k, *settings, self.impl)
            if not self.renormalize:  # the kernels' weights sum to 1
                weights_TK = weights_of(logits_TE, ids_TK, renormalize=False, all_used=True)
            scores_TE = scores_of(logits_TE, log_b_E, self.temperature) if wanted else None
            return Routing(ids_TK, weights_TK, scores_TE=scores_TE)
        scores_TE = sinkhorn_scores(logits_TE, *settings)
        ids_TK = top_k(scores_TE, self.top_k)
        weights_TK = weights_of(logits_TE, ids_TK, self.renormalize, all_used=True)
        return Routing(ids_TK, weights_TK, scores_TE=scores_TE if wanted else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)

    def warnings(self, n_tokens: int) -> list[str]:
        """The declared fallback at one token."""
        if n_tokens != 1:
            return []
        return ["router=sinkhorn: with one token the plan is uniform; the logits choose the experts."]
