"""Top-k of a score with a bias, in limited groups: router=deepseek_v2, _v3, _v4, minimax_m2, ernie4_5, llama4.

    s = softmax(l), sigmoid(l) or sqrt(softplus(l));  S = top-k of s + b within the best `top_groups` of `n_groups`
    w_e = scale * s_e, or scale * s_e / sum_S s with `renormalize`

The bias b chooses and never weighs. A group's score is its largest s + b (DeepSeek-V2, 2405.04434) or the sum of its
two largest (DeepSeek-V3, 2412.19437); groups that are not among the best are out, whatever the sign of s + b. Llama 4
(top-k of the logits, sigmoid of the chosen) multiplies the expert's input, not its output, by the weight. Where nothing
is added to s the ranking is done on the logits, whose small differences s would lose.

In the first `hash_layers` layers of a model the token's id chooses, by the table of router=hash, and the formula of w_e
stays (DeepSeek-V4, 2606.19348).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from moe_lab.ops.selection import Selection
from moe_lab.ops.softmax_topk import chosen, top_k
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Routing, gate_logits, require_finite
from moe_lab.routers.selection import SelectionRouter
from moe_lab.routers.token_hash import table_scores

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("max", "top2")


def score(logits_TE: Tensor, kind: str) -> Tensor:
    """[T, E] float32, of one of `SCORES`."""
    wide_TE = logits_TE.float()
    if kind == "softmax":
        return wide_TE.softmax(-1)
    if kind == "sigmoid":
        return sigmoid(wide_TE)
    return (wide_TE.clamp(min=0) + (-wide_TE.abs()).exp().log1p()).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    """The same bits wherever an element stands: torch's own rounds the last ones of a CPU tensor otherwise."""
    return 1 / (1 + (-x).exp())


def within_groups(scores_TE: Tensor, n_groups: int, top_groups: int, group_score: str) -> Tensor:
    """The scores with -inf for the experts of all but the best `top_groups` of `n_groups` neighbouring groups."""
    T, E = scores_TE.shape
    scores_TGE = scores_TE.view(T, n_groups, E // n_groups)
    n_best = min(2, E // n_groups) if group_score == "top2" else 1
    best_TG = scores_TGE.topk(n_best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, top_k(best_TG, top_groups).long(), True)
    return scores_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).view(T, E)


class ScoredTopK(SelectionRouter):
    """See the module. `bias_E`, float32, is a parameter where `bias` is asked for."""

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        *,
        impl: str,
        score: str,
        bias: bool,
        n_groups: int,
        top_groups: int,
        group_score: str,
        renormalize: bool,
        scale: float,
        scales_input: bool,
        hash_layers: int,
    ):
        super().__init__(n_experts, top_k, impl)
        for key, value, allowed in (("score", score, SCORES), ("group_score", group_score, GROUP_SCORES)):
            if value not in allowed:
                raise ValueError(f"router.{key}={value}: must be one of {', '.join(allowed)}.")
        if n_experts % n_groups:
            raise ValueError(f"router.n_groups={n_groups}: must divide n_experts={n_experts}.")
        if not 1 <= top_groups <= n_groups or top_groups * (n_experts // n_groups) < top_k:
            raise ValueError(
                f"router.top_groups={top_groups}: must be between 1 and n_groups={n_groups} and keep at least "
                f"top_k={top_k} experts (a group has {n_experts // n_groups})."
            )
        self.score, self.renormalize, self.scale = score, renormalize, scale
        self.n_groups, self.top_groups, self.group_score = n_groups, top_groups, group_score
        self.scales_input, self.hash_layers = scales_input, hash_layers
        self.needs_token_ids = hash_layers > 0
        self.has_table = False  # in the layer that it is in
        self.describe(Selection(top_k, score, n_groups, top_groups, group_score, renormalize, scale))
        empty_E = torch.empty(n_experts, dtype=torch.float32)
        self.bias_E = nn.Parameter(empty_E, requires_grad=False) if bias else None

    def biases(self) -> dict[str, Tensor | None]:
        """See `SelectionRouter.biases`."""
        return {"bias_E": self.bias_E}

    def at_layer(self, layer: int) -> Self:
        """See `Router.at_layer`."""
        self.has_table = layer < self.hash_layers
        if self.has_table:
            self.bias_E = None
        return self

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`."""
        if ctx.layer >= self.hash_layers:
            return super().select(logits_TE, ctx)
        require_finite(logits_TE, ctx)
        scores_TE = table_scores(ctx, self.n_experts, f"router.hash_layers={self.hash_layers}")
        ids_TK = top_k(scores_TE, self.top_k)
        return Routing(ids_TK, self.weigh(logits_TE, ids_TK), scores_TE=scores_TE if ctx.want_scores else None)

    def route(self, x_TD: Tensor, gate_ED: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.route`."""
        if ctx.layer >= self.hash_layers:
            return super().route(x_TD, gate_ED, ctx)
        return self.select(gate_logits(x_TD, gate_ED), ctx)

    def multiplies_gate(self, n_tokens: int, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """See `Router.multiplies_gate`."""
        return not self.has_table and super().multiplies_gate(n_tokens, gate_ED, dtype)

    def implementation(self) -> str:
        """See `Router.implementation`; no kernel reads a table."""
        return self.label if self.label == "torch" or not self.hash_layers else f"{self.label}, tables: torch"

    def ranked(self, logits_TE: Tensor) -> Tensor:
        """The logits, or where something is added to scores those; -inf outside of the best groups."""
        scores_TE = logits_TE.float()
        if self.bias_E is not None or (self.top_groups < self.n_groups and self.group_score == "top2"):
            scores_TE = score(logits_TE, self.score)
        if self.bias_E is not None:
            scores_TE = scores_TE + self.bias_E
        if self.top_groups < self.n_groups:
            scores_TE = within_groups(scores_TE, self.n_groups, self.top_groups, self.group_score)
        return scores_TE

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        weights_TK = chosen(score(logits_TE, self.score), expert_ids_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        return self.scale * weights_TK
