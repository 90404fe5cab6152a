"""Attention of a few new tokens per sequence on a cache, in two ops: what goes into it, and what is read from it.

    rope_append       queries and keys are normed and turned, keys and values written into the cache at the position
    cached_attention  softmax(scale q k^T) v over the positions up to it, and a sink if there is one

Rows of queries, keys and values are tokens: R = B S of them, those of a sequence one after the other. The S positions
are the same in every sequence, one after the other.

The Triton kernels read the position on the device and touch only what is cached up to it, the keys of a sequence in
pieces side by side (split-K: FlashDecoding, Dao et al. 2023), so that a batch of one fills a GPU. `models/attention.py`
computes the same in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import call, register

_TILE = 1 << 13  # elements of a query tile


def rope_append(
    q_Rn: Tensor,
    k_Rm: Tensor,
    v_Rm: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    clip: float | None,
    tables: tuple[Tensor, Tensor],
    position_S: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    turn_first: bool = False,
) -> Tensor:
    """Queries [R, H, d] normed, clamped and turned; keys and values go into the cache at `position_S` in the same way.

    Args:
        q_Rn, k_Rm, v_Rm: projections [R, heads * d].
        q_norm, k_norm: RMSNorm weights of the width d (each head alone) or of the whole projection, which a single head
            of q counts as; None: no norm.
        clip: all three are clamped to +- this, after a norm of the whole projection and before one of each head.
        tables: cos and sin [S, d] fp32 of the positions.
        position_S: int64.
        turn_first: the norm of each head comes after the rotation.
    """
    result: Tensor = call(
        "rope_append",
        q_Rn,
        k_Rm,
        v_Rm,
        q_norm,
        k_norm,
        eps,
        float("inf") if clip is None else clip,
        *tables,
        position_S,
        k_BHNd,
        v_BHNd,
        turn_first,
    )
    return result


def cached_attention(
    q_RHd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    position_S: Tensor,
    window: int | None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[R, H, d]: attention of each query on the cached positions 0 .. its own, of those the last `window`.

    Args:
        k_BHNd, v_BHNd: as many heads as q, or fewer, each for as many neighbouring ones of q.
        position_S: int64, rising by 1; `takes` says how many.
        scale: None: 1/sqrt(d).
        sinks_H: a logit of each head of q that takes its share of the softmax; None: there are none.
    """
    window = window or k_BHNd.shape[2]
    result: Tensor = call("cached_attention", q_RHd, k_BHNd, v_BHNd, position_S, window, scale, sinks_H)
    return result


def takes(n_tokens: int, queries_per_key: int, head_dim: int) -> bool:
    """Whether the kernels take so many new tokens of a sequence: registers hold a tile of them, for each key head."""
    rows, width = (1 << (size - 1).bit_length() for size in (n_tokens * queries_per_key, head_dim))
    return n_tokens == 1 or rows * max(width, 64) <= _TILE


def _append(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool = False,
) -> Tensor:  # fmt: skip
    from moe_lab.ops.decode_attention_triton import launch_append

    return launch_append(q, k, v, q_norm, k_norm, eps, clip, cos, sin, position, k_cache, v_cache, turn_first)


def _append_fake(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool = False,
) -> Tensor:  # fmt: skip
    d = k_cache.shape[3]
    return q.new_empty(q.shape[0], q.shape[1] // d, d)


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, window: int, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from moe_lab.ops.decode_attention_triton import launch_attention

    return launch_attention(q, k_cache, v_cache, position, window, scale or q.shape[2] ** -0.5, sinks)


def _attention_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, window: int, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, float clip, Tensor cos, "
    "Tensor sin, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, bool turn_first=False) -> Tensor",
    _append,
    _append_fake,
)
register(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, int window, float? scale=None, "
    "Tensor? sinks=None) -> Tensor",
    _attention,
    _attention_fake,
)
