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

from moe_lab.ops.selection import Selection
from moe_lab.ops.softmax_topk import weights_of
from moe_lab.routers.selection import SelectionRouter


class SoftmaxTopK(SelectionRouter):
    """Softmax top-k; every declared property of `Router` holds."""

    def __init__(self, n_experts: int, top_k: int, *, impl: str, renormalize: bool, gate_bias: bool):
        super().__init__(n_experts, top_k, impl)
        self.renormalize = renormalize
        self.bias_E = nn.Parameter(torch.empty(n_experts), requires_grad=False) if gate_bias else None
        self.describe(Selection(top_k, renormalize=renormalize))

    def biases(self) -> dict[str, Tensor | None]:
        """See `SelectionRouter.biases`."""
        return {"gate_bias_E": self.bias_E}

    def ranked(self, logits_TE: Tensor) -> Tensor:
        """The logits, biased."""
        return logits_TE if self.bias_E is None else logits_TE.float() + self.bias_E.float()

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `Router.weigh`."""
        return weights_of(self.ranked(logits_TE), expert_ids_TK, self.renormalize)

    def weigh_chosen(self, logits_TE: Tensor, ranked_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `SelectionRouter.weigh_chosen`."""
        return weights_of(ranked_TE, expert_ids_TK, self.renormalize, all_used=True)
