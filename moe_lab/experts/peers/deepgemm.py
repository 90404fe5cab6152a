"""experts=deepgemm: DeepGEMM's grouped product of bf16 matrices; what is around it is ours (deepgemm_triton.py).

Its rows are sorted by expert, and each expert's begin at a multiple of 128. So a sort (ops/dispatch.py), a gather,
SwiGLU and the sum of a token's slots are needed beside the two products; vLLM and SGLang have kernels of the same kind
there.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from moe_lab.experts.peers.peer import Peer

LAYOUTS = ("ends", "rows")


class DeepGemm(Peer):
    """As a package of its own, or the copy inside vLLM. It compiles its kernels at the first call with a size.

    layout: how it is told whose the rows are. Without a look at the host there are as many rows as may be needed at
    most. With `ends` (its psum layout) it computes those that are used, with `rows` all of them.
    """

    distribution = "deep-gemm"
    pip = "vllm"  # deep-gemm on PyPI is empty
    modules = ("deep_gemm", "vllm.third_party.deep_gemm")
    function = "m_grouped_bf16_gemm_nt_contiguous"
    capability = (9, 0)
    newer = False
    dtypes = (torch.bfloat16,)
    multiple = 64
    reads_unused = True
    sorts = True

    def __init__(self, *, layout: str):
        if layout not in LAYOUTS:
            raise ValueError(f"experts.layout={layout}: must be one of {', '.join(LAYOUTS)}.")
        self.layout = layout

    def version(self) -> str:
        """Its own, and whose copy it is."""
        kernels: Any = self.kernels()
        copy_of = "" if kernels.__name__ == "deep_gemm" else f" (in vllm {metadata.version('vllm')})"
        return f"{kernels.__version__}{copy_of}"

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        from moe_lab.experts.peers import deepgemm_triton as around  # Triton is not there for every platform

        kernels, ends = self.kernels(), self.layout == "ends"
        x_MD, layout, row_N = around.gather(x_TD, ids_TK, len(down_EDF), ends=ends)
        u_MG = x_MD.new_empty(len(x_MD), up_E2FD.shape[1])
        kernels.m_grouped_bf16_gemm_nt_contiguous(x_MD, up_E2FD, u_MG, layout, use_psum_layout=ends)
        h_MF = around.swiglu(u_MG, row_N)
        o_MD = x_MD  # its rows are not read again
        kernels.m_grouped_bf16_gemm_nt_contiguous(h_MF, down_EDF, o_MD, layout, use_psum_layout=ends)
        return around.combine(o_MD, row_N, weights_TK)
