"""A plain decoder to compare with, made as gpt-fast makes its own: torch.compile over plain torch, and a static cache.

It computes the families of OLMoE, Qwen3-MoE and Mixtral with the tensors and in the cache of a model of this project,
and copies neither. A layer is one function, compiled once for all layers (fullgraph, max-autotune).

Three things can be written in two ways (`Way`):

    attention   of one new token: sums of products, which Inductor makes kernels of that fill a GPU (gpt-fast has it so
                from SDPA's plain formula); or torch's sdpa with a mask row, heads that share keys as queries of one.
    products    of a single row: sums, into which gpt-fast's coordinate descent rewrites them; or torch's.
    experts     gathered: each token gathers its experts' weights and sums, as in gpt-fast's example for Mixtral, which
                Inductor does in one kernel that writes no weights; or grouped: rows sorted by expert, and grouped_mm.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as combinations
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.models.attention import Attention
from moe_lab.models.kv_cache import KVCache
from moe_lab.models.layers import rows_together
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.transformer_decoder import Block, TransformerDecoder
from moe_lab.routers.softmax_topk import SoftmaxTopK

OPTIONS = {"max_autotune": True}
"""Of torch.compile: those of mode="max-autotune" without its CUDA graphs, for the caller captures the whole step, and
without coordinate descent, which takes minutes (TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 turns it on)."""


class Way(NamedTuple):
    """How a step is written; see above."""

    attention: Literal["sums", "sdpa"]
    products: Literal["sums", "torch"]
    experts: Literal["gathered", "grouped"]

    def __str__(self) -> str:
        return f"attention {self.attention}, products {self.products}, experts {self.experts}"


class Sizes(NamedTuple):
    """What all layers have in common; the norm of queries and keys is none, head or full."""

    head_dim: int
    norm: str
    eps: float
    top_k: int
    renormalize: bool


class Layer(NamedTuple):
    """The tensors of a layer, and its part of the cache: J heads of keys, N positions."""

    attention_norm_D: Tensor
    qkv_ND: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    out_DN: Tensor
    mlp_norm_D: Tensor
    gate_ED: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    k_BJNd: Tensor
    v_BJNd: Tensor


class Place(NamedTuple):
    """Where the new tokens stand: the cosine and sine of each position, and which of all N the last one sees."""

    position_S: Tensor
    cos_S1d: Tensor
    sin_S1d: Tensor
    seen_1N: Tensor


def rms_norm(x: Tensor, weight: Any, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x_BSHd: Tensor, place: Place) -> Tensor:
    """RoPE: dimension i together with i + d/2."""
    first, second = (wide := x_BSHd.float()).chunk(2, dim=-1)
    return (wide * place.cos_S1d + torch.cat([-second, first], dim=-1) * place.sin_S1d).to(x_BSHd.dtype)


def product(x: Tensor, weight_NK: Tensor, way: Way) -> Tensor:
    if way.products == "sums" and x.numel() == x.shape[-1]:
        return (x.view(1, -1).float() * weight_NK.float()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight_NK)


def attend(q_BHSd: Tensor, k_BJSd: Tensor, v_BJSd: Tensor, layer: Layer, place: Place, way: Way) -> Tensor:
    """[B, H, S, d]. Many tokens are the first of their sequences; one goes on from the cache."""
    layer.k_BJNd.index_copy_(2, place.position_S, k_BJSd)
    layer.v_BJNd.index_copy_(2, place.position_S, v_BJSd)
    (B, H, S, d), J = q_BHSd.shape, k_BJSd.shape[1]
    if S > 1:
        return F.scaled_dot_product_attention(q_BHSd, k_BJSd, v_BJSd, is_causal=True, enable_gqa=J != H)
    q_BJGd = q_BHSd.reshape(B, J, H // J, d)
    if way.attention == "sums":
        scores_BJGN = (q_BJGd[:, :, :, None].float() * layer.k_BJNd[:, :, None].float()).sum(-1) * d**-0.5
        p_BJGN = scores_BJGN.masked_fill(~place.seen_1N, float("-inf")).softmax(-1)
        y_BJGd = (p_BJGN[..., None] * layer.v_BJNd[:, :, None].float()).sum(-2).to(q_BHSd.dtype)
    else:
        y_BJGd = F.scaled_dot_product_attention(q_BJGd, layer.k_BJNd, layer.v_BJNd, attn_mask=place.seen_1N)
    return y_BJGd.reshape(B, H, S, d)


def attention(x_BSD: Tensor, layer: Layer, sizes: Sizes, place: Place, way: Way) -> Tensor:
    (B, S, _), d, eps = x_BSD.shape, sizes.head_dim, sizes.eps
    of_q, of_k = layer.out_DN.shape[1], layer.k_BJNd.shape[1] * d
    q, k, v = product(x_BSD, layer.qkv_ND, way).split([of_q, of_k, of_k], dim=-1)
    if sizes.norm == "full":
        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
    q, k, v = (part.view(B, S, -1, d) for part in (q, k, v))
    if sizes.norm == "head":
        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
    q, k, v = (part.transpose(1, 2) for part in (turn(q, place), turn(k, place), v))
    y_BHSd = attend(q, k, v, layer, place, way)
    return product(y_BHSd.transpose(1, 2).reshape(B, S, of_q), layer.out_DN, way)


def gathered(x_TD: Tensor, ids_TK: Tensor, layer: Layer) -> Tensor:
    """[T, K, D]: each token times the weights of its experts."""
    gate_up_TK2F = (layer.gate_up_E2FD[ids_TK].float() * x_TD[:, None, None].float()).sum(-1).to(x_TD.dtype)
    gate, up = gate_up_TK2F.chunk(2, dim=-1)
    h_TKF = F.silu(gate) * up
    return (layer.down_EDF[ids_TK].float() * h_TKF[:, :, None].float()).sum(-1).to(x_TD.dtype)


def grouped(x_TD: Tensor, ids_TK: Tensor, layer: Layer) -> Tensor:
    """[T, K, D]: rows sorted by expert, a product for each expert."""
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    experts_E = torch.arange(len(layer.gate_ED), device=x_TD.device)
    stops_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    x_ND = x_TD[order_N // ids_TK.shape[1]]
    gate, up = F.grouped_mm(x_ND, layer.gate_up_E2FD.transpose(1, 2), offs=stops_E).chunk(2, dim=-1)
    y_ND = F.grouped_mm(F.silu(gate) * up, layer.down_EDF.transpose(1, 2), offs=stops_E)
    back_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x_TD.device))
    return y_ND[back_N].view(*ids_TK.shape, -1)


def mixture(x_TD: Tensor, layer: Layer, sizes: Sizes, way: Way) -> Tensor:
    """[T, K, D], of each chosen expert, weighted."""
    p_TE = product(x_TD, layer.gate_ED, way).softmax(-1, dtype=torch.float32)
    weights_TK, ids_TK = p_TE.topk(sizes.top_k, dim=-1)
    if sizes.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    y_TKD = grouped(x_TD, ids_TK, layer) if way.experts == "grouped" else gathered(x_TD, ids_TK, layer)
    return y_TKD * weights_TK[..., None].to(x_TD.dtype)


def begin(ids_BS: Tensor, position_S: Tensor, embed_VD: Tensor, angles_Nd: Tensor, top_k: int) -> tuple[Any, ...]:
    """(x, nothing from experts yet, the place of the tokens)."""
    x_BSD, angle_S1d = embed_VD[ids_BS], angles_Nd[position_S][:, None]
    seen_1N = torch.arange(len(angles_Nd), device=ids_BS.device)[None] <= position_S[-1:, None]
    y_TKD = x_BSD.new_zeros(ids_BS.numel(), top_k, x_BSD.shape[2])
    return x_BSD, y_TKD, Place(position_S, angle_S1d.cos(), angle_S1d.sin(), seen_1N)


def block(x_BSD: Tensor, y_TKD: Tensor, layer: Layer, sizes: Sizes, place: Place, way: Way) -> tuple[Tensor, Tensor]:
    """(the stream, what the experts give: the next layer adds it, in one kernel with its norm)."""
    x_BSD = x_BSD + y_TKD.sum(1).view_as(x_BSD)
    x_BSD = x_BSD + attention(rms_norm(x_BSD, layer.attention_norm_D, sizes.eps), layer, sizes, place, way)
    return x_BSD, mixture(rms_norm(x_BSD, layer.mlp_norm_D, sizes.eps).flatten(0, 1), layer, sizes, way)


def end(x_BSD: Tensor, y_TKD: Tensor, norm_D: Tensor, head_VD: Tensor, eps: float, way: Way) -> Tensor:
    """Logits [B, 1, V] of the last position."""
    last_B1D = (x_BSD + y_TKD.sum(1).view_as(x_BSD))[:, -1:]
    return product(rms_norm(last_B1D, norm_D, eps), head_VD, way)


class PlainDecoder:
    """`model`, whose tensors it takes, on `cache`, whose memory it uses.

    Raises:
        ValueError: the model is of another family.
    """

    def __init__(self, model: TransformerDecoder, cache: KVCache, *, compiled: bool):
        if (odd := unusual(model)) is not None:
            raise ValueError(f"plain: cannot compute {odd}; leave it out of --peers.")
        first: Any = model.layers[0]
        self.layers = [layer_of(*pair) for pair in zip(model.layers, cache.layers, strict=True)]
        router, self.compiled = first.mlp.router, compiled
        self.sizes = Sizes(model.head_dim, first.attention.qk_norm, model.norm_eps, router.top_k, router.renormalize)
        self.embed_VD, self.head_VD, self.norm_D = model.embed.weight, model.head.weight, model.norm.weight
        d, device = model.head_dim, model.embed.weight.device
        frequency_d = (model.ropes[0].theta ** (-torch.arange(0, d, 2, device=device) / d)).repeat(2)
        self.angles_Nd = torch.outer(torch.arange(cache.length, device=device), frequency_d)
        functions: list[Callable[..., Any]] = [begin, block, end]
        if compiled:
            functions = [torch.compile(each, fullgraph=True, dynamic=False, options=OPTIONS) for each in functions]
        self._begin, self._block, self._end = functions

    def __call__(self, ids_BS: Tensor, position_S: Tensor, way: Way) -> Tensor:
        """Logits [B, 1, V] of the last of these tokens: S that begin their sequences, or one that goes on."""
        x, y, place = self._begin(ids_BS, position_S, self.embed_VD, self.angles_Nd, self.sizes.top_k)
        for layer in self.layers:
            x, y = self._block(x, y, layer, self.sizes, place, way)
        return self._end(x, y, self.norm_D, self.head_VD, self.sizes.eps, way)

    def ways(self, batch: int, length: int) -> list[Way]:
        """Those worth trying, likely ones first. Sums are for a compiler, which takes grouped_mm in bf16 only."""
        is_row, n_slots = batch * length == 1, batch * length * self.sizes.top_k
        attention = ["sdpa"] if length > 1 else ["sums"] if is_row and self.compiled else ["sums", "sdpa"]
        products = ["sums", "torch"] if is_row and self.compiled else ["torch"]
        experts = ["grouped", "gathered"] if n_slots <= len(self.layers[0].gate_ED) else ["grouped"]
        if is_row or (self.compiled and self.embed_VD.dtype != torch.bfloat16):
            experts = ["gathered"]
        return [Way(*each) for each in combinations(attention, products, experts)]


def layer_of(layer: Any, kept: Any) -> Layer:
    attention, weights = layer.attention, layer.mlp.weights
    qkv_ND = rows_together([attention.q.weight, attention.k.weight, attention.v.weight])
    assert qkv_ND is not None, "the model puts the three together"
    norms = [None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
    of_mlp = (layer.mlp_norm.weight, weights.gate_ED, weights.w_gate_up_E2FD, weights.w_down_EDF)
    return Layer(layer.attention_norm.weight, qkv_ND, *norms, attention.o.weight, *of_mlp, kept.k_BHNd, kept.v_BHNd)


def unusual(model: TransformerDecoder) -> str | None:
    """What `model` has that a plain decoder does not compute; None if there is nothing."""
    rope, scales = model.ropes[0], (model.embedding_scale, model.logits_scale, model.logits_cap)
    if len(model.ropes) > 1 or rope.scaling is not None or rope.rotary_dim not in (None, model.head_dim):
        return "this kind of RoPE"
    if scales != (1, 1, None) or model.head.bias is not None:
        return "scaled logits or embeddings, or a head with a bias"
    for layer in model.layers:
        if not isinstance(layer, Block) or type(layer.attention) is not Attention or type(layer.mlp) is not MoELayer:
            return "this kind of layers"
        heads, mlp = layer.attention, layer.mlp
        absent = (heads.clip_qkv, heads.window, heads.scale, heads.sinks_H, heads.value_norm_eps, heads.q.bias)
        if {*absent, heads.o.bias, layer.norm_after_attention, layer.scale_1} != {None} or heads.output_gate:
            return "this kind of attention"
        if {mlp.shared, mlp.norms, mlp.weights.gate_bias_E, mlp.weights.scale_E} != {None} or not mlp.weights.is_plain:
            return "this kind of experts"
        if type(mlp.router) is not SoftmaxTopK or mlp.router.bias_E is not None or layer.residual_scale != 1:
            return "this router"
    return None
