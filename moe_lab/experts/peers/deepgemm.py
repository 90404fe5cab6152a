"""experts=deepgemm: DeepGEMM's grouped product of bf16 matrices; what is around it is ours (deepgemm_triton.py).

Its rows are sorted by expert, and each expert's begin at a multiple of 128. So a sort, a gather, SwiGLU and the sum of
a token's slots are needed beside the two products; vLLM and SGLang have kernels of the same kind there.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.routers.base import Routing


class DeepGemm(Peer):
    """As a package of its own, or the copy inside vLLM. It compiles its kernels at the first call with a size."""

    distribution = "deep-gemm"
    modules = ("deep_gemm", "vllm.third_party.deep_gemm")
    capability = (9, 0)
    newer = False
    dtypes = (torch.bfloat16,)
    multiple = 64
    reads_unused = True

    def version(self) -> str:
        """Its own, and whose copy it is."""
        kernels: Any = self.kernels()
        copy_of = "" if kernels.__name__ == "deep_gemm" else f" (in vllm {metadata.version('vllm')})"
        return f"{kernels.__version__}{copy_of}"

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`: our own gather scales the input."""
        check_scale(scale)
        self.require(x_TD.dtype, *weights.w_down_EDF.shape[1:])
        if scale == "output" or not routing.expert_ids_TK.numel():
            return super().__call__(x_TD, routing, weights)
        with phase("dispatch+experts+combine"):
            slots = (routing.expert_ids_TK.contiguous(), routing.weights_TK.contiguous())
            return self._compute(x_TD.contiguous(), *slots, weights.w_gate_up_E2FD, weights.w_down_EDF, True)

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        return self._compute(x_TD, ids_TK, weights_TK, up_E2FD, down_EDF, False)

    def _compute(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor, scales: bool
    ) -> Tensor:
        from moe_lab.experts.peers import deepgemm_triton as around

        kernels = self.kernels()
        E, _, F = down_EDF.shape
        x_MD, expert_M, row_N = around.gather(x_TD, ids_TK, weights_TK, E, scales)
        u_MG = x_MD.new_empty(len(x_MD), 2 * F)
        kernels.m_grouped_bf16_gemm_nt_contiguous(x_MD, up_E2FD, u_MG, expert_M)
        h_MF = around.swiglu(u_MG, row_N)
        o_MD = x_MD  # its rows are not read again
        kernels.m_grouped_bf16_gemm_nt_contiguous(h_MF, down_EDF, o_MD, expert_M)
        return around.combine(o_MD, row_N, weights_TK, scales)
