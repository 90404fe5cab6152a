"""experts=flashinfer: FlashInfer's two grouped products for Hopper in the CuTe DSL, with gather, SwiGLU and sum inside.

Its own sort compiles sources that it downloads; here ours makes the same index maps (flashinfer_triton.py). The second
product adds the slots of a token in x's dtype and in any order, which is FlashInfer's default, so the last bits differ
from call to call.

It needs the rows of gate and up in alternating blocks of 32. They are laid out so at the first call with a layer's
weights, a copy that is kept as long as the weights are; this is not timed.
"""

from __future__ import annotations

import importlib
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_lab.errors import UnavailableError
from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.peers.tuning import fastest
from moe_lab.experts.weights import ExpertWeights

_FOLDER = "flashinfer.fused_moe.cute_dsl"


class Tactic(NamedTuple):
    """How the two products are cut into tiles of `rows` rows.

    up: columns of a tile, and how many tiles of rows take turns. down: columns, cluster, whether rows come first.
    """

    rows: int
    up: tuple[int, int]
    down: tuple[int, tuple[int, int], bool]


DEFAULT = Tactic(128, (64, 1), (64, (1, 1), False))
ROWS = (64, 128)
UP = tuple(product((256, 192, 128, 64), (1, 8)))
DOWN = tuple(product((256, 128), ((1, 1), (1, 2)), (False, True)))
"""What is tried: of FlashInfer's own list without swizzle 16 and without 64 columns in the second product."""


class FlashInfer(Peer):
    """tune: try `UP` and `DOWN` at the first call with a size, outside what is timed; else FlashInfer's default."""

    distribution = "flashinfer-python"
    modules = (f"{_FOLDER}.sm90_contiguous_gather_grouped_gemm_act_fusion",)
    function = "interleave_up_gate_sm90"
    capability = (9, 0)
    newer = False
    multiple = 32
    reads_unused = True
    sorts = True

    def __init__(self, *, tune: bool):
        self.tune = tune
        self._laid_out: Any = WeakIdKeyDictionary()
        self._chosen: dict[Any, Tactic] = {}

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: as `flashinfer-python 0.7.4 tuned, gate and up laid out anew`."""
        tiles = "tuned" if self.tune else "default tactic"
        ran = super().implementation(x_TD, weights)
        return {**ran, "experts": f"{ran['experts']} {tiles}, gate and up laid out anew"}

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        if up_E2FD not in self._laid_out:
            self._laid_out[up_E2FD] = self.kernels().interleave_up_gate_sm90(up_E2FD)
        up_E2FD, tactic = self._laid_out[up_E2FD], DEFAULT
        if self.tune:
            size = (x_TD.dtype, *ids_TK.shape, *down_EDF.shape)
            if size not in self._chosen:
                self._chosen[size] = self._choose(x_TD, ids_TK, weights_TK, up_E2FD, down_EDF)
            tactic = self._chosen[size]
        y_TD = torch.zeros_like(x_TD)  # here, so that the second product follows the first and may overlap its end
        maps, K = _index_maps(ids_TK, len(down_EDF), tactic.rows), ids_TK.shape[1]
        h_MF = self._up(x_TD, up_E2FD, maps, K, tactic.rows, *tactic.up)
        return self._down(h_MF, down_EDF, maps, weights_TK, y_TD, tactic.rows, *tactic.down)

    def _up(self, x_TD: Tensor, w_E2FD: Tensor, maps: Any, K: int, rows: int, columns: int, swizzle: int) -> Tensor:
        kernel = self.kernels().sm90_contiguous_gather_grouped_gemm_act_fusion
        shape, M = (rows, columns), len(maps[2])
        result: Tensor = kernel(x_TD, w_E2FD, *maps, topk=K, permuted_m=M, tile_shape_mn=shape, swizzle_size=swizzle)
        return result

    def _down(
        self,
        h_MF: Tensor,
        w_EDF: Tensor,
        maps: Any,
        weights_TK: Tensor,
        y_TD: Tensor,
        rows: int,
        columns: int,
        cluster: Any,
        first: bool,
    ) -> Tensor:
        module: Any = importlib.import_module(f"{_FOLDER}.sm90_contiguous_grouped_gemm_finalize_fusion")
        module.sm90_contiguous_grouped_gemm_finalize_fusion(
            h_MF,
            w_EDF,
            *maps,
            weights_TK,
            y_TD,
            topk=weights_TK.shape[1],
            tile_shape_mn=(rows, columns),
            cluster_shape_mn=cluster,
            raster_along_m=first,
        )
        return y_TD

    def _choose(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_E2FD: Tensor, w_EDF: Tensor) -> Tactic:
        """The rows, and for them the fastest of each product. Rows with which a product is refused are left out."""
        found, refusals, y_TD = [], [], torch.zeros_like(x_TD)
        for rows in ROWS:
            maps, K = _index_maps(ids_TK, len(w_EDF), rows), ids_TK.shape[1]
            of_rows = f"{self.distribution}, tiles of {rows} rows"
            try:
                up, up_ms = fastest(partial(self._up, x_TD, w_E2FD, maps, K, rows), UP, f"{of_rows} for gate and up")
                h_MF = self._up(x_TD, w_E2FD, maps, K, rows, *up)
                down = partial(self._down, h_MF, w_EDF, maps, weights_TK, y_TD, rows)
                down_tile, down_ms = fastest(down, DOWN, f"{of_rows} for down")
            except UnavailableError as error:
                refusals.append(error)
            else:
                found.append((up_ms + down_ms, Tactic(rows, up, down_tile)))
        if not found:
            raise refusals[-1]
        return min(found)[1]


def _index_maps(ids_TK: Tensor, E: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_lab.experts.peers.flashinfer_triton import index_maps  # Triton is not there for every platform

    return index_maps(ids_TK, E, rows)
