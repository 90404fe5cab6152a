"""Fewer different experts in a batch, for decoding, whose time is that of reading their weights: router=oea, xshare.

    oea:    U = the k0 best experts of every token;  S = top-k of the logits within U
            (opportunistic expert activation, 2511.02237: what others pay for anyway is added)
    xshare: U = every token's best expert, then experts by the batch's probability sum_t p_te up to `budget` in all;
            S = top-k of the logits within U  (2602.07265: that sum is the objective, and greedy is exact for it)
    w_e = p_e / sum_S p, p = softmax(l), or p_e with renormalize=false

Where U has fewer than k experts the other slots stay unused (id -1). Padding (ctx.valid_T) adds nothing to U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class WithinSharedSet(Router):
    """Top-k within a set of experts that the batch chooses."""

    graph_safe = True
    causal = False
    batch_invariant = False
    static_k = False

    def __init__(self, n_experts: int, top_k: int, *, impl: str, renormalize: bool):
        super().__init__(n_experts, top_k, impl)
        self.renormalize = renormalize

    def shared(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """bool [E]: the set U."""
        raise NotImplementedError

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is by how much a logit is above the first that is not chosen."""
        require_finite(logits_TE, ctx)
        wide_TE, E = logits_TE.float(), self.n_experts
        shared_E = self.shared(wide_TE, ctx.valid_T)
        inside_TE = wide_TE.masked_fill(~shared_E, -torch.inf)
        order_TK = top_k(inside_TE, min(self.top_k + 1, E))
        ids_TK = order_TK[:, : self.top_k]
        ids_TK = torch.where(shared_E[ids_TK.long()], ids_TK, -1)
        scores_TE = None
        if ctx.want_scores:
            first_out_T1 = inside_TE.gather(-1, order_TK[:, -1:].long())
            if self.top_k == E:
                first_out_T1 = torch.full_like(first_out_T1, -torch.inf)
            scores_TE = torch.where(shared_E, wide_TE - first_out_T1, -torch.inf)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)

    def best_of(self, logits_TE: Tensor, k: int, valid_T: Tensor | None) -> Tensor:
        """bool [E]: the k best experts of any token that is no padding."""
        wanted_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, top_k(logits_TE, k).long(), True)
        return (wanted_TE if valid_T is None else wanted_TE & valid_T.unsqueeze(-1)).any(0)


class OpportunisticActivation(WithinSharedSet):
    """router=oea."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, k0: int, renormalize: bool):
        super().__init__(n_experts, top_k, impl=impl, renormalize=renormalize)
        if not 1 <= k0 <= top_k:
            raise ValueError(f"router.k0={k0}: must be between 1 and top_k={top_k}.")
        self.k0 = k0

    def shared(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """See the module."""
        return self.best_of(logits_TE, self.k0, valid_T)


class SharedBudget(WithinSharedSet):
    """router=xshare; the budget is a share of the experts, and every token's best is in the set beyond it."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, budget: float, renormalize: bool):
        super().__init__(n_experts, top_k, impl=impl, renormalize=renormalize)
        if not 0 < budget <= 1:
            raise ValueError(f"router.budget={budget}: must be > 0 and <= 1 (a share of the experts).")
        self.n_shared = max(1, round(budget * n_experts))

    def shared(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """See the module."""
        first_E = self.best_of(logits_TE, 1, valid_T)
        p_TE = logits_TE.softmax(-1)
        mass_E = (p_TE if valid_T is None else p_TE * valid_T.unsqueeze(-1)).sum(0)
        ranked_1E = mass_E.masked_fill(first_E, torch.inf).unsqueeze(0)
        within_E = torch.zeros_like(first_E).scatter_(0, top_k(ranked_1E, self.n_shared)[0].long(), True)
        return within_E | first_E
