"""router=capacity: any router, with room for C tokens at each expert and a policy for those that find none.

    C = max(1, ceil(factor * T k / E))                             (the rule of Megatron-LM; others count otherwise)

    weight      an expert keeps the tokens that give it the most weight         (Megatron-LM's "probs")
    token       ... those that come first in the batch
    position    ... first choices before second choices, then as `token`        (GShard, 2006.16668; NLLB)
    prioritized ... first choices first, then tokens by their largest weight    (V-MoE, 2106.05974: batch-prioritised)
    next_best   as `position`; who finds no room goes to the best expert that has some
    dropless    all of them (MegaBlocks, 2211.15841): the inner router as it is

What is dropped is an unused slot (id -1); the kept weights stay as they were. With next_best they are what the inner
router gives to the experts that it came to be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.ops.by_expert import by_expert
from moe_lab.ops.capacity import fill_up, within_capacity
from moe_lab.routers.around import Around
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.soft import SoftMoE

POLICIES = ("weight", "token", "position", "prioritized", "next_best", "dropless")


class Capacity(Around):
    """Wraps `inner`; its properties are those of the inner router where `dropless`."""

    def __init__(self, n_experts: int, top_k: int, *, inner: Router, impl: str, factor: float, policy: str):
        super().__init__(n_experts, top_k, inner=inner, impl=impl)
        if policy not in POLICIES:
            raise ValueError(f"router.policy={policy}: must be one of {', '.join(POLICIES)}.")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"router.factor={factor}: must be a number > 0.")
        if inner.static_k is None:
            raise ValueError(
                f"router.inner: {type(inner).__name__} does not declare static_k; declare it, if it is true of it."
            )
        if not inner.static_k:
            raise ValueError(
                f"router.inner: {type(inner).__name__} uses a variable number of experts per token; "
                "wrap another router."
            )
        if isinstance(inner, SoftMoE):
            raise ValueError("router.inner: router=soft has no capacity to limit; wrap another router.")
        self.factor, self.policy = factor, policy
        if policy != "dropless":
            self.causal = self.batch_invariant = self.static_k = False

    def capacity(self, n_tokens: int) -> int:
        """C for a batch of `n_tokens`."""
        return max(1, math.ceil(self.factor * n_tokens * self.inner.top_k / self.n_experts))

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`. With a capacity, `scores_TE` tells only what was chosen (1) from what was not (-1)."""
        if self.policy == "dropless":
            return self.inner.select(logits_TE, ctx)
        wants = self.policy == "next_best"
        routing = self.inner.select(logits_TE, ctx._replace(want_scores=wants))
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        room = self.capacity(ids_TK.shape[0])  # len() would be a constant of an exported graph
        room_E = torch.full((self.n_experts,), room, device=ids_TK.device)
        kept_TK = within_capacity(ids_TK, self._order(weights_TK), room_E)
        ids_TK = torch.where(kept_TK, ids_TK, -1)
        if self.policy == "next_best":
            assert routing.scores_TE is not None
            ids_TK = fill_up(ids_TK, routing.scores_TE, room_E)
            inner_TK = self.inner.weigh(logits_TE, ids_TK)
            if inner_TK is None:
                raise ValueError(
                    f"router.policy=next_best: {type(self.inner).__name__}.weigh(logits, ids) must return weights; "
                    "use another router.policy."
                )
            weights_TK = inner_TK
        scores_TE = None
        if ctx.want_scores:
            scores_TE = by_expert(torch.ones_like(weights_TK), ids_TK, self.n_experts, fill=-1.0)
        return Routing(ids_TK, weights_TK.masked_fill(ids_TK < 0, 0), scores_TE=scores_TE)

    def _order(self, weights_TK: Tensor) -> Tensor:
        """[T * K] flat slots, those that are served first before the others."""
        T, K = weights_TK.shape
        flat_TK = torch.arange(T * K, device=weights_TK.device).view(T, K)
        if self.policy == "weight":
            return weights_TK.flatten().argsort(descending=True, stable=True)
        if self.policy == "token":
            return flat_TK.flatten()
        if self.policy == "prioritized":
            flat_TK = flat_TK[weights_TK.amax(-1).argsort(descending=True, stable=True)]
        return flat_TK.T.flatten()

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """See `Router.weigh`; a row that lost a slot does not say what the others weighed before."""
        return super().weigh(logits_TE, expert_ids_TK) if self.policy in ("next_best", "dropless") else None
