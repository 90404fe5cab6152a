"""Fake quantisation: what a weight would be in few bits, as a tensor of its own dtype.

    s = max |w| / L over a group of neighbouring columns of a row, rounded to bfloat16
    w' = s * round(w / s), at most L in size;  L = 127 (int8), 7 (int4), 448 (fp8: rounded to float8 e4m3)

Symmetric, round to nearest, without calibration: the plainest scheme, so what it loses is an upper bound for better
ones. The values are those that a kernel for the format would dequantise; the tensor takes as much memory as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {"int8": 8, "int4": 4, "fp8": 8}
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
FORMATS = tuple(_BITS)
_SCALE_BYTES = 2


def fake_quantize(w: Tensor, form: str, group_size: int | None) -> Tensor:
    """`w` [..., columns] of any floating dtype, rounded to `form` (see the head of this file); a new tensor.

    Args:
        form: one of `FORMATS`.
        group_size: columns that share a scale, a divisor of their number; None: a whole row.
    """
    wide = w.float().unflatten(-1, (-1, group_size or w.shape[-1]))
    scale = (wide.abs().amax(-1, keepdim=True) / _LARGEST[form]).bfloat16().float()
    # Of a group of zeros the scale is 0; and a scale that was rounded down would let the largest value out of range.
    steps = (wide / torch.where(scale > 0, scale, 1)).clamp(-_LARGEST[form], _LARGEST[form])
    steps = steps.to(torch.float8_e4m3fn).float() if form == "fp8" else steps.round()
    rounded: Tensor = steps * scale
    return rounded.flatten(-2).to(w.dtype)


def stored_bytes(w: Tensor, form: str, group_size: int | None) -> int:
    """Bytes of `w` in the format: the values, and 2 for the scale of each group."""
    return w.numel() * _BITS[form] // 8 + w.numel() // (group_size or w.shape[-1]) * _SCALE_BYTES
