"""Top-k of the softmax: router=torch, triton, cuda_ext, mixtral, qwen3_moe, granite, olmoe, gpt_oss, switch.

    l' = l + b (with `gate_bias`);  p = softmax(l');  S = top-k of p;  w_e = p_e, or p_e / sum_S p with `renormalize`

Shazeer et al. 2017 (1701.06538); renormalised in Mixtral (2401.04088) and Qwen3 (2505.09388), not in OLMoE
(2409.02060). Renormalised it is the softmax over the k chosen logits, as Granite 3.0, JetMoE (2404.07413) and GPT-OSS
(2508.10925) write it; GPT-OSS adds a bias per expert to the logits. With k = 1 and not renormalised it is the Switch
Transformer's (2101.03961). The ranking is done on the logits: it is that of the softmax, but does not lose small
differences to underflow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.ops.library import is_exporting
from moe_lab.ops.route import IMPLEMENTATIONS, Selection, gate_route, multiplies_gate, require_computable, route
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import RouteContext, Router, Routing, require_finite


class SoftmaxTopK(Router):
    """Softmax top-k; every declared property of `Router` holds."""

    implementations = ("torch", *IMPLEMENTATIONS)

    def __init__(
        self, n_experts: int, top_k: int, impl: str = "auto", renormalize: bool = True, gate_bias: bool = False
    ):
        super().__init__(n_experts, top_k, impl)
        self.renormalize = renormalize
        self.bias_E = nn.Parameter(torch.empty(n_experts), requires_grad=False) if gate_bias else None
        self.how = Selection(top_k, renormalize=renormalize)
        require_computable(self.impl, self.how, n_experts, gate_bias=gate_bias)

    def select(self, logits_TE: Tensor, ctx: RouteContext | None = None) -> Routing:
        """See `Router.select`. Raises `ValueError` naming the layer for logits without a softmax."""
        ctx = ctx or RouteContext()
        require_finite(logits_TE, ctx)
        scores_TE = self._biased(logits_TE).float() if ctx.want_scores else None
        if self.impl in IMPLEMENTATIONS and not is_exporting():
            routed = route(logits_TE, self.how, self.impl, gate_bias_E=self.bias_E, sort=ctx.want_dispatch)
            return Routing(*routed, scores_TE=scores_TE)
        biased_TE = self._biased(logits_TE)
        ids_TK = top_k(biased_TE, self.top_k)
        return Routing(ids_TK, weights_of(biased_TE, ids_TK, self.renormalize, all_used=True), scores_TE=scores_TE)

    def route(self, x_TD: Tensor, gate_ED: Tensor, ctx: RouteContext | None = None) -> Routing:
        """See `Router.route`."""
        asks_more = ctx is not None and (ctx.want_scores or ctx.want_dispatch)
        if asks_more or is_exporting() or not self.multiplies_gate(len(x_TD), gate_ED, x_TD.dtype):
            return super().route(x_TD, gate_ED, ctx)
        return Routing(*gate_route(x_TD, gate_ED, self.how, gate_bias_E=self.bias_E))

    def multiplies_gate(self, n_tokens: int, gate_ED: Tensor, dtype: torch.dtype) -> bool:
        """See `Router.multiplies_gate`."""
        E, D = gate_ED.shape
        return multiplies_gate(self.implementation(), n_tokens, D, E, dtype)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(self._biased(logits_TE), expert_ids_TK, self.renormalize)

    def _biased(self, logits_TE: Tensor) -> Tensor:
        return logits_TE if self.bias_E is None else logits_TE.float() + self.bias_E.float()
