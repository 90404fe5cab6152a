"""Attention of one new token per sequence on latents that all heads share (MLA with absorbed matrices, 2405.04434).

    y_h = sum over n of softmax_n(scale q_h . [c_n; r_n]) c_n        over the positions n up to the token's

The Triton kernel reads each latent once for many heads: it is the key and the value. It reads the position on the
device, and takes the positions in pieces side by side, as `decode_attention` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import call, register


def latent_attention(q_BHm: Tensor, latent_BNm: Tensor, rank: int, position_1: Tensor, scale: float) -> Tensor:
    """[B, H, rank], contiguous, in q's dtype.

    Args:
        q_BHm: queries of the width m = rank + rope.
        latent_BNm: cached latents of N positions, of which those up to `position_1` are read; the last dimension dense.
        rank: so many first elements of a latent are the value.
        position_1: int64 [1].
    """
    return call("latent_attention", q_BHm, latent_BNm, rank, position_1, scale)  # type: ignore[no-any-return]


def reference(q: Tensor, latent: Tensor, rank: int, position: Tensor, scale: float) -> Tensor:
    """Plain torch. Shapes and dtypes as `latent_attention`."""
    scores = (q @ latent.transpose(1, 2)).float() * scale
    unseen = torch.arange(latent.shape[1], device=q.device) > position
    shares = scores.masked_fill(unseen, float("-inf")).softmax(2).to(q.dtype)
    return shares @ latent[..., :rank].masked_fill(unseen[:, None], 0.0)


def _compute(q: Tensor, latent: Tensor, rank: int, position: Tensor, scale: float) -> Tensor:
    from moe_lab.ops.latent_attention_triton import launch

    return launch(q, latent, rank, position, scale)


def _fake(q: Tensor, latent: Tensor, rank: int, position: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:2], rank)


register(
    "latent_attention(Tensor q, Tensor latent, int rank, Tensor position, float scale) -> Tensor",
    _compute,
    _fake,
    reference=reference,
)
