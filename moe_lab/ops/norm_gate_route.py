"""The norm before an MLP, the product with its gate and the route, of a few tokens by one kernel: a launch less.

    normed, total = add_rms_norm(x, residual);  ids, weights = gate_route(normed)

The kernel reads its weights before the kernels before it have ended, so nothing of the same pass may write them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.gemv import MOST_ROWS
from moe_lab.ops.route import Routed, arguments
from moe_lab.ops.selection import Selection

MOST_WIDTH, MOST_EXPERTS, MOST_ELEMENTS = 8192, 256, 2**20  # as kernels/route.h says


def norms_input(computes: str, n_tokens: int, norm_weight_D: Tensor, gate_ED: Tensor, dtype: torch.dtype) -> bool:
    """Whether a router computed by `computes` (`cuda_ext:sm_90`, say) has `norm_gate_route` for x of this dtype."""
    E, D = gate_ED.shape
    return (
        1 <= n_tokens <= MOST_ROWS
        and computes == "cuda_ext:sm_90"
        and dtype in (torch.float16, torch.bfloat16)
        and norm_weight_D.dtype == gate_ED.dtype == dtype  # no copy, which would be written in the same pass
        and norm_weight_D.is_contiguous()
        and gate_ED.is_contiguous()
        and D % 8 == 0
        and D <= MOST_WIDTH
        and 1 < E <= MOST_EXPERTS
        and E * D <= MOST_ELEMENTS
    )


def norm_gate_route(
    x_TD: Tensor,
    residual_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    gate_ED: Tensor,
    how: Selection,
    *,
    gate_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routed]:
    """Only where `norms_input` is true: (normed, total, what is chosen)."""
    inputs = (x_TD.contiguous(), residual_TD.contiguous(), norm_weight_D, eps, gate_ED)
    normed_TD, total_TD, *routed = torch.ops.moe_lab.norm_gate_route(*inputs, *arguments(how, gate_bias_E, bias_E))
    return normed_TD, total_TD, Routed(*routed)
