"""The gated delta rule (2412.06464): a linear attention whose state is a matrix that forgets and corrects itself.

    S' = exp(g) S,  S = S' + k beta (v - S'^T k)^T,  y = S^T q          S [d_k, d_v]; g <= 0, 0 <= beta <= 1, |k| <= 1

`recurrent` is that, token by token. `chunked` is the same for many tokens at once, in matrix products over chunks: with
c the sum of g from the chunk's first token on, and D_ij = exp(c_i - c_j) for j <= i, else 0, the corrections of a chunk
solve a triangular system (the WY form: 2406.06484):

    (I + strictly lower part of diag(beta) (K K^T * D)) U = diag(beta) (V - diag(exp(c)) K S)
    Y = diag(exp(c)) Q S + (Q K^T * D) U,  S <- exp(c_last) S + (diag(exp(c_last - c)) K)^T U

Both take q, k [B, H, S, d_k], v [B, H, S, d_v], g and beta [B, H, S] and the state before [B, H, d_k, d_v], in fp32
(or more), and return y [B, H, S, d_v] and the state after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token."""
    y = torch.empty_like(v)
    decay = g.exp()
    for t in range(v.shape[2]):
        state = state * decay[:, :, t, None, None]
        k_t = k[:, :, t, :, None]
        correction = beta[:, :, t, None] * (v[:, :, t] - _read(state, k_t))
        state = state + k_t @ correction.unsqueeze(2)
        y[:, :, t] = _read(state, q[:, :, t, :, None])
    return y, state


def _read(state_BHkv: Tensor, key_BHk1: Tensor) -> Tensor:
    """S^T k [B, H, d_v]."""
    return (state_BHkv.mT @ key_BHk1).squeeze(3)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; the last one is filled up with tokens that change nothing (beta 0, g 0)."""
    S = v.shape[2]
    n, more = -(-S // chunk), -S % chunk
    q, k, v = (F.pad(x, (0, 0, 0, more)).unflatten(2, (n, chunk)) for x in (q, k, v))
    g, beta = (F.pad(x, (0, more)).unflatten(2, (n, chunk)) for x in (g, beta))
    c = g.cumsum(3)
    # Of what comes later the exponent is positive and may overflow, so it is masked before.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    decay = (c.unsqueeze(4) - c.unsqueeze(3)).masked_fill(later, -torch.inf).exp()
    grown = c.exp().unsqueeze(4)
    scaled_k = k * beta.unsqueeze(4)
    system = (scaled_k @ k.mT) * decay
    right = torch.cat((v * beta.unsqueeze(4), scaled_k * grown), dim=4)
    of_values, of_state = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[4], k.shape[4]], dim=4
    )
    within, from_state = (q @ k.mT) * decay, q * grown
    into_state, kept = k * (c[..., -1:] - c).exp().unsqueeze(4), grown[..., -1:, :]
    y = torch.empty_like(v)
    for i in range(n):
        u = of_values[:, :, i] - of_state[:, :, i] @ state
        y[:, :, i] = from_state[:, :, i] @ state + within[:, :, i] @ u
        state = kept[:, :, i] * state + into_state[:, :, i].mT @ u
    return y.flatten(2, 3)[:, :, :S], state
