"""model=transformer_decoder: token ids -> embedding -> blocks -> norm -> head -> logits.

A block is attention and an MLP, each behind an RMSNorm and added to the residual stream. The addition belongs to the
next norm (`add_rms_norm` does both in one pass), so a block takes and returns the pair (x, residual): what the last
sublayer computed, and the stream it has still to be added to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_lab.models import ForcedRouting, Output
from moe_lab.models.attention import Attention, rope_tables
from moe_lab.models.layers import AddRMSNorm, Embedding, Linear, SwiGLU
from moe_lab.models.moe_layer import MoELayer
from moe_lab.routers.base import RouteContext, Routing


class Block(nn.Module):
    """Attention, then the MLP: a dense one, or an MoELayer."""

    def __init__(self, attention: Attention, mlp: nn.Module, d_model: int, norm_eps: float, implementation: str):
        super().__init__()
        self.attention_norm = AddRMSNorm(d_model, norm_eps, implementation)
        self.attention = attention
        self.mlp_norm = AddRMSNorm(d_model, norm_eps, implementation)
        self.mlp = mlp

    def forward(
        self,
        x_BSD: Tensor,
        residual_BSD: Tensor | None,
        rope: tuple[Tensor, Tensor],
        ctx: RouteContext,
        forced: Iterator[Routing] | None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        normed, residual = self.attention_norm(x_BSD, residual_BSD)
        normed, residual = self.mlp_norm(self.attention(normed, *rope), residual)
        if not isinstance(self.mlp, MoELayer):
            return self.mlp(normed), residual, None
        y_TD, routing = self.mlp(normed.flatten(0, 1), ctx, next(forced) if forced is not None else None)
        return y_TD.view_as(normed), residual, routing


class TransformerDecoder(nn.Module):
    """Decoder-only Transformer; the keys are those of conf/model/transformer_decoder.yaml."""

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        mlp_hidden_dim: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str = "none",
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = False,
        implementation: str = "auto",
    ):
        super().__init__()
        self.vocab_size, self.d_model, self.mlp_hidden_dim = vocab_size, d_model, mlp_hidden_dim
        self.head_dim, self.rope_theta = head_dim or d_model // n_heads, rope_theta
        self.embed = Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(
                Attention(d_model, n_heads, n_kv_heads or n_heads, self.head_dim, qk_norm, norm_eps),
                self.make_mlp(layer),
                d_model,
                norm_eps,
                implementation,
            )
            for layer in range(n_layers)
        )
        self.norm = AddRMSNorm(d_model, norm_eps, implementation)
        self.head = Linear(d_model, vocab_size)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def make_mlp(self, layer: int) -> nn.Module:
        """The MLP of block `layer`."""
        return SwiGLU(self.d_model, self.mlp_hidden_dim)

    def input_shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        """[B, S] token ids."""
        return batch, seq_len

    def forward(self, ids_BS: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """Token ids [B, S] (int64) -> logits [B, S, V], and the routing of each MoE layer."""
        B, S = ids_BS.shape
        rope = rope_tables(S, self.head_dim, self.rope_theta, ids_BS.device)
        starts_B1 = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=ids_BS.device)
        ctx = RouteContext(token_ids_T=ids_BS.flatten(), seq_start_B1=starts_B1)
        forced = iter(forced_routing) if forced_routing is not None else None
        x: Tensor = self.embed(ids_BS)
        residual: Tensor | None = None
        routings: list[Routing] = []
        for layer, block in enumerate(self.layers):
            x, residual, routing = block(x, residual, rope, ctx._replace(layer=layer), forced)
            if routing is not None:
                routings.append(routing)
        normed, _ = self.norm(x, residual)
        return Output(self.head(normed), tuple(routings))
