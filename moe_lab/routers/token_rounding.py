"""router=token_rounding: top-k, then every expert's number of tokens rounded to whole tiles (SonicMoE, 2512.14080).

    S_t = top-k of softmax(l_t) = p_t;  c_e = the tokens that chose e
    n_e = c_e rounded to the nearest multiple of `tile` (half: up), at most T
    e takes its n_e first tokens: those that chose it, by p_te, then the others, by p_te;  ties go to the first token
    w_e = p_e / sum over the token's experts, or p_e with renormalize=false

So no tile of a grouped product is padded, and an expert gains or loses at most half a tile. A token may end with fewer
experts than k, none, or more. With fewer tokens than a tile there is no whole tile, and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class TokenRounding(Router):
    """K, the width of the routing, is the largest number of experts of a token: it is read on the host."""

    causal = False
    batch_invariant = False
    static_k = False
    graph_safe = False

    def __init__(self, n_experts: int, top_k: int, *, impl: str, tile: int, renormalize: bool):
        super().__init__(n_experts, top_k, impl)
        self.tile, self.renormalize = tile, renormalize

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`; `scores_TE` is what the expert ranks its tokens by, less that of the last it takes."""
        require_finite(logits_TE, ctx)
        T, E = logits_TE.shape
        p_TE = logits_TE.float().softmax(-1)
        if T == 0:
            ids_TK = torch.empty(0, 1, dtype=torch.int32, device=p_TE.device)
            return Routing(ids_TK, p_TE[:, :1], scores_TE=p_TE if ctx.want_scores else None)
        chosen_TE = torch.zeros_like(p_TE, dtype=torch.bool).scatter_(1, top_k(p_TE, self.top_k).long(), True)
        rank_TE = torch.where(chosen_TE, p_TE, p_TE - 1)  # behind all that chose the expert
        order_ET = top_k(rank_TE.T.contiguous(), T).long()
        place_T = torch.arange(T, device=p_TE.device)
        place_ET = torch.zeros_like(order_ET).scatter_(1, order_ET, place_T.expand(E, T))
        n_E1 = self._rounded(chosen_TE.sum(0), T).unsqueeze(1)
        taken_TE = (place_ET < n_E1).T
        # An exported graph has a fixed width.
        width = E if is_exporting() else max(int(taken_TE.sum(-1).max()), 1)
        ids_TK = top_k(p_TE.masked_fill(~taken_TE, -1), width)
        ids_TK = torch.where(taken_TE.gather(1, ids_TK.long()), ids_TK, -1)
        scores_TE = None
        if ctx.want_scores:
            last_E1 = rank_TE.T.gather(1, order_ET.gather(1, (n_E1 - 1).clamp(min=0)))
            scores_TE = rank_TE - torch.where(n_E1 > 0, last_E1, 2.0).T  # no rank reaches 2
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def _rounded(self, count_E: Tensor, n_tokens: int) -> Tensor:
        """n [E]; as tensors, so that an exported graph takes any number of tokens."""
        most_E = torch.full_like(count_E, n_tokens // self.tile)
        tiles_E = torch.minimum((count_E + self.tile // 2) // self.tile, most_E)
        return torch.where(most_E > 0, tiles_E * self.tile, count_E)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)

    def warnings(self, n_tokens: int) -> list[str]:
        """Where it does nothing."""
        if n_tokens >= self.tile:
            return []
        return [
            f"router=token_rounding: with {n_tokens} tokens there is no whole tile (router.tile={self.tile}), so "
            "nothing is rounded: it chooses as top-k does."
        ]
