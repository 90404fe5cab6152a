"""Fewer different experts in a batch, for decoding, whose time is that of reading them: router=oea, xshare, moe_spec.

    oea:    U = the k0 best experts of every token;  S = top-k of the logits within U
            (opportunistic expert activation, 2511.02237: what others pay for anyway is added)
    xshare: U = every token's best expert, then experts by the batch's probability sum_t p_te up to `budget` in all;
            S = top-k of the logits within U  (2602.07265: that sum is the objective, and greedy is exact for it)
    moe_spec: the same without every token's best, U and the sum for each `window` of consecutive tokens of a sequence,
            which one step of speculative decoding verifies (MoE-Spec, 2602.16052, with substitution)
    w_e = p_e / sum_S p, p = softmax(l), or p_e with renormalize=false

Where U has fewer than k experts the other slots stay unused (id -1). Padding (ctx.valid_T) adds nothing to U. The last
window of a sequence may be shorter.
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

    def shared(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        """bool [E] or [T, E]: the set U of every token."""
        raise NotImplementedError

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is by how much a logit is above the first that is not chosen."""
        require_finite(logits_TE, ctx)
        wide_TE, E = logits_TE.float(), self.n_experts
        shared_TE = self.shared(wide_TE, ctx).expand_as(wide_TE)
        inside_TE = wide_TE.masked_fill(~shared_TE, -torch.inf)
        order_TK = top_k(inside_TE, min(self.top_k + 1, E))
        ids_TK = order_TK[:, : self.top_k]
        ids_TK = torch.where(shared_TE.gather(-1, ids_TK.long()), ids_TK, -1)
        scores_TE = None
        if ctx.want_scores:
            first_out_T1 = inside_TE.gather(-1, order_TK[:, -1:].long())
            if self.top_k == E:
                first_out_T1 = torch.full_like(first_out_T1, -torch.inf)
            scores_TE = torch.where(shared_TE, wide_TE - first_out_T1, -torch.inf)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)


def best_of_each(logits_TE: Tensor, k: int, valid_T: Tensor | None) -> Tensor:
    """bool [T, E]: the k best experts of each token that is no padding."""
    best_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, top_k(logits_TE, k).long(), True)
    return best_TE if valid_T is None else best_TE & valid_T.unsqueeze(-1)


class OpportunisticActivation(WithinSharedSet):
    """router=oea."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, k0: int, renormalize: bool):
        super().__init__(n_experts, top_k, impl=impl, renormalize=renormalize)
        if not 1 <= k0 <= top_k:
            raise ValueError(f"router.k0={k0}: must be between 1 and top_k={top_k}.")
        self.k0 = k0

    def shared(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        """See the module."""
        return best_of_each(logits_TE, self.k0, ctx.valid_T).any(0)


class SharedBudget(WithinSharedSet):
    """router=xshare and moe_spec; the budget is a share of the experts.

    `keeps_best`: every token's best is in the set, beyond the budget if need be. `window`: None: all tokens are one.
    """

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        *,
        impl: str,
        budget: float,
        window: int | None,
        keeps_best: bool,
        renormalize: bool,
    ):
        super().__init__(n_experts, top_k, impl=impl, renormalize=renormalize)
        if not 0 < budget <= 1:
            raise ValueError(f"router.budget={budget}: must be > 0 and <= 1 (a share of the experts).")
        if window is not None and window < 1:
            raise ValueError(f"router.window={window}: must be a number of tokens >= 1, or null (all of them).")
        self.n_shared = max(1, round(budget * n_experts))
        self.window, self.keeps_best = window, keeps_best

    def shared(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        """See the module."""
        p_TE = logits_TE.softmax(-1)
        if ctx.valid_T is not None:
            p_TE = p_TE * ctx.valid_T.unsqueeze(-1)
        if self.keeps_best:
            p_TE = p_TE.masked_fill(best_of_each(logits_TE, 1, ctx.valid_T), torch.inf)
        if self.window is None:
            mass_WE = p_TE.sum(0, keepdim=True)
        else:  # in float64, so that the order in which a device adds them up changes no choice
            first_TE = windows_of(p_TE, ctx.seq_start_B1, self.window).unsqueeze(-1).expand_as(p_TE)
            mass_WE = torch.zeros_like(p_TE, dtype=torch.float64).scatter_add(0, first_TE, p_TE.double()).float()
        chosen_WE = torch.zeros_like(mass_WE, dtype=torch.bool)
        chosen_WE = chosen_WE.scatter(1, top_k(mass_WE, self.n_shared).long(), True) | mass_WE.isinf()
        return chosen_WE if self.window is None else chosen_WE.gather(0, first_TE)


def windows_of(of_tokens: Tensor, seq_start_B1: Tensor | None, window: int) -> Tensor:
    """int64 [T]: the first token of the window of each; windows of `window` tokens begin with their sequence."""
    token_T = torch.arange(of_tokens.shape[0], device=of_tokens.device)
    if seq_start_B1 is None:
        return token_T - token_T % window
    begun_TB = token_T.unsqueeze(-1) >= seq_start_B1
    start_T = torch.where(begun_TB, seq_start_B1, 0).amax(-1)
    return token_T - (token_T - start_T) % window
