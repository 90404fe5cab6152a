"""A router of your own: softmax top-k with sharpened weights.

S = top-k of l;  w_e = p_e^sharpness / sum_S p^sharpness,  p = softmax(l)
"""

from __future__ import annotations

from torch import Tensor

from moe_lab.ops.softmax_topk import top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite


class Sharpened(Router):
    """The keys of router/sharpened.yaml are the arguments; n_experts and top_k come from the model."""

    # Leave out what you do not know. A run verifies the first three.
    causal = True  # later tokens change no earlier route
    batch_invariant = True  # nor do other sequences
    static_k = True  # every token has top_k experts
    graph_safe = True  # reads no values on the host

    def __init__(self, n_experts: int, top_k: int, sharpness: float = 2.0):
        super().__init__(n_experts, top_k)
        if sharpness <= 0:
            raise ValueError(f"router.sharpness={sharpness}: it must be above 0.")
        self.sharpness = sharpness

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """Logits [T, E] of any floating dtype -> int32 ids and float32 weights [T, K]."""
        require_finite(logits_TE, ctx)
        ids_TK = top_k(logits_TE, self.top_k)  # ties go to the lowest id
        wanted = ctx.want_scores  # verification asks what was ranked
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=logits_TE.float() if wanted else None)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """p^sharpness over the chosen, which is the softmax of sharpness * l over them; an unused slot weighs 0."""
        chosen_TK = logits_TE.float().gather(-1, expert_ids_TK.clamp(min=0).long()) * self.sharpness
        return chosen_TK.masked_fill(expert_ids_TK < 0, -float("inf")).softmax(-1).masked_fill(expert_ids_TK < 0, 0)
