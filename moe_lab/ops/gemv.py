"""`gemv`: y = x W^T + b of one row, at the rate at which the memory gives the matrix.

A library's product of matrices reads the matrix of a single row at about half the rate of a copy, because its tiles are
made for many rows. For two rows or more it is as quick as this kernel (docs/kernels.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.ops.library import HAS_TRITON, call, capability, register


def gemv(x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[1, N] = x W^T + b, summed in fp32, by the Triton kernel.

    Args:
        x_1K: one row with unit stride.
        weight_NK: contiguous, of the same dtype. On sm_90 no kernel that may still be running may write it: it is read
            before those ahead have ended (ops/dependent_launch.py).
    """
    result: Tensor = call("gemv", x_1K, weight_NK, bias_N)
    return result


def is_faster(device: torch.device) -> bool:
    """Whether `gemv` is faster than torch on `device`: on Hopper, where it was measured."""
    return HAS_TRITON and capability(device)[0] == 9


def _gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from moe_lab.ops.gemv_triton import launch

    return launch(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(1, weight.shape[0])


register("gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _gemv, _fake, reference=F.linear)
