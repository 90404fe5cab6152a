"""softmax(scale q k^T) v of a causal model: which keys a query sees, and who computes it in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moe_lab.models.attention_backend import softmax_product
from moe_lab.ops.library import is_exporting

SINK_WIDTH = 8
"""Dimensions that sinks add to a head: kernels want multiples."""
_count: Callable[[int], None] | None = None


@contextmanager
def products_counted(count: Callable[[int], None] | None) -> Iterator[None]:
    """Inside, `count` is given the operations of each `attend` (2 per multiply-add), those of the seen keys alone.

    What torch computes for it, often a whole square, no counter of torch sees.
    """
    global _count
    before, _count = _count, count
    try:
        yield
    finally:
        _count = before


def attend(
    q_BHSd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    position_S: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over the keys at most as late as the query, and of those the last `window`.

    Args:
        position_S: where in 0 .. N-1 the queries stand; None: they are the last S, in order.
        scale: None: 1/sqrt(d).
        sinks_H: a logit of each head that takes its share of the softmax and adds nothing (gpt-oss).
        backend: who computes it (attention_backend.py).

    Returns:
        [B, H, S, width of v]; k and v may have fewer heads, each for as many neighbouring ones of q.
    """
    (B, H, S, d), N = q_BHSd.shape, k_BHNd.shape[2]
    if (count := _count) is not None:
        with _disable_current_modes(), products_counted(None):
            positions = range(N - S, N) if position_S is None else position_S.tolist()
            seen = sum(position + 1 if window is None else min(position + 1, window) for position in positions)
            count(2 * B * H * seen * (d + v_BHNd.shape[3]))
            return attend(q_BHSd, k_BHNd, v_BHNd, position_S, window, scale, sinks_H, backend)
    # An exported graph is one for every length, so there a window is a mask.
    if position_S is None and (window is None or (not is_exporting() and window >= N)):
        return _softmax_product(q_BHSd, k_BHNd, v_BHNd, scale, sinks_H, backend, causal=True)
    if position_S is not None and S == 1 and q_BHSd.device.type == "cpu" and not torch.compiler.is_compiling():
        stop = int(position_S) + 1  # a CPU's tensor is at hand: no mask, and nothing read of what is not yet there
        first = 0 if window is None else max(stop - window, 0)
        k_BHNd, v_BHNd = (x.narrow(2, first, stop - first) for x in (k_BHNd, v_BHNd))
        return _softmax_product(q_BHSd, k_BHNd, v_BHNd, scale, sinks_H, backend)
    if position_S is None and window is not None and S < N:  # of what is cached, what some query's window holds
        k_BHNd, v_BHNd = (x[:, :, max(N - S - window + 1, 0) :] for x in (k_BHNd, v_BHNd))
        N = k_BHNd.shape[2]
    key_N = torch.arange(N, device=q_BHSd.device)
    query_S1 = (key_N[N - S :] if position_S is None else position_S).unsqueeze(1)
    seen_SN = key_N <= query_S1
    if window is not None:
        seen_SN &= key_N > query_S1 - window
    return _softmax_product(q_BHSd, k_BHNd, v_BHNd, scale, sinks_H, backend, seen_SN)


def _softmax_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    sinks_H: Tensor | None,
    backend: str,
    seen_SN: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """As `attend`, over the keys that are seen. Torch's kernels know no sinks: each is a key of its own, the first."""
    B, H, S, width = *q.shape[:3], v.shape[3]
    if S == 1 and not is_exporting():
        causal = False  # the last query sees every key
    if sinks_H is not None:
        scale = scale or q.shape[3] ** -0.5
        is_whole = causal and k.shape[2] == S
        q, k, v = _with_sink(q, k, v, sinks_H / scale)
        seen_SN = None if seen_SN is None else F.pad(seen_SN, (1, 0), value=True)
        q = F.pad(q, (0, 0, 1, 0)) if is_whole else q  # a query beside the sink: the others stay beside their keys
    shares, d = q.shape[1] != k.shape[1], q.shape[3]
    if shares and S == 1 and not causal:  # heads that share a key are queries of one: torch would read keys for each
        grouped = q.reshape(B, k.shape[1], -1, d)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen_SN, scale=scale).reshape(B, H, 1, v.shape[3])
    elif is_exporting() or S == 1:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_SN, is_causal=causal, scale=scale, enable_gqa=shares)
    else:
        y = softmax_product(q, k, v, seen_SN, scale, backend)
    return y if sinks_H is None else y[:, :, -S:, :width]


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With some dimensions more: one is a query's sink, and 1 in the key that is the sink."""
    (B, H, S, d), more = q.shape, SINK_WIDTH
    of_queries = F.pad(sinks_H.to(q.dtype).view(1, H, 1, 1), (0, more - 1)).expand(B, H, S, more)
    sink_m = F.pad(q.new_ones(1), (d, more - 1)).expand(B, k.shape[1], 1, d + more)
    keys = torch.cat([sink_m, F.pad(k, (0, more))], dim=2)
    return torch.cat([q, of_queries], dim=3), keys, F.pad(v, (0, more + d - v.shape[3], 1, 0))
