"""Turning queries and keys by their positions' angles: dimension i together with i + d/2 (RoPE, 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import call, is_exporting, register


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; computed in fp32, returned in x's dtype."""
    if is_exporting():  # one node of the graph
        return torch.ops.moe_lab.rotate(x_BHSd, cos_Sd, sin_Sd)  # type: ignore[no-any-return]
    return _compute(x_BHSd, cos_Sd, sin_Sd)


def rotate_both(
    q_BHSd: Tensor, k_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, implementation: str = "torch"
) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and of keys, which may have another number of heads.

    Args:
        q_BHSd, k_BHSd: one dtype; any strides where the last is 1.
        cos_Sd, sin_Sd: fp32, contiguous.
        implementation: `torch`, or `triton`: both in one launch.
    """
    if implementation == "torch" or is_exporting():
        return rotate(q_BHSd, cos_Sd, sin_Sd), rotate(k_BHSd, cos_Sd, sin_Sd)
    assert implementation == "triton", implementation
    return call("rotate_both", q_BHSd, k_BHSd, cos_Sd, sin_Sd)  # type: ignore[no-any-return]


def _compute(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    y = wide * cos
    (y1, y2), (x1, x2), (sin1, sin2) = (part.chunk(2, dim=-1) for part in (y, wide, sin))  # fewer calls than slices
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


def _both_by_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from moe_lab.ops.rotate_triton import launch

    q_out, k_out = _of_tokens(q), _of_tokens(k)
    launch(q, k, cos, sin, q_out, k_out)
    return q_out, k_out


def _both_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _of_tokens(q), _of_tokens(k)


def _both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _compute(q, cos, sin), _compute(k, cos, sin)


def _of_tokens(x_BHSd: Tensor) -> Tensor:
    """Room for as much, where the heads of a token lie together."""
    B, H, S, d = x_BHSd.shape
    return x_BHSd.new_empty(B, S, H, d).transpose(1, 2)


register("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", _compute, _fake, onnx="moe_lab.ops.rotate_onnx")
register(
    "rotate_both(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _both_by_triton,
    _both_fake,
    reference=_both,
)
