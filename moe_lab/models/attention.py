"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.models.attend import SINK_WIDTH, attend
from moe_lab.models.attention_backend import Call, kind_of
from moe_lab.models.kv_cache import LayerCache
from moe_lab.models.layers import Linear, RMSNorm, place_together, project_together
from moe_lab.ops import extension, one_token_attention
from moe_lab.ops.decode_attention import cached_attention, rope_append, takes
from moe_lab.ops.library import is_compiled, resolve_implementation
from moe_lab.ops.rotate import rotate_both


class Attention(nn.Module):
    """Self-attention over x [B, S, D].

    Args:
        qk_norm: RMSNorm of queries and keys: none, head (one norm for every head) or full (all heads as one vector).
        qkv_bias, o_bias: whether these projections have one.
        clip_qkv: queries, keys and values are clamped to +- this, after the norm (DBRX, OLMoE).
        window: a token sees this many tokens, itself included; None: all before it.
        scale: of the logits; None: 1/sqrt(head_dim).
        sinks: each head has a logit that takes its share of the softmax.
        turn_first: the norms of heads come after the rotation (HunYuan), else before it.
        wide_norms: see `RMSNorm`.
        output_gate: what the heads give is multiplied by a sigmoid, from further rows of `q` (2505.06708).
        values_are_keys: the projection of keys is that of values too, before norms and rotation (Gemma 4).
        value_norm: RMSNorm of the values of each head, without weights.
        backend: who computes many queries (attention_backend.py).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        qk_norm: str,
        norm_eps: float,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        clip_qkv: float | None = None,
        window: int | None = None,
        scale: float | None = None,
        sinks: bool = False,
        turn_first: bool = False,
        wide_norms: bool = False,
        output_gate: bool = False,
        values_are_keys: bool = False,
        value_norm: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.head_dim, self.qk_norm, self.clip_qkv, self.window = head_dim, qk_norm, clip_qkv, window
        self.scale, self.turn_first, self.output_gate = scale, turn_first, output_gate
        self.value_norm_eps = norm_eps if value_norm else None
        self.sinks_H = nn.Parameter(torch.empty(n_heads), requires_grad=False) if sinks else None
        self.fuses, self.joins, self.backend = False, False, backend
        self.q = Linear(d_model, n_heads * head_dim * (2 if output_gate else 1), bias=qkv_bias)
        self.k = Linear(d_model, n_kv_heads * head_dim, bias=qkv_bias)
        self.v = None if values_are_keys else Linear(d_model, n_kv_heads * head_dim, bias=qkv_bias)
        place_together(*self.projections)
        self.o = Linear(n_heads * head_dim, d_model, bias=o_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm != "none":
            self.q_norm, self.k_norm = (
                RMSNorm(head_dim if qk_norm == "head" else heads * head_dim, norm_eps, wide=wide_norms)
                for heads in (n_heads, n_kv_heads)
            )

    def make_cache(self, batch: int, length: int) -> LayerCache:
        """Room for `length` positions of `batch` sequences, in the dtype of the parameters."""
        shape = (batch, self.k.weight.shape[0] // self.head_dim, length, self.head_dim)
        return LayerCache(self.k.weight.new_zeros(shape), self.k.weight.new_zeros(shape))

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """Decide whether kernels turn queries and keys, and attend to a few new tokens, on `device`."""
        self.fuses = resolve_implementation("auto", device, op="attention") == "triton"
        # On a CPU a product in bf16 takes 20 us, however small (oneDNN); in fp32 (MKL) three are as quick as one.
        self.joins = self.fuses or (device.type == "cpu" and self.k.weight.dtype == torch.bfloat16)

    def call(self, n_tokens: int, n_keys: int | None, device: torch.device) -> Call:
        """What torch is asked for by many tokens, the last of `n_keys`; None: by those of a decoding step."""
        heads, key_heads = self.o.weight.shape[1] // self.head_dim, self.k.weight.shape[0] // self.head_dim
        width = self.head_dim if self.sinks_H is None else self.head_dim + SINK_WIDTH
        kind = "mask" if n_keys is None else kind_of(n_tokens, n_keys, self.window)
        return Call(device, self.k.weight.dtype, heads, key_heads, width, width, kind)

    def forward(
        self,
        x_BSD: Tensor,
        cos_Sd: Tensor,
        sin_Sd: Tensor,
        cache: LayerCache | None = None,
        position_S: Tensor | None = None,
    ) -> Tensor:
        """Without `position_S` the tokens follow those in the cache (`LayerMemory.start`), from position 0 on if none.

        With it they stand there, by a tensor on the device.
        """
        # One product is quicker than three small ones; on a CPU those of a step are small.
        if self.fuses or (self.joins and position_S is not None):
            parts = project_together(x_BSD, *self.projections)
        else:
            parts = tuple(projection(x_BSD) for projection in self.projections)
        return self.of_projected(parts, cos_Sd, sin_Sd, cache, position_S)

    def of_projected(
        self,
        parts: tuple[Tensor, ...],
        cos_Sd: Tensor,
        sin_Sd: Tensor,
        cache: LayerCache | None,
        position_S: Tensor | None,
    ) -> Tensor:
        """`forward` from what `projections` give on."""
        q, k, v = parts[0], parts[1], self._values(parts[-1])  # of the last two one, where values are keys
        q, gate = q.chunk(2, dim=2) if self.output_gate else (q, None)
        by = "torch" if cache is None or position_S is None else self.decoded_by(len(position_S))
        if by != "torch":
            assert cache is not None and position_S is not None
            y_BSn = self._few_tokens(q, k, v, cos_Sd, sin_Sd, cache, position_S, by)
            return self._out(y_BSn, gate)
        if self.qk_norm == "full":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (part.clamp(-self.clip_qkv, self.clip_qkv) for part in (q, k, v))
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        turns = (cos_Sd, sin_Sd, "triton" if self.fuses else "torch")
        if self.turn_first:
            q, k = rotate_both(q, k, *turns)
        if self.qk_norm == "head":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.turn_first:
            q, k = rotate_both(q, k, *turns)
        if cache is not None and position_S is None:
            k, v = cache.begin(k, v)
        elif cache is not None:
            assert position_S is not None
            k, v = cache.put(k, v, position_S)
        y = attend(q, k, v, position_S, self.window, self.scale, self.sinks_H, self.backend)
        return self._out(y.transpose(1, 2).flatten(2), gate)

    def _out(self, y_BSn: Tensor, gate_BSn: Tensor | None) -> Tensor:
        return self.o(y_BSn if gate_BSn is None else y_BSn * gate_BSn.sigmoid())  # type: ignore[no-any-return]

    def decoded_by(self, n_tokens: int) -> str:
        """Who attends to so many new tokens of a sequence on the cache: `torch`, `triton`, or the extension at once."""
        queries_per_key = self.o.weight.shape[1] // self.k.weight.shape[0]
        if not self.fuses or not takes(n_tokens, queries_per_key, self.head_dim):
            return "torch"
        if is_compiled() or not one_token_attention.is_faster(self.k.weight.device):
            return "triton"
        device = self.k.weight.device
        tensors = (self.k.weight, *self._norm_weights(), self.sinks_H)
        is_taken = one_token_attention.takes(n_tokens, queries_per_key, self.head_dim, *tensors)
        return extension.label(device) if is_taken else "triton"

    def _norm_weights(self) -> list[Tensor | None]:
        return [None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm)]

    def _few_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, position_S: Tensor, by: str
    ) -> Tensor:
        """What the heads give, for a few new tokens per sequence, by the kernels that `decoded_by` names."""
        eps = self.q_norm.eps if self.q_norm is not None else 0.0
        kept = (cache.k_BHNd, cache.v_BHNd)
        turns = ((cos, sin), position_S, *kept, self.turn_first)
        q_Rn, k_Rm, v_Rm = (part.flatten(0, 1) for part in (q, k, v))
        new: Any = (q_Rn, k_Rm, v_Rm, *self._norm_weights(), eps, self.clip_qkv, *turns)
        softmax: Any = (self.window, self.scale, self.sinks_H)
        if by != "triton":
            y_RHd = one_token_attention.one_token_attention(*new, *softmax)
        else:
            y_RHd = cached_attention(rope_append(*new), *kept, position_S, *softmax)
        return y_RHd.view(*q.shape[:2], -1)

    def use_reference(self) -> None:
        """From now on compute in plain torch."""
        self.fuses, self.joins, self.backend = False, False, "auto"

    @property
    def projections(self) -> list[Linear]:
        """Of queries, keys, and values unless those are the keys."""
        return [self.q, self.k] if self.v is None else [self.q, self.k, self.v]

    def _values(self, v_BSn: Tensor) -> Tensor:
        """Normed, if they are, head by head."""
        if self.value_norm_eps is None:
            return v_BSn
        heads = v_BSn.unflatten(2, (-1, self.head_dim))
        return F.rms_norm(heads, (self.head_dim,), None, self.value_norm_eps).flatten(2)

    def _heads(self, x_BSn: Tensor) -> Tensor:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        B, S, _ = x_BSn.shape
        return x_BSn.view(B, S, -1, self.head_dim).transpose(1, 2)
