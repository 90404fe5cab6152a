"""The gated delta rule (2412.06464): a linear attention whose state is a matrix that forgets and corrects itself.

    S' = exp(g) S,  S = S' + k beta (v - S'^T k)^T,  y = S^T q          S [d_k, d_v]; g <= 0, 0 <= beta <= 1, |k| <= 1

`recurrent` is that, token by token. `chunked` is the same for many tokens at once, in matrix products over chunks: with
c the sum of g from the chunk's first token on, and D_ij = exp(c_i - c_j) for j <= i, else 0, the corrections of a chunk
solve a triangular system (the WY form: 2406.06484):

    (I + strictly lower part of diag(beta) (K K^T * D)) U = diag(beta) (V - diag(exp(c)) K S)
    Y = diag(exp(c)) Q S + (Q K^T * D) U,  S <- exp(c_last) S + (diag(exp(c_last - c)) K)^T U

Both take q, k [B, H, S, d_k], v [B, H, S, d_v], g and beta [B, H, S] and the state before [B, H, d_k, d_v], in fp32
(or more), and return y [B, H, S, d_v] and the state after. In an exported graph `outputs` is one node.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.ops.library import register

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
    solved = _inverse((scaled_k @ k.mT) * decay)
    of_values, of_state = solved @ (v * beta.unsqueeze(4)), solved @ (scaled_k * grown)
    within, from_state = (q @ k.mT) * decay, q * grown
    into_state, kept = k * (c[..., -1:] - c).exp().unsqueeze(4), grown[..., -1:, :]
    y = torch.empty_like(v)
    for i in range(n):
        u = of_values[:, :, i] - of_state[:, :, i] @ state
        y[:, :, i] = from_state[:, :, i] @ state + within[:, :, i] @ u
        state = kept[:, :, i] * state + into_state[:, :, i].mT @ u
    return y.flatten(2, 3)[:, :, :S], state


def _inverse(matrix: Tensor) -> Tensor:
    """Of I + the strictly lower part of [..., C, C], by matrix products alone, so that a CUDA graph can hold it.

    From the inverses A, B of two neighbouring blocks on the diagonal, and M below the first, that of both follows: the
    block below is -B M A. So the blocks grow from 1 to C.
    """
    C = matrix.shape[-1]
    place_C = torch.arange(C, device=matrix.device)
    inverse = torch.eye(C, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    size = 1
    while size < C:
        block_C = place_C // size
        below = (block_C[:, None] == block_C + 1) & (block_C % 2 == 0)
        inverse = inverse - inverse @ (matrix * below) @ inverse
        size *= 2
    return inverse


def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """y of whole sequences, before which the state is 0, as one node of an exported graph."""
    return torch.ops.moe_lab.gated_delta_rule(q, k, v, g, beta)  # type: ignore[no-any-return]


def _outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return recurrent(q, k, v, g, beta, v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3]))[0]


def _outputs_fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return v.new_empty(v.shape)


register(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta) -> Tensor",
    _outputs,
    _outputs_fake,
    onnx="moe_lab.ops.delta_rule_onnx",
)
