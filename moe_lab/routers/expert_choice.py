"""router=expert_choice: every expert takes its C best tokens (Zhou et al. 2022, 2202.09368).

    p = softmax(l) over the experts;  expert e takes the C = ceil(factor * T k / E) tokens with the largest p_e
    w_e = p_e

The load is even by construction; a token has as many experts as want it, none or all. What a token gets depends on the
tokens after it. At T = 1 every expert takes the one token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting
from moe_lab.ops.softmax_topk import chosen, top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class ExpertChoice(Router):
    """K, the width of the routing, is the largest number of experts of a token: it is read on the host."""

    causal = False
    batch_invariant = False
    static_k = False
    graph_safe = False

    def __init__(self, n_experts: int, top_k: int, *, impl: str, factor: float):
        super().__init__(n_experts, top_k, impl)
        self.factor = factor

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is p less the least p that the expert takes."""
        require_finite(logits_TE, ctx)
        T, E = logits_TE.shape
        p_TE = logits_TE.float().softmax(-1)
        wants_scores = ctx.want_scores
        if T == 0:
            ids_TK = torch.empty(0, 1, dtype=torch.int32, device=p_TE.device)
            return Routing(ids_TK, p_TE[:, :1], scores_TE=p_TE if wants_scores else None)
        capacity = min(T, math.ceil(self.factor * T * self.top_k / E))
        tokens_EC = top_k(p_TE.T.contiguous(), capacity).long()
        taken_TE = torch.zeros_like(p_TE, dtype=torch.bool).scatter_(0, tokens_EC.T, True)
        # An exported graph has a fixed width.
        width = E if is_exporting() else max(int(taken_TE.sum(-1).max()), 1)
        ids_TK = top_k(p_TE.masked_fill(~taken_TE, -1), width)
        ids_TK = torch.where(taken_TE.gather(1, ids_TK.long()), ids_TK, -1)
        scores_TE = p_TE - p_TE.gather(0, tokens_EC[:, -1:].T) if wants_scores else None
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return chosen(logits_TE.float().softmax(-1), expert_ids_TK)

    def warnings(self, n_tokens: int) -> list[str]:
        """Where it degenerates."""
        if n_tokens != 1:
            return []
        return ["router=expert_choice: with one token, every expert chooses it."]
