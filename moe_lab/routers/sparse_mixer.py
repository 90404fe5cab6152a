"""router=sparse_mixer: the router of Phi-3.5-MoE (GRIN, 2409.12136), as it is in inference.

    S = top-k of l;  for the j-th of S, among the experts that are left (R_j: all but the first j - 1 of S):
    m_j = max of R_j,  K_j = {e in R_j: (m_j - l_e) / max(|l_e|, m_j) <= 2 jitter_eps}
    w_j = exp(l_j) / sum over K_j of exp(l_e)

So an expert weighs 1 unless others are about as good, and the weights of a token add up to k at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.softmax_topk import top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class SparseMixer(Router):
    """`jitter_eps` says how near a rival must be."""

    causal = True
    batch_invariant = True
    static_k = True
    graph_safe = True

    def __init__(self, n_experts: int, top_k: int, *, impl: str, jitter_eps: float):
        super().__init__(n_experts, top_k, impl)
        if not 0 <= jitter_eps < float("inf"):
            raise ValueError(f"router.jitter_eps={jitter_eps}: must be at least 0, and finite.")
        self.jitter_eps = jitter_eps

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`."""
        require_finite(logits_TE, ctx)
        ids_TK = top_k(logits_TE.float(), self.top_k)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=logits_TE.float() if ctx.want_scores else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        left_TE = logits_TE = logits_TE.float()
        weights: list[Tensor] = []
        for id_T1 in expert_ids_TK.long().split(1, dim=1):
            most_T1 = left_TE.amax(-1, keepdim=True)
            far_TE = (most_T1 - logits_TE) / torch.maximum(logits_TE.abs(), most_T1) > 2 * self.jitter_eps
            used_T1, id_T1 = id_T1 >= 0, id_T1.clamp(min=0)
            share_T1 = left_TE.masked_fill(far_TE, -torch.inf).softmax(-1).gather(1, id_T1)
            weights.append(share_T1.masked_fill(~used_T1, 0.0))
            gone_TE = torch.zeros_like(far_TE).scatter(1, id_T1, used_T1)
            left_TE = left_TE.masked_fill(gone_TE, -torch.inf)
        return torch.cat(weights, dim=1)
