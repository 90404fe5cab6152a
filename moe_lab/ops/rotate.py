"""Turning queries and keys by their positions' angles: dimension i together with i + d/2 (RoPE, 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting, register


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; computed in fp32, returned in x's dtype."""
    if is_exporting():  # one node of the graph
        return torch.ops.moe_lab.rotate(x_BHSd, cos_Sd, sin_Sd)  # type: ignore[no-any-return]
    return _compute(x_BHSd, cos_Sd, sin_Sd)


def _compute(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.float()
    y = wide * cos
    y[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return y.to(x.dtype)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


register("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", _compute, _fake, onnx="moe_lab.ops.rotate_onnx")
