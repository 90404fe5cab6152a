"""experts=vllm: vLLM's Triton kernels (`fused_experts`), with its tables of tiles for this GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.peers.peer import Peer


class Vllm(Peer):
    """It sorts by `moe_align_block_size`; for few slots it does not sort, and each slot is a tile."""

    distribution = "vllm"
    modules = ("vllm.model_executor.layers.fused_moe.fused_moe",)
    function = "fused_experts"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        result: Tensor = self.kernels().fused_experts(x_TD, up_E2FD, down_EDF, weights_TK, ids_TK)
        return result
