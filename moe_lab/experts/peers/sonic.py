"""experts=sonic: SonicMoE (2512.14080) on QuACK's grouped products for Hopper, with the gather and SwiGLU inside."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.weights import ExpertWeights


class Sonic(Peer):
    """Its own steps of inference, one after the other, because it has no function that takes ids.

    tune: try all of QuACK's tiles at the first call with a size, outside what is timed; else its default tile.
    """

    distribution = "sonic-moe"
    modules = ("sonicmoe.functional",)
    function = "TC_topk_router_metadata_triton"
    capability = (9, 0)
    multiple = 64

    def __init__(self, *, tune: bool):
        self.tune = tune

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: as `sonic-moe 0.1.2.post1 tuned`."""
        tiles = "tuned" if self.tune else "default tile"
        return {"experts": f"{super().implementation(x_TD, weights)['experts']} {tiles}"}

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        sonic = self.kernels()
        quack: Any = importlib.import_module("quack.gemm_interface")
        gather: Any = importlib.import_module("sonicmoe.functional.reduction_over_k_gather")
        (T, K), (E, D, F) = ids_TK.shape, down_EDF.shape
        N, y_TD = T * K, torch.empty_like(x_TD)
        counts_E, offsets_E1 = ids_TK.new_empty(E), ids_TK.new_empty(E + 1)
        token_N, slot_N, row_N = ids_TK.new_empty(N), ids_TK.new_empty(N), ids_TK.new_empty(N)
        sonic.TC_topk_router_metadata_triton(ids_TK, E, counts_E, offsets_E1, token_N, slot_N, row_N)
        h_NF, o_ND = x_TD.new_empty(N, F), x_TD.new_empty(N, D)
        quack.gemm_gated(
            x_TD,
            up_E2FD.mT,
            activation="swiglu",
            cu_seqlens_m=offsets_E1,
            A_idx=token_N,
            postact_out=h_NF,
            store_preact=False,
            concat_layout=("B",),
            tuned=self.tune,
        )
        quack.gemm(h_NF, down_EDF.mT, out=o_ND, cu_seqlens_m=offsets_E1, tuned=self.tune)
        summed = (o_ND, weights_TK.view(-1), y_TD, row_N, None, T, K, D, False)
        gather.token_gather_and_sum_varlen_K_triton(*summed)
        return y_TD
