"""model=transformer_decoder: token ids -> embedding -> blocks -> norm -> head -> logits.

A block is attention and an MLP, each behind an RMSNorm and added to the residual stream. The addition belongs to the
next norm (`add_rms_norm` does both in one pass), so a block takes and returns the pair (x, residual): what the last
sublayer computed, and the stream it has still to be added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.experts.weights import Activation
from moe_lab.marks import phase
from moe_lab.models import ForcedRouting, Output
from moe_lab.models.attention import Attention
from moe_lab.models.kv_cache import KVCache, LayerCache, LayerMemory
from moe_lab.models.latent_attention import LatentAttention
from moe_lab.models.layers import Add, Embedding, GatedMLP, Linear, RMSNorm, add_norm, joined_with, norm_and_project
from moe_lab.models.mixers import make_mixer
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.rope import Ropes, softmax_scale
from moe_lab.routers.base import RouteContext, Routing

_OF_ROPE = ("rope_theta", "rope_scaling", "rotary_dim")


class Block(nn.Module):
    """Attention, or another mixer of tokens in its place, then the MLP: a dense one, or an MoELayer.

    `norms_after`: what both give is normed before it is added; `scaled`: the layer's output has a factor (Gemma 4).
    `shows_input`: the last of what it returns is what the MLP read [T, D], else None.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        d_model: int,
        norm_eps: float,
        implementation: str,
        residual_scale: float = 1.0,
        norm: str = "rms",
        *,
        norms_after: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        self.residual_scale, self.shows_input = residual_scale, False
        norms_itself = isinstance(mlp, MoELayer) and mlp.norms is not None
        self.attention_norm = add_norm(norm, d_model, norm_eps, implementation)
        self.attention = attention
        self.mlp_norm = Add() if norms_itself else add_norm(norm, d_model, norm_eps, implementation)
        self.mlp = mlp
        self.norm_after_attention = RMSNorm(d_model, norm_eps) if norms_after else None
        self.norm_after_mlp = RMSNorm(d_model, norm_eps) if norms_after else None
        self.scale_1 = nn.Parameter(torch.empty(1), requires_grad=False) if scaled else None

    def forward(
        self,
        x_BSD: Tensor,
        residual_BSD: Tensor | None,
        rope: tuple[Tensor, Tensor],
        ctx: RouteContext,
        forced: Iterator[Routing] | None,
        cache: LayerMemory | None,
        position_S: Tensor | None,
    ) -> tuple[Tensor, Tensor, Routing | None, Tensor | None]:
        attended, residual = self._attended(x_BSD, residual_BSD, rope, cache, position_S)
        attended = self._added(attended, self.norm_after_attention)
        routing = next(forced) if forced is not None and isinstance(self.mlp, MoELayer) else None
        normed, residual, routing = self._norm_of_mlp(attended, residual, routing)
        if isinstance(self.mlp, MoELayer):
            y_TD, routing = self.mlp(normed.flatten(0, 1), ctx, routing)
            y_BSD = y_TD.view_as(normed)
        else:
            y_BSD = self.mlp(normed)
        y_BSD = self._added(y_BSD, self.norm_after_mlp)
        if self.scale_1 is not None:
            scale_1 = self.scale_1.to(y_BSD.dtype)
            y_BSD, residual = y_BSD * scale_1, residual * scale_1
        return y_BSD, residual, routing, normed.flatten(0, 1) if self.shows_input else None

    def _attended(
        self,
        x: Tensor,
        residual: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: LayerMemory | None,
        position_S: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(what attention gives of norm(x + residual), x + residual)."""
        projections = self.attention.projections if isinstance(self.attention, Attention) else []
        joined = joined_with(self.attention_norm, x, residual, *projections) if projections else None
        if joined is None:
            x, total = self.attention_norm(x, residual)
        with phase("attention"):
            if joined is None:
                return self.attention(x, *rope, cache, position_S), total
            assert isinstance(self.attention, Attention) and (cache is None or isinstance(cache, LayerCache))
            parts, total = norm_and_project(self.attention_norm, x, residual, joined, *projections)
            return self.attention.of_projected(parts, *rope, cache, position_S), total

    def _norm_of_mlp(
        self, x_BSD: Tensor, residual_BSD: Tensor, forced: Routing | None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """What the MLP reads, the stream, and its routing if that is `forced` or chosen by the kernel of the norm."""
        x_TD = x_BSD.flatten(0, 1)
        if forced is None and isinstance(self.mlp, MoELayer) and self.mlp.norms_input(x_TD, self.mlp_norm):
            normed, total, routing = self.mlp.norm_and_route(x_TD, residual_BSD.flatten(0, 1), self.mlp_norm)
            return normed.view_as(x_BSD), total.view_as(x_BSD), routing
        return *self.mlp_norm(x_BSD, residual_BSD), forced

    def _added(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """What a sublayer adds."""
        x = x if norm is None else norm(x)
        return x if self.residual_scale == 1 else x * self.residual_scale


class TransformerDecoder(nn.Module):
    """Decoder-only Transformer; the keys are those of conf/_base/model/decoder.yaml.

    A checkpoint may ask for more: `rope_scaling` and `rotary_dim` (see `rope`), `options` of `Attention`, `windows`,
    the attention window of each layer, and `latent`, the options of `LatentAttention`, which is then every layer's.
    `mixers` has for each layer None, or what takes the place of attention there (see `mixers.make_mixer`). `by_layer`
    has for each layer what of its attention is not as in the others: `n_kv_heads`, `head_dim`, the options of
    `Attention`, and those of RoPE (`rope_theta`, `rope_scaling`, `rotary_dim`).
    `embedding_scale`, `residual_scale` and `logits_scale` multiply the embedding, what each sublayer adds, and the
    logits (Granite); `logits_cap` is c in c tanh(logits / c). `norm` is the kind of `add_norm`, and `head_bias` a bias
    of the head (Phi). `norms_after` and `scaled_layers`: see `Block`. `activation` is that of dense MLPs and shared
    experts. `max_positions` is how long a sequence the model is made for, None for any.
    """

    max_positions: int | None = None
    looks_ahead = False
    """Whether a layer is told what the MLP of the one before read (`RouteContext.previous_TD`)."""

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int | None,
        n_layers: int,
        mlp_hidden_dim: int,
        qk_norm: str,
        rope_theta: float,
        norm_eps: float,
        tie_embeddings: bool,
        implementation: str,
        attention: str,
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_dim: int | None = None,
        windows: Sequence[int | None] | None = None,
        latent: Mapping[str, Any] | None = None,
        mixers: Sequence[Mapping[str, Any] | None] | None = None,
        by_layer: Sequence[Mapping[str, Any]] | None = None,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        logits_scale: float = 1.0,
        logits_cap: float | None = None,
        norm: str = "rms",
        head_bias: bool = False,
        norms_after: bool = False,
        scaled_layers: bool = False,
        activation: Activation = None,
        **options: Any,
    ):
        super().__init__()
        self.vocab_size, self.d_model, self.mlp_hidden_dim = vocab_size, d_model, mlp_hidden_dim
        self.norm_eps, self.activation, self.logits_cap = norm_eps, activation, logits_cap
        self.head_dim, self.n_kv_heads = head_dim or d_model // n_heads, n_kv_heads or n_heads
        self.embed, self.embedding_scale = Embedding(vocab_size, d_model), embedding_scale
        usual: dict[str, Any] = {"head_dim": self.head_dim, "n_kv_heads": self.n_kv_heads, "rope_theta": rope_theta}
        usual |= {"rope_scaling": rope_scaling, "rotary_dim": rotary_dim, "backend": attention}
        own = [{**usual, **each} for each in by_layer or [{}] * n_layers]
        self.ropes = Ropes([(each["head_dim"], *(each.pop(key) for key in _OF_ROPE)) for each in own])

        def make_attention(layer: int) -> nn.Module:
            if mixers is not None and (mixer := mixers[layer]) is not None:
                return make_mixer(d_model, norm_eps, **mixer)
            if latent is not None:
                assert qk_norm == "none" and windows is None and not options, "latent attention has no such options"
                return LatentAttention(d_model, n_heads, scale=softmax_scale(rope_scaling), backend=attention, **latent)
            given = {"window": windows[layer] if windows is not None else None, **options, **own[layer]}
            return Attention(d_model, n_heads, qk_norm=qk_norm, norm_eps=norm_eps, wide_norms=norm == "wide", **given)

        of_all = (d_model, norm_eps, implementation, residual_scale, norm)
        after: dict[str, Any] = {"norms_after": norms_after, "scaled": scaled_layers}
        blocks = (Block(make_attention(i), self.make_mlp(i), *of_all, **after) for i in range(n_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = add_norm(norm, d_model, norm_eps, implementation)
        self.head, self.logits_scale = Linear(d_model, vocab_size, bias=head_bias), logits_scale
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def make_mlp(self, layer: int) -> nn.Module:
        """The MLP of block `layer`."""
        return GatedMLP(self.d_model, self.mlp_hidden_dim, self.activation)

    def input_shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        """[B, S] token ids."""
        return batch, seq_len

    def make_cache(self, batch: int, length: int) -> KVCache:
        """Room for `length` positions of `batch` sequences, in the dtype of the parameters; tables are reserved too."""
        self.ropes.reserve(length, self.embed.weight.device)
        mixers: list[Any] = [block.attention for block in self.layers if isinstance(block, Block)]
        return KVCache((mixer.make_cache(batch, length) for mixer in mixers), length)

    def forward(
        self,
        ids_BS: Tensor,
        forced_routing: ForcedRouting = None,
        *,
        cache: KVCache | None = None,
        position_S: Tensor | None = None,
        last: int | None = None,
    ) -> Output:
        """Token ids [B, S] (int64) -> logits [B, S, V], and the routing of each MoE layer.

        Args:
            cache: what the pass adds its keys and values to, from its `start` on.
            position_S: int64, where the tokens stand; what is before them is in the cache.
            last: of so many positions at the end the logits are wanted; None: of all.
        """
        B, S = ids_BS.shape
        ropes = self.ropes.tables(S, ids_BS.device, position_S, 0 if cache is None else cache.start)
        starts_B1 = torch.arange(B + 1, dtype=torch.int32, device=ids_BS.device)
        starts_B1 = starts_B1 if S == 1 else starts_B1 * S
        kind = "forward" if cache is None else "prefill" if position_S is None else "decode"
        ctx = RouteContext(token_ids_T=ids_BS.flatten(), seq_start_B1=starts_B1, phase=kind)
        forced = iter(forced_routing) if forced_routing is not None else None
        caches = [None] * len(self.layers) if cache is None else cache.layers
        x: Tensor = self.embed(ids_BS)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        residual: Tensor | None = None
        previous: Tensor | None = None  # what the MLP of the layer before read
        routings: list[Routing] = []
        for layer, (block, kept) in enumerate(zip(self.layers, caches, strict=True)):
            here = ctx._replace(layer=layer, previous_TD=previous)
            x, residual, routing, previous = block(x, residual, ropes[layer], here, forced, kept, position_S)
            if routing is not None:
                routings.append(routing)
        if last == 0:
            return Output(x.new_empty(B, 0, self.vocab_size), tuple(routings))
        if last is not None:
            x, residual = x[:, S - last :], residual if residual is None else residual[:, S - last :]
        if (joined := joined_with(self.norm, x, residual, self.head)) is not None:
            (logits,), _ = norm_and_project(self.norm, x, residual, joined, self.head)
        else:
            normed, _ = self.norm(x, residual)
            logits = self.head(normed)
        return Output(self._finished(logits), tuple(routings))

    def joined_norms(self, x_TD: Tensor) -> set[nn.Module]:
        """The norms that are computed together with the projections behind them, of the rows x of an eager pass."""
        blocks = [block for block in self.layers if isinstance(block, Block)]
        pairs = [(b.attention_norm, b.attention.projections) for b in blocks if isinstance(b.attention, Attention)]
        pairs.append((self.norm, [self.head]))
        return {norm for norm, layers in pairs if joined_with(norm, x_TD, None, *layers) is not None}

    def _finished(self, logits_BSV: Tensor) -> Tensor:
        if self.logits_scale != 1:
            logits_BSV = logits_BSV * self.logits_scale
        return logits_BSV if self.logits_cap is None else self.logits_cap * (logits_BSV / self.logits_cap).tanh()
