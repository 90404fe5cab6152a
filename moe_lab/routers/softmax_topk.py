"""router=torch (and cuda_ext): softmax over the experts, then the k largest.

    p = softmax(l);  S = top-k of p;  w_e = p_e, or p_e / sum_S p with `renormalize`

Shazeer et al. 2017 (1701.06538); renormalised in Mixtral (2401.04088), not in OLMoE (2409.02060). The ranking is done
on the logits: it is that of the softmax, but does not lose small differences to underflow.
"""

from __future__ import annotations

from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import RouteContext, Router, Routing, require_finite


class SoftmaxTopK(Router):
    """Softmax top-k; every declared property of `Router` holds."""

    def __init__(self, n_experts: int, top_k: int, impl: str = "torch", renormalize: bool = True):
        super().__init__(n_experts, top_k, impl)
        if impl != "torch":
            raise UnavailableError(f"router={impl}: this version of moe-lab has no {impl} router; use router=torch")
        self.renormalize = renormalize

    def select(self, logits_TE: Tensor, ctx: RouteContext | None = None) -> Routing:
        """See `Router.select`. Raises `ValueError` naming the layer for logits without a softmax."""
        require_finite(logits_TE, ctx)
        ids_TK = top_k(logits_TE, self.top_k)
        scores_TE = logits_TE.float() if ctx is not None and ctx.want_scores else None
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)
