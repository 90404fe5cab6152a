"""Multi-head latent attention (MLA: DeepSeek-V2, 2405.04434): keys and values of all heads come from one short vector.

    c = norm(W_down x) [rank],  r = turned(W_rope x) [rope],  k_h = [U_h c; r],  v_h = V_h c
    q_h = [q_nope; turned(q_rope)],  y_h = sum_n softmax_n(scale q_h . k_hn) v_hn

Only c and r are cached, for all heads together. A token that goes on from the cache attends to them as they are: q_nope
U_h replaces the query and V_h comes after the sum ("absorbed" matrices), so keys and values of heads are never made.
Many tokens at once make them, because a product of the width nope + rope costs less than one of rank + rope. A chunk of
a prefill makes those of all tokens before it anew, of one layer at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.models.attend import attend
from moe_lab.models.attention_backend import Call, kind_of
from moe_lab.models.kv_cache import LatentCache, LayerCache
from moe_lab.models.layers import Linear, RMSNorm
from moe_lab.ops.latent_attention import latent_attention
from moe_lab.ops.library import resolve_implementation
from moe_lab.ops.rotate import rotate_both

_NORM_EPS = 1e-6  # of the published code, whatever the decoder's is


class LatentAttention(nn.Module):
    """Self-attention over x [B, S, D].

    Args:
        nope_dim, rope_dim: of a head's query and key, what is not turned and what is.
        v_dim: of a head's value.
        kv_rank, q_rank: of the latent; None: queries have none.
        scale: of the softmax, on top of 1/sqrt(nope_dim + rope_dim).
        bias: whether the projections of x, and the last one, have a bias.
        growth: (beta, N): a query at position p is multiplied by 1 + beta ln(1 + floor(p / N)), as in Llama 4.
        backend: who computes many queries (attention_backend.py).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        kv_rank: int,
        q_rank: int | None,
        scale: float,
        bias: bool,
        growth: tuple[float, int] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.n_heads, self.nope_dim, self.rope_dim, self.v_dim = n_heads, nope_dim, rope_dim, v_dim
        self.growth, self.backend = growth, backend
        self.kv_rank, self.scale = kv_rank, scale * (nope_dim + rope_dim) ** -0.5
        width = n_heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q = Linear(d_model, width)
        else:
            self.q_down = Linear(d_model, q_rank, bias=bias)
            self.q_down_norm = RMSNorm(q_rank, _NORM_EPS)
            self.q_up = Linear(q_rank, width)
        self.has_q_rank = q_rank is not None
        self.kv_down = Linear(d_model, kv_rank + rope_dim, bias=bias)
        self.kv_down_norm = RMSNorm(kv_rank, _NORM_EPS)
        self.kv_up = Linear(kv_rank, n_heads * (nope_dim + v_dim))
        self.o = Linear(n_heads * v_dim, d_model, bias=bias)
        self.computed_by = "torch"

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """Decide who turns queries and keys, and attends to one new token, on `device`."""
        self.computed_by = resolve_implementation("auto", device, op="attention")

    def use_reference(self) -> None:
        """From now on compute in plain torch."""
        self.computed_by, self.backend = "torch", "auto"

    def decoded_by(self, n_tokens: int) -> str:
        """Who attends to so many new tokens of a sequence on the cache: `torch` or `triton`."""
        return self.computed_by if n_tokens == 1 else "torch"

    def make_cache(self, batch: int, length: int) -> LayerCache:
        """Room for `length` positions of `batch` sequences, in the dtype of the parameters."""
        shape = (batch, 1, length, self.kv_rank + self.rope_dim)
        return LatentCache(self.kv_up.weight.new_zeros(shape), self.kv_rank)

    def call(self, n_tokens: int, n_keys: int | None, device: torch.device) -> Call:
        """See `Attention.call`; a step attends to the latents, which all heads share."""
        dtype = self.kv_up.weight.dtype
        if n_keys is None:
            return Call(device, dtype, self.n_heads, 1, self.kv_rank + self.rope_dim, self.kv_rank, "mask")
        sizes = (self.n_heads, self.n_heads, self.nope_dim + self.rope_dim, self.v_dim)
        return Call(device, dtype, *sizes, kind_of(n_tokens, n_keys, None))

    def forward(
        self,
        x_BSD: Tensor,
        cos_Sd: Tensor,
        sin_Sd: Tensor,
        cache: LayerCache | None = None,
        position_S: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        q = self.q_up(self.q_down_norm(self.q_down(x_BSD))) if self.has_q_rank else self.q(x_BSD)
        q_BHSd = q.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        if self.growth is not None:
            q_BHSd = q_BHSd * self._grown(x_BSD, cache, position_S)
        q_nope, q_rope = q_BHSd.split([self.nope_dim, self.rope_dim], dim=-1)
        c, r = self.kv_down(x_BSD).unsqueeze(1).split([self.kv_rank, self.rope_dim], dim=-1)
        c = self.kv_down_norm(c)
        q_rope, r = rotate_both(q_rope, r, cos_Sd, sin_Sd, self.computed_by)
        latent_B1Sm = torch.cat((c, r), dim=-1)
        if position_S is None:
            if cache is not None:
                latent_B1Nm, c = cache.begin(latent_B1Sm, c)
                r = latent_B1Nm[..., self.kv_rank :]
            up_BHNd = self.kv_up(c.squeeze(1)).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            k_nope, v = up_BHNd.tensor_split([self.nope_dim], dim=-1)
            k = torch.cat((k_nope, r.expand(-1, self.n_heads, -1, -1)), dim=-1)
            y = attend(torch.cat((q_nope, q_rope), dim=-1), k, v, scale=self.scale, backend=self.backend)
        else:
            assert cache is not None
            up_Hdr = self.kv_up.weight.to(x_BSD.dtype).unflatten(0, (self.n_heads, -1))
            k_up, v_up = up_Hdr.tensor_split([self.nope_dim], dim=1)
            q_latent = torch.cat((torch.einsum("bhsd,hdr->bhsr", q_nope, k_up), q_rope), dim=-1)
            kept = cache.put(latent_B1Sm, c, position_S)
            if self.decoded_by(x_BSD.shape[1]) == "triton":
                one_BHm, latent_BNm = q_latent.squeeze(2), kept[0].squeeze(1)
                y = latent_attention(one_BHm, latent_BNm, self.kv_rank, position_S, self.scale).unsqueeze(2)
            else:
                y = attend(q_latent, *kept, position_S, scale=self.scale, backend=self.backend)
            y = torch.einsum("bhsr,hdr->bhsd", y, v_up)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _grown(self, x_BSD: Tensor, cache: LayerCache | None, position_S: Tensor | None) -> Tensor:
        """[S, 1], what queries are multiplied by."""
        assert self.growth is not None
        beta, length = self.growth
        if position_S is None:
            position_S = torch.arange(x_BSD.shape[1], device=x_BSD.device) + (0 if cache is None else cache.start)
        rounds_S = torch.div(position_S, length, rounding_mode="floor").float()
        return (1 + beta * rounds_S.log1p()).to(x_BSD.dtype).unsqueeze(1)
