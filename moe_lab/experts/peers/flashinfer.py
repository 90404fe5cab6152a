"""experts=flashinfer: FlashInfer's two grouped products for Hopper in the CuTe DSL, with gather, SwiGLU and sum inside.

Its own sort compiles sources that it downloads; here ours (flashinfer_triton.py) makes the same index maps. The second
product adds the slots of a token in x's dtype and in any order, which is FlashInfer's default, so the last bits differ
from call to call.

It needs the rows of gate and up in alternating blocks of 32. They are laid out so at the first call with a layer's
weights, a copy that is kept as long as the weights are; this is not timed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.weights import ExpertWeights

_FOLDER = "flashinfer.fused_moe.cute_dsl"
DEFAULT = (128, (64, 1), (64, (1, 1), False))
"""Rows of a tile; of the first product columns and swizzle; of the second columns, cluster and order of tiles."""
TACTICS = (
    DEFAULT,
    (64, (128, 1), (128, (1, 2), False)),
    (64, (256, 1), (256, (1, 2), False)),
    (128, (128, 8), (128, (1, 2), False)),
    (128, (192, 8), (256, (1, 2), False)),
    (128, (256, 8), (256, (1, 2), False)),
)
"""Of the 288 that its tuner would try those that differ most; each is compiled in seconds."""


class FlashInfer(Peer):
    """tune: try `TACTICS` at the first call with a size, outside what is timed; else FlashInfer's default."""

    distribution = "flashinfer-python"
    modules = (f"{_FOLDER}.sm90_contiguous_gather_grouped_gemm_act_fusion",)
    capability = (9, 0)
    newer = False
    multiple = 32
    reads_unused = True

    def __init__(self, *, tune: bool):
        self.tune = tune
        self._laid_out: Any = WeakIdKeyDictionary()
        self._chosen: dict[Any, Any] = {}

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: as `flashinfer-python 0.7.4 tuned, gate and up laid out anew`."""
        tiles = f"best of {len(TACTICS)} tactics" if self.tune else "default tactic"
        return {"experts": f"{super().implementation(x_TD, weights)['experts']} {tiles}, gate and up laid out anew"}

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_up_E2FD: Tensor, w_down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        if w_up_E2FD not in self._laid_out:
            self._laid_out[w_up_E2FD] = self.kernels().interleave_up_gate_sm90(w_up_E2FD)
        operands = (x_TD, ids_TK, weights_TK, self._laid_out[w_up_E2FD], w_down_EDF)
        if not self.tune:
            return self._run(DEFAULT, *operands)
        size = (x_TD.dtype, *ids_TK.shape, *w_down_EDF.shape)
        if size not in self._chosen:
            self._chosen[size] = min(TACTICS, key=lambda tactic: self._milliseconds(tactic, operands))
        return self._run(self._chosen[size], *operands)

    def _milliseconds(self, tactic: Any, operands: tuple[Tensor, ...]) -> float:
        """The shortest of three calls after one that compiles; infinity if the kernels refuse the tactic."""
        try:
            self._run(tactic, *operands)
        except ValueError:
            return float("inf")
        times = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._run(tactic, *operands)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    def _run(
        self, tactic: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        from moe_lab.experts.peers.flashinfer_triton import index_maps

        second: Any = importlib.import_module(f"{_FOLDER}.sm90_contiguous_grouped_gemm_finalize_fusion")
        rows, (columns, swizzle), (down_columns, cluster, along_rows) = tactic
        tile_expert, tile_limit, slot_M, n_tiles = index_maps(ids_TK, len(w_down_EDF), rows)
        h_MF = self.kernels().sm90_contiguous_gather_grouped_gemm_act_fusion(
            x_TD,
            w_up_E2FD,
            tile_expert,
            tile_limit,
            slot_M,
            n_tiles,
            topk=ids_TK.shape[1],
            permuted_m=len(slot_M),
            tile_shape_mn=(rows, columns),
            swizzle_size=swizzle,
        )
        y_TD = torch.zeros_like(x_TD)
        second.sm90_contiguous_grouped_gemm_finalize_fusion(
            h_MF,
            w_down_EDF,
            tile_expert,
            tile_limit,
            slot_M,
            n_tiles,
            weights_TK,
            y_TD,
            topk=ids_TK.shape[1],
            tile_shape_mn=(rows, down_columns),
            cluster_shape_mn=cluster,
            raster_along_m=along_rows,
        )
        return y_TD
