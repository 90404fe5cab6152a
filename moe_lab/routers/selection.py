"""Routers that a `Selection` describes: computed by torch or by the kernels of ops/route.py, at times with the gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.ops import norm_gate_route as fused
from moe_lab.ops.library import is_exporting
from moe_lab.ops.route import IMPLEMENTATIONS, gate_route, multiplies_gate, require_computable, route
from moe_lab.ops.selection import Selection
from moe_lab.ops.softmax_topk import top_k
from moe_lab.routers.base import FASTEST_FIRST, NO_CONTEXT, RouteContext, Router, Routing, require_finite


class SelectionRouter(Router):
    """Top-k of scores with biases; a subclass says `ranked`, `weigh` and `biases`, and calls `describe` once."""

    causal = True
    batch_invariant = True
    static_k = True
    graph_safe = True
    implementations = ("torch", *IMPLEMENTATIONS)
    how: Selection

    def describe(self, how: Selection) -> None:
        """What the kernels are told."""
        self.how = how

    def preferred(self, device: torch.device) -> Sequence[str]:
        """See `Router.preferred`."""
        return FASTEST_FIRST[device.type]

    def require(self, impl: str, device: torch.device) -> None:
        """See `Router.require`."""
        super().require(impl, device)
        if impl in IMPLEMENTATIONS:
            has = {name.removesuffix("_E"): bias_E is not None for name, bias_E in self.biases().items()}
            require_computable(impl, self.how, self.n_experts, **has)

    def biases(self) -> dict[str, Tensor | None]:
        """`gate_bias_E`, added to the logits, or `bias_E`, to the scores; see ops/route.py."""
        return {}

    def ranked(self, logits_TE: Tensor) -> Tensor:
        """[T, E] of any floating dtype: what the k largest are chosen of."""
        raise NotImplementedError

    def weigh_chosen(self, logits_TE: Tensor, ranked_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """`weigh` where no id is -1 and `ranked` is known."""
        weights_TK = self.weigh(logits_TE, expert_ids_TK)
        assert weights_TK is not None
        return weights_TK

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.select`. Raises `ValueError` naming the layer for logits without a softmax."""
        require_finite(logits_TE, ctx)
        if self.impl != "torch" and not is_exporting():
            routed = route(logits_TE, self.how, self.impl, sort=ctx.want_dispatch, **self.biases())
            return Routing(*routed, scores_TE=self.ranked(logits_TE).float() if ctx.want_scores else None)
        ranked_TE = self.ranked(logits_TE)
        ids_TK = top_k(ranked_TE, self.top_k)
        weights_TK = self.weigh_chosen(logits_TE, ranked_TE, ids_TK)
        return Routing(ids_TK, weights_TK, scores_TE=ranked_TE.float() if ctx.want_scores else None)

    def route(self, x_TD: Tensor, gate_ED: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        """See `Router.route`."""
        asks_more = ctx.want_scores or ctx.want_dispatch
        if asks_more or is_exporting() or not self.multiplies_gate(len(x_TD), gate_ED, x_TD.dtype):
            return super().route(x_TD, gate_ED, ctx)
        return Routing(*gate_route(x_TD, gate_ED, self.how, **self.biases()))

    def multiplies_gate(self, n_tokens: int, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """See `Router.multiplies_gate`."""
        E, D = gate_ED.shape
        return multiplies_gate(self.label, n_tokens, D, E, dtype)

    def norms_input(self, n_tokens: int, norm_weight_D: Tensor, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """See `Router.norms_input`."""
        return not is_exporting() and fused.norms_input(self.label, n_tokens, norm_weight_D, gate_ED, dtype)

    def norm_and_route(
        self, x_TD: Tensor, residual_TD: Tensor, norm_weight_D: Tensor, eps: float, gate_ED: Tensor
    ) -> tuple[Tensor, Tensor, Routing]:
        """See `Router.norm_and_route`."""
        normed_TD, total_TD, routed = fused.norm_gate_route(
            x_TD, residual_TD, norm_weight_D, eps, gate_ED, self.how, **self.biases()
        )
        return normed_TD, total_TD, Routing(*routed)
