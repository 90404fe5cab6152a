"""Fewer experts for tokens that need fewer: router=top_p, min_p, expert_skip.

    p = softmax(l), p_(1) >= p_(2) >= ... ; of the k best, the token keeps the j-th if
    top_p:       p_(1) + ... + p_(j-1) < threshold        (the smallest prefix that reaches it; 2403.07652)
    min_p:       p_(j) >= threshold * p_(1)
    expert_skip: as min_p, with the median of p_(2) / p_(1) in a calibration pass as the threshold (Lu et al. 2024,
                 2402.14800: not all experts are equal)
    w_e = p_e / sum of the kept p, or p_e with renormalize=false

The first is always kept. `top_k`, or `k_max`, is the most that a token may have; its other slots stay unused (id -1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite

RULES = ("top_p", "min_p")


class DynamicK(Router):
    """Without a `threshold` it is fitted, see `fit`."""

    causal = True
    batch_invariant = True
    graph_safe = True
    static_k = False
    threshold: Tensor

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        *,
        impl: str,
        rule: str,
        threshold: float | None,
        k_max: int | None,
        renormalize: bool,
    ):
        super().__init__(n_experts, min(k_max or top_k, n_experts), impl)
        if rule not in RULES:
            raise ValueError(f"router.rule={rule}: must be one of {', '.join(RULES)}.")
        if threshold is None and rule != "min_p":
            raise ValueError(
                f"router.threshold=null: only router.rule=min_p fits it; set a number for router.rule={rule}."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"router.threshold={threshold}: must be between 0 and 1 (a probability).")
        self.rule, self.calibrates, self.renormalize = rule, threshold is None, renormalize
        self.register_buffer("threshold", torch.tensor(threshold or 0.0, dtype=torch.float32))

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is by how much each of the k best is above its threshold."""
        require_finite(logits_TE, ctx)
        p_TE = logits_TE.float().softmax(-1)
        ids_TK = top_k(logits_TE, self.top_k)
        best_TK = p_TE.gather(-1, ids_TK.long())
        if self.rule == "top_p":
            above_TK = self.threshold - (best_TK.cumsum(-1) - best_TK)
            kept_TK = above_TK > 0
        else:
            above_TK = best_TK - self.threshold * best_TK[:, :1]
            kept_TK = above_TK >= 0
        kept_TK[:, :1] = True
        scores_TE = None
        if ctx.want_scores:
            scores_TE = torch.full_like(p_TE, -torch.inf).scatter_(1, ids_TK.long(), above_TK)
        ids_TK = torch.where(kept_TK, ids_TK, -1)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)

    def fit(self, logits_TE: Tensor) -> None:
        """The median over the tokens of p_(2) / p_(1)."""
        if self.n_experts > 1 and len(logits_TE):
            first_T, second_T = logits_TE.float().topk(2, dim=-1).values.unbind(-1)
            self.threshold.copy_((second_T - first_T).exp().median())
