"""Residual add and RMSNorm in one pass: each tensor is read once and written once.

    sum = x + residual;  normed = sum / sqrt(mean(sum^2) + eps) * weight         (RMSNorm: Zhang & Sennrich, 1910.07467)

The sum is rounded to the tensors' dtype before it is squared, as if it had been stored; the rest is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import call, register
from moe_lab.ops.rms_norm import rms_norm

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain torch. Shapes and dtypes as `add_rms_norm`."""
    total = x + residual
    if total.dtype == weight.dtype == torch.float32:  # one pass
        return rms_norm(total, weight, eps), total
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(x.dtype), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, implementation: str = "torch"
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual) * weight, x + residual).

    Args:
        x, residual: [..., D], one dtype (fp32, fp16 or bf16), any strides.
        weight: [D], any floating dtype.
        eps: added to the mean square.
        implementation: `torch` or `triton`, as `library.resolve_implementation` gives.

    Returns:
        Two contiguous tensors of x's shape and dtype.

    Raises:
        ValueError: the shapes or dtypes do not match.
    """
    return call("add_rms_norm", x, residual, weight, eps, implementation)  # type: ignore[no-any-return]


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or x.dtype not in _DTYPES or not weight.is_floating_point():
        raise ValueError(
            "add_rms_norm: x must be [..., D] in fp32, fp16 or bf16 and weight must be floating-point; got x "
            f"{tuple(x.shape)} {x.dtype} and weight {weight.dtype}"
        )
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            "add_rms_norm: x and residual must have the same shape and dtype; got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(residual.shape)} {residual.dtype}"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"add_rms_norm: weight {tuple(weight.shape)} must be [{x.shape[-1]}]")


def _compute(x: Tensor, residual: Tensor, weight: Tensor, eps: float, implementation: str) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    if implementation == "torch":
        normed, total = reference(x, residual, weight, eps)
        return normed.contiguous(), total.contiguous()
    assert implementation == "triton", implementation
    from moe_lab.ops.add_rms_norm_triton import launch

    return launch(x, residual, weight, eps)


def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, implementation: str) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str implementation) -> (Tensor, Tensor)",
    _compute,
    _fake,
    reference=reference,
    onnx="moe_lab.ops.add_rms_norm_onnx",
)
