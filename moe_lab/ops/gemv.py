"""The product of a few rows with a matrix, at the rate at which memory gives the matrix, by kernels of the extension.

    gemv       y = x W^T + b
    norm_gemv  the same of RMSNorm(x + residual), in one launch

A library's product of matrices reads the matrix of a single row at about half the rate of a copy, because its tiles are
made for many rows; of more rows it needs a norm ahead of it (docs/kernels.md). On a CPU both are plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.ops import add_rms_norm, extension
from moe_lab.ops.library import call, register

MOST_ROWS = 8
_MOST_COLUMNS, _MOST_COLUMNS_ALONE, _MOST_ELEMENTS = 8192, 16384, 2**16  # as kernels/decode.h says


def gemv(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[T, N] = x W^T + b, summed in fp32; on a GPU the extension must be loaded.

    Args:
        x_TK: 1 to `MOST_ROWS` rows of fp16 or bf16, contiguous.
        weight_NK: contiguous, of the same dtype. No kernel that may still be running may write it: it is read before
            those ahead have ended (ops/dependent_launch.py).
    """
    result: Tensor = call("gemv", x_TK, weight_NK, bias_N)
    return result


def norm_gemv(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm_K: Tensor,
    eps: float,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(`gemv` of the normed, x + residual). The normed is RMSNorm(x + residual) * norm, rounded as by `add_rms_norm`.

    Args:
        residual_TK: None stands for zeros.
        norm_K: has the dtype of x, as all other tensors do.
    """
    result: tuple[Tensor, Tensor] = call("norm_gemv", x_TK, residual_TK, norm_K, eps, weight_NK, bias_N)
    return result


def is_faster(device: torch.device) -> bool:
    """Whether the kernels are there on `device`, and so faster than torch: on Hopper, with the extension loaded."""
    return extension.has_hopper_kernels(device)


def takes(x: Tensor, *others: Tensor | None, norms: bool = False) -> bool:
    """Whether the kernels take x [..., K], 1 to `MOST_ROWS` rows, with a weight, bias and norm."""
    K = x.shape[-1]
    most = _MOST_COLUMNS if norms else _MOST_COLUMNS_ALONE
    has_one_dtype = x.dtype.itemsize == 2 and all(other is None or other.dtype == x.dtype for other in others)
    fits = 1 <= x.shape[:-1].numel() <= MOST_ROWS and x.numel() <= _MOST_ELEMENTS
    return has_one_dtype and fits and K % 8 == 0 and most >= K


def _gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu":
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.moe_lab.hopper_gemv(x, None, None, 0.0, weight, bias, None)
    return y


def _norm_gemv(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu":
        return _reference(x, residual, norm, eps, weight, bias)
    total = torch.empty_like(x)
    return torch.ops.moe_lab.hopper_gemv(x, residual, norm, eps, weight, bias, total), total


def _reference(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed, total = add_rms_norm.reference(x, torch.zeros_like(x) if residual is None else residual, norm, eps)
    return F.linear(normed, weight, bias), total


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _norm_fake(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), torch.empty_like(x)


register("gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _gemv, _fake, reference=F.linear)
register(
    "norm_gemv(Tensor x, Tensor? residual, Tensor norm, float eps, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _norm_gemv,
    _norm_fake,
    reference=_reference,
)
