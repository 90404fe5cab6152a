"""Experts of one's own: one Triton kernel for the first half of the MLP, moe-lab's ops for the rest.

h[n] = silu(s[n] g) * s[n] u,  (g, u) = x[token(n)] W_gate_up[e]^T,  e the expert of the sorted slot n

s is the routing weight where it multiplies the input, else 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.ops.combine import combine
from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.library import triton_interprets
from moe_lab.ops.segment_mm import implementation_for, segment_mm
from moe_lab.routers.base import Routing


class MyExperts(Experts):
    """The keys of experts/my_experts.yaml are the arguments."""

    graph_safe = True  # the grid follows from shapes; on CUDA no value is read on the host

    def __init__(self, block: int = 32):
        if block < 16 or block & (block - 1):
            raise ValueError(f"experts.block={block}: it must be a power of two of at least 16.")
        self.block = block

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """Triton's kernels run on a GPU, and for tests in its interpreter."""
        if device.type != "cuda" and not triton_interprets():
            raise UnavailableError("its kernel needs device=cuda, or TRITON_INTERPRET=1 on a CPU; use experts=grouped")

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """fp32 or fp16 everywhere, bf16 on CUDA; products are accumulated in fp32."""
        check_scale(scale)
        used_TK, weights_TK = routing.expert_ids_TK >= 0, routing.weights_TK.contiguous()
        with phase("dispatch"):
            order = routing.dispatch or dispatch(routing.expert_ids_TK, weights.n_experts)
        with phase("experts"):
            slots = (order.perm_N, order.offsets_E1, weights_TK)
            h_NF = gate_up(x_TD.contiguous(), weights.w_gate_up_E2FD, *slots, scale == "input", self.block)
            o_ND = segment_mm(h_NF, weights.w_down_EDF, order.offsets_E1, segment_mm_for(x_TD, weights))
        with phase("combine"):
            return combine(o_ND, order.inverse_N, weights_TK if scale == "output" else used_TK.float(), used_TK)

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        """A router whose kernel sorts the slots saves us a sort."""
        return True

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """What stands in the record."""
        return {"experts": f"my_experts:block_{self.block}", "segment_mm": segment_mm_for(x_TD, weights)}


def segment_mm_for(x_TD: Tensor, weights: ExpertWeights) -> str:
    """Which kernel multiplies by W_down."""
    return implementation_for(x_TD.device, x_TD.dtype, *weights.w_down_EDF.shape[1:])


# An op, so that execution=compile sees one node and does not look into the launch.
@torch.library.custom_op("my_experts::gate_up", mutates_args=())
def gate_up(
    x: Tensor, w_gate_up: Tensor, perm: Tensor, offsets: Tensor, weights: Tensor, scales_input: bool, block: int
) -> Tensor:
    """h_NF [T * K, F] in x's dtype; rows of unused slots hold anything."""
    (E, F2, D), N, K = w_gate_up.shape, perm.numel(), weights.shape[1]
    F = F2 // 2
    h = x.new_empty(N, F)
    if N:
        grid = (triton.cdiv(N, block) + E, triton.cdiv(F, 64))  # each expert may leave one tile partly filled
        sizes = {"BLOCK_E": triton.next_power_of_2(E), "BLOCK_N": block, "BLOCK_F": 64, "BLOCK_D": 32}
        _gate_up[grid](x, w_gate_up, perm, offsets, weights, h, E, F, D, K, SCALES_INPUT=scales_input, **sizes)
    return h


@gate_up.register_fake
def _(x, w_gate_up, perm, offsets, weights, scales_input, block):
    return x.new_empty(perm.numel(), w_gate_up.shape[1] // 2)


@triton.jit
def _gate_up(
    x_ptr, w_ptr, perm_ptr, offsets_ptr, weights_ptr, h_ptr, E, F, D, K, SCALES_INPUT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Which expert owns this tile of rows: the tiles of all experts, counted up.
    tile, expert = tl.program_id(0), tl.arange(0, BLOCK_E)
    starts = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    stops = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0)
    tiles = (stops - starts + BLOCK_N - 1) // BLOCK_N
    owner = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if owner >= E:
        return
    first_tile = tl.sum(tl.where(expert < owner, tiles, 0), axis=0)
    row = tl.load(offsets_ptr + owner) + (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < tl.load(offsets_ptr + owner + 1)
    slot = tl.load(perm_ptr + row, mask=is_row, other=0)

    column, depth = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    x_at = x_ptr + (slot // K).to(tl.int64)[:, None] * D + depth[None, :]
    gate_row = owner.to(tl.int64) * 2 * F + column[None, :]
    gate_at = w_ptr + gate_row * D + depth[:, None]
    up_at = w_ptr + (gate_row + F) * D + depth[:, None]
    gate = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        is_depth = depth + d < D
        is_weight = is_depth[:, None] & (column[None, :] < F)
        x = tl.load(x_at + d, mask=is_row[:, None] & is_depth[None, :], other=0.0)
        gate += tl.dot(x, tl.load(gate_at + d, mask=is_weight, other=0.0), input_precision="ieee")
        up += tl.dot(x, tl.load(up_at + d, mask=is_weight, other=0.0), input_precision="ieee")
    if SCALES_INPUT:
        weight = tl.load(weights_ptr + slot, mask=is_row, other=0.0)[:, None]
        gate, up = gate * weight, up * weight
    h = gate * tl.sigmoid(gate) * up
    h_at = h_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < F))
