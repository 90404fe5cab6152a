"""router=hash: the token's id chooses, through a fixed hash (Roller et al. 2021, 2106.04426).

    S = the k experts with the largest hash of (id, expert);  w_e = softmax over the chosen logits

The hash stands for the random table of the paper, one for each layer. DeepSeek-V4 (2606.19348) uses such tables in its
first layers, with the weights of its other layers (router.hash_layers of routers/scored_topk.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.hash_uniform import hash_scores, of_layer, stream_of
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite

_TABLES = stream_of("router=hash")


def table_scores(ctx: RouteContext, n_experts: int, asked: str) -> Tensor:
    """[T, E]: a token's experts in its layer's table have the largest. Raises `ValueError` without token ids."""
    if ctx.token_ids_T is None:
        raise ValueError(f"{asked}: needs token ids (ctx.token_ids_T).")
    return hash_scores(ctx.token_ids_T, n_experts, of_layer(_TABLES, ctx.layer))


class TokenHash(Router):
    """Reads token ids, so it cannot route a model that is fed hidden states."""

    causal = True
    batch_invariant = True
    static_k = True
    graph_safe = True
    needs_token_ids = True

    def __init__(self, n_experts: int, top_k: int, *, impl: str):
        super().__init__(n_experts, top_k, impl)

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`. Raises `ValueError` without token ids."""
        require_finite(logits_TE, ctx)
        scores_TE = table_scores(ctx, self.n_experts, "router=hash")
        ids_TK = top_k(scores_TE, self.top_k)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE if ctx.want_scores else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, renormalize=True)


class UniformRandom(Router):
    """router=random: as `TokenHash`, but the token's place in the batch chooses: a control whose load is even."""

    causal = True
    static_k = True
    graph_safe = True
    batch_invariant = False
    not_exportable = "it chooses experts at random"

    def __init__(self, n_experts: int, top_k: int, *, impl: str, seed: int):
        super().__init__(n_experts, top_k, impl)
        self.stream = stream_of("router=random", seed)

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`."""
        require_finite(logits_TE, ctx)
        layer = ctx.layer
        places_T = torch.arange(logits_TE.shape[0], device=logits_TE.device)
        scores_TE = hash_scores(places_T, self.n_experts, of_layer(self.stream, layer))
        ids_TK = top_k(scores_TE, self.top_k)
        wanted = ctx.want_scores
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE if wanted else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, renormalize=True)
