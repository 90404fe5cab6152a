"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.models.layers import Linear, RMSNorm
from moe_lab.phases import phase


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) [S, head_dim] in fp32 for positions 0 .. length-1 (RoPE: Su et al., 2104.09864).

    Dimension i is turned together with i + head_dim/2, by the angle position * theta^(-2i / head_dim).
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; computed in fp32, returned in x's dtype."""
    wide = x_BHSd.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos_Sd + torch.cat((-second, first), dim=-1) * sin_Sd).to(x_BHSd.dtype)


class Attention(nn.Module):
    """Self-attention over x [B, S, D]; `qk_norm`: none, head (one norm for every head) or full (all as one)."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_norm: str, norm_eps: float):
        super().__init__()
        self.head_dim, self.qk_norm = head_dim, qk_norm
        self.q = Linear(d_model, n_heads * head_dim)
        self.k = Linear(d_model, n_kv_heads * head_dim)
        self.v = Linear(d_model, n_kv_heads * head_dim)
        self.o = Linear(n_heads * head_dim, d_model)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm != "none":
            self.q_norm = RMSNorm(head_dim if qk_norm == "head" else n_heads * head_dim, norm_eps)
            self.k_norm = RMSNorm(head_dim if qk_norm == "head" else n_kv_heads * head_dim, norm_eps)

    def forward(self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
        with phase("attention"):
            q, k, v = self.q(x_BSD), self.k(x_BSD), self._heads(self.v(x_BSD))
            if self.qk_norm == "full":
                assert self.q_norm is not None and self.k_norm is not None
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = self._heads(q), self._heads(k)
            if self.qk_norm == "head":
                assert self.q_norm is not None and self.k_norm is not None
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, cos_Sd, sin_Sd), rotate(k, cos_Sd, sin_Sd)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x_BSn: Tensor) -> Tensor:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        B, S, _ = x_BSn.shape
        return x_BSn.view(B, S, -1, self.head_dim).transpose(1, 2)
