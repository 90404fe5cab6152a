"""Attention of one new token per sequence on a cache, in two ops: what goes into the cache, and what is read from it.

    rope_append       queries and keys are normed and turned, keys and values written into the cache at the position
    cached_attention  softmax(scale q k^T) v over the positions up to it, and a sink if there is one

The Triton kernels read the position on the device and touch only what is cached up to it, the keys of a sequence in
pieces side by side (split-K: FlashDecoding, Dao et al. 2023), so that a batch of one fills a GPU. `models/attention.py`
computes the same in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import call, register


def rope_append(
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
) -> Tensor:
    """Queries [B, H, d] normed, clamped and turned; keys and values go into the cache at `position_1` in the same way.

    Args:
        q_Bn, k_Bm, v_Bm: projections [B, heads * d].
        q_norm, k_norm: RMSNorm weights of the width d (each head alone) or of the whole projection, which a single head
            of q counts as; None: no norm.
        clip: all three are clamped to +- this, after a norm of the whole projection and before one of each head.
        tables: cos and sin [1, d] fp32 of the position.
        turn_first: the norm of each head comes after the rotation.
    """
    result: Tensor = call(
        "rope_append",
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
    )
    return result


def cached_attention(
    q_BHd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    position_1: Tensor,
    window: int | None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[B, H, d]: attention of each query on the cached positions 0 .. position, of those the last `window`.

    Args:
        k_BHNd, v_BHNd: as many heads as q, or fewer, each for as many neighbouring ones of q.
        position_1: int64 [1].
        scale: None: 1/sqrt(d).
        sinks_H: a logit of each head of q that takes its share of the softmax; None: there are none.
    """
    window = window or k_BHNd.shape[2]
    result: Tensor = call("cached_attention", q_BHd, k_BHNd, v_BHNd, position_1, window, scale, sinks_H)
    return result


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
