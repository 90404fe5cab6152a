"""`rope_append` and `cached_attention` of one new token per sequence in one launch, on Hopper.

On a CPU: plain torch. `takes` says for which models the extension has its kernel; the others, and compiled passes, have
the Triton kernels of `decode_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops import extension
from moe_lab.ops.library import call, register
from moe_lab.ops.rotate import rotate

_HEAD_DIMS = (64, 128)
_MOST_QUERIES = 8  # that share a key; kMostQueries in kernels/decode.h


def one_token_attention(
    q_Bn: Tensor,
    k_Bm: Tensor,
    v_Bm: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    clip: float | None,
    tables: tuple[Tensor, Tensor],
    position_1: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    turn_first: bool = False,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[B, H, d]: what `cached_attention` gives after `rope_append`, with their arguments; the caches are written.

    Positions before `position_1`, and that itself, are read before the kernels ahead have ended; so are the norms and
    `tables`. A pass writes none of them after its embedding.
    """
    d = k_BHNd.shape[3]
    result: Tensor = call(
        "one_token_attention",
        q_Bn,
        k_Bm,
        v_Bm,
        q_norm,
        k_norm,
        eps,
        float("inf") if clip is None else clip,
        *tables,
        position_1,
        k_BHNd,
        v_BHNd,
        turn_first,
        window or k_BHNd.shape[2],
        scale or d**-0.5,
        sinks_H,
    )
    return result


def is_faster(device: torch.device) -> bool:
    """Whether the kernel is there on `device`: Hopper, with the extension loaded."""
    return extension.has_hopper_kernels(device)


def takes(n_tokens: int, queries_per_key: int, head_dim: int, *tensors: Tensor | None) -> bool:
    """Whether the kernel takes so many new tokens of a sequence, and tensors of these dtypes."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    is_half = dtypes in ({torch.float16}, {torch.bfloat16})
    return is_half and n_tokens == 1 and queries_per_key <= _MOST_QUERIES and head_dim in _HEAD_DIMS


def _compute(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool, window: int,
    scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    compute = _reference if q.device.type == "cpu" else torch.ops.moe_lab.hopper_attention
    y: Tensor = compute(
        q, k, v, q_norm, k_norm, eps, clip, cos, sin, position, k_cache, v_cache, turn_first, window, scale, sinks
    )
    return y


def _reference(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool, window: int,
    scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    B, key_heads, N, d = k_cache.shape
    H = q.shape[1] // d
    of_head = q_norm is not None and len(q_norm) == d and H > 1

    def turned(x_Bn: Tensor, weight: Tensor | None) -> Tensor:
        def normed(x: Tensor) -> Tensor:
            return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()

        x = x_Bn.float() if of_head or turn_first else normed(x_Bn.float())
        x_BHd = x.clamp(-clip, clip).view(B, -1, d)
        x_BHd = normed(x_BHd) if of_head and not turn_first else x_BHd
        x_BHd = rotate(x_BHd, cos, sin)
        return (normed(x_BHd) if turn_first else x_BHd).to(x_Bn.dtype)

    k_cache.index_copy_(2, position, turned(k, k_norm).unsqueeze(2))
    v_cache.index_copy_(2, position, v.clamp(-clip, clip).view(B, -1, 1, d))
    q_BHGd = turned(q, q_norm).float().view(B, key_heads, -1, d)
    logits_BHN = torch.einsum("bhgd,bhnd->bhgn", q_BHGd, k_cache.float()).flatten(1, 2) * scale
    key_N = torch.arange(N, device=q.device)
    seen_N = (key_N <= position) & (key_N > position - window)
    logits_BHN = logits_BHN.masked_fill(~seen_N, float("-inf"))
    if sinks is not None:
        logits_BHN = torch.cat([logits_BHN, sinks.float().view(1, H, 1).expand(B, H, 1)], dim=2)
    values = v_cache.float().masked_fill(~seen_N.view(-1, 1), 0)  # what is not there yet may be NaN
    weights_BHGN = logits_BHN.softmax(2)[..., :N].unflatten(1, (key_heads, -1))
    return torch.einsum("bhgn,bhnd->bhgd", weights_BHGN, values).flatten(1, 2).to(q.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool, window: int,
    scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    d = k_cache.shape[3]
    return q.new_empty(q.shape[0], q.shape[1] // d, d)


register(
    "one_token_attention(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, float clip, "
    "Tensor cos, Tensor sin, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, bool turn_first, int window, "
    "float scale, Tensor? sinks) -> Tensor",
    _compute,
    _fake,
    reference=_reference,
)
