"""A bias per expert that evens out the load of a calibration pass and is frozen then: router=loss_free, quantile.

    loss_free: S = top-k of s + b, s = sigmoid(l); b_e <- b_e + rate * sign(mean load - load_e) in every step
               (Wang et al. 2024, 2408.15664: auxiliary-loss-free balancing, here at inference)
    quantile:  S = top-k of l + b; in turn  alpha_t = the (k + 1)-th largest of l_t + b,
               -b_e = the (T k / E + 1)-th largest of l_e - alpha
               (coordinate descent on the dual of the balanced assignment; Megatron-LM's quantile balancing)
    w_e = s_e / sum_S s with s = sigmoid or softmax: the bias chooses and never weighs; quantile has w_e = s_e with
          renormalize=false

Frozen, the bias leaves the router causal and batch invariant, unlike what balances the batch at hand. How even the load
then is depends on how like the calibration the workload is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.selection import Selection
from moe_lab.ops.softmax_topk import chosen, top_k, weights_of
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, require_finite
from moe_lab.routers.scored_topk import sigmoid
from moe_lab.routers.selection import SelectionRouter


class BalancingBias(Router):
    """`bias_E`, float32, is 0 until `fit`."""

    causal = True
    batch_invariant = True
    static_k = True
    graph_safe = True
    calibrates = True
    bias_E: Tensor

    def __init__(self, n_experts: int, top_k: int, *, impl: str, steps: int):
        super().__init__(n_experts, top_k, impl)
        self.steps = steps
        self.register_buffer("bias_E", torch.zeros(n_experts, dtype=torch.float32))

    def score(self, logits_TE: Tensor) -> Tensor:
        """What the bias is added to, [T, E] float32."""
        raise NotImplementedError

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        raise NotImplementedError

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`."""
        require_finite(logits_TE, ctx)
        scores_TE = self.score(logits_TE) + self.bias_E
        ids_TK = top_k(scores_TE, self.top_k)
        wanted = ctx.want_scores
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE if wanted else None)


class LossFreeBias(SelectionRouter, BalancingBias):
    """router=loss_free."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, steps: int, rate: float):
        super().__init__(n_experts, top_k, impl=impl, steps=steps)
        self.rate = rate
        self.describe(Selection(top_k, "sigmoid"))

    def biases(self) -> dict[str, Tensor | None]:
        """See `SelectionRouter.biases`."""
        return {"bias_E": self.bias_E}

    def ranked(self, logits_TE: Tensor) -> Tensor:
        """The scores, biased."""
        return self.score(logits_TE) + self.bias_E

    def score(self, logits_TE: Tensor) -> Tensor:
        """The sigmoid."""
        return sigmoid(logits_TE.float())

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        chosen_TK = chosen(self.score(logits_TE), expert_ids_TK)
        return chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1e-20)

    def fit(self, logits_TE: Tensor) -> None:
        """`steps` steps of `rate`; of all biases on the way the one with the least maximal load is kept."""
        s_TE, bias_E = self.score(logits_TE), torch.zeros_like(self.bias_E)
        least = torch.inf
        for _ in range(self.steps + 1):
            load_E = torch.bincount(top_k(s_TE + bias_E, self.top_k).flatten().long(), minlength=self.n_experts)
            if (most := float(load_E.max())) < least:
                least = most
                self.bias_E.copy_(bias_E)
            bias_E = bias_E + self.rate * (load_E.float().mean() - load_E).sign()


class QuantileBias(BalancingBias):
    """router=quantile."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, steps: int, renormalize: bool):
        super().__init__(n_experts, top_k, impl=impl, steps=steps)
        self.renormalize = renormalize

    def score(self, logits_TE: Tensor) -> Tensor:
        """The logits themselves."""
        return logits_TE.float()

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(logits_TE, expert_ids_TK, self.renormalize)

    def fit(self, logits_TE: Tensor) -> None:
        """`steps` rounds over the two quantiles, the tokens' and the experts'."""
        l_TE = self.score(logits_TE)
        T, E = l_TE.shape
        n_wanted = T * self.top_k // E
        if self.top_k == E or n_wanted >= T or T == 0:
            return  # every expert is chosen: nothing to even out
        for _ in range(self.steps):
            alpha_T1 = (l_TE + self.bias_E).topk(self.top_k + 1, dim=-1).values[:, -1:]
            self.bias_E.copy_(-(l_TE - alpha_T1).topk(n_wanted + 1, dim=0).values[-1])
