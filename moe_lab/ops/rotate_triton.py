"""The Triton kernel of `rotate_both`: a program turns the queries of a token, or its keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    x_ptr, y_ptr, cos_ptr, sin_ptr, b, s, S, heads, stride_b, stride_h, stride_s, half,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    h, i = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    inside = (h < heads) & (i < half)
    x_ptr += b * stride_b + s * stride_s + h.to(tl.int64) * stride_h + i
    first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
    angles = s * 2 * half + i
    cos_first = tl.load(cos_ptr + angles, mask=i < half, other=0.0)
    cos_second = tl.load(cos_ptr + angles + half, mask=i < half, other=0.0)
    sin_first = tl.load(sin_ptr + angles, mask=i < half, other=0.0)
    sin_second = tl.load(sin_ptr + angles + half, mask=i < half, other=0.0)
    y_ptr += ((b * S + s) * heads + h) * 2 * half + i
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr, (first * cos_first - second * sin_first).to(dtype), mask=inside)
    tl.store(y_ptr + half, (second * cos_second + first * sin_second).to(dtype), mask=inside)


@triton.jit
def _kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, S, H, H_KV, half,
    q_b, q_h, q_s, k_b, k_h, k_s,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    if tl.program_id(1) == 0:
        _turn(q_ptr, q_out_ptr, cos_ptr, sin_ptr, b, s, S, H, q_b, q_h, q_s, half, BLOCK_H, BLOCK_HALF)
    else:
        _turn(k_ptr, k_out_ptr, cos_ptr, sin_ptr, b, s, S, H_KV, k_b, k_h, k_s, half, BLOCK_KV, BLOCK_HALF)


def launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """Run the kernel; arguments as `rotate_both`. In the results the heads of a token lie together."""
    (B, H, S, d), H_KV = q.shape, k.shape[1]
    q, k = (part if part.stride(3) == 1 else part.contiguous() for part in (q, k))
    if B * S == 0:
        return
    _kernel[(B * S, 2)](
        q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), S, H, H_KV, d // 2, *q.stride()[:3], *k.stride()[:3],
        BLOCK_H=triton.next_power_of_2(H), BLOCK_KV=triton.next_power_of_2(H_KV),
        BLOCK_HALF=triton.next_power_of_2(d // 2), num_warps=4,
    )  # fmt: skip
