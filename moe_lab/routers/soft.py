"""router=soft: every token has every expert (Soft MoE, Puigcerver et al. 2023, 2308.00951).

    w = softmax(l) over the experts

These are the paper's combine weights C. What makes the layer a Soft MoE, that an expert is given one mixture of the
tokens instead of tokens, is done by the layer: models/soft_moe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.softmax_topk import chosen
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class SoftMoE(Router):
    """Makes of an MoE layer a `SoftMoELayer`, of which it declares what is true; K = E whatever the model's top_k.

    The mixtures hold the tokens after a token, too, so the layer is not causal; nor is a token's output its own: in
    model=moe_layer, where nothing says where a sequence starts, it depends on all the others.
    """

    static_k = True
    graph_safe = True
    causal = False
    batch_invariant = False

    def __init__(self, n_experts: int, top_k: int, *, impl: str):
        super().__init__(n_experts, top_k, impl)
        self.top_k = n_experts

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; the ids are 0 to E - 1. Raises `ValueError` naming the layer for logits not finite.

        A masked expert (-inf for every token) has no mixture, so it is refused, too.
        """
        require_finite(logits_TE, ctx, every_entry=True)
        columns_E = torch.arange(logits_TE.shape[1], dtype=torch.int32, device=logits_TE.device)
        ids_TK = torch.zeros_like(logits_TE, dtype=torch.int32) + columns_E
        wanted = ctx.want_scores
        return Routing(ids_TK, logits_TE.float().softmax(-1), scores_TE=logits_TE.float() if wanted else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return chosen(logits_TE.float().softmax(-1), expert_ids_TK)

    def warnings(self, n_tokens: int) -> list[str]:
        """What the row's load is the load of."""
        return [
            "router=soft: the load metrics count every token in every expert (the combine weights); the experts "
            "compute one row per sequence and expert."
        ]
