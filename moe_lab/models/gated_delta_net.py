"""Gated delta net (2412.06464), as Qwen3-Next and Qwen3.5 have it in three layers of four in place of attention.

    q, k, v = silu(conv(W_qkv x)),  z = W_z x,  b, a = W_ba x;  q and k of each head have length 1, q times 1/sqrt(d_k)
    beta = sigmoid(b),  g = -exp(A) softplus(a + dt);  y = the gated delta rule;  W_out (norm(y) silu(z))

A query and a key serve `n_value_heads / n_heads` neighbouring heads of values. All between the projections is fp32, and
so is the rule's state: where q and k are nearly orthogonal y is small, and its norm enlarges what was rounded. A single
token is computed by the recurrence, many by chunks, and in the reference every one by the recurrence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.models.kv_cache import StateCache
from moe_lab.models.layers import Linear, RMSNorm
from moe_lab.models.short_conv import ShortConv
from moe_lab.ops.delta_rule import chunked, outputs, recurrent
from moe_lab.ops.library import is_exporting

_SMALLEST = 1e-6  # of a squared length, of the published code


class GatedDeltaNet(nn.Module):
    """In place of attention over x [B, S, D]; it knows no positions but the order of the tokens.

    Args:
        n_heads, head_dim: of queries and keys.
        n_value_heads, value_dim: of values.
        conv_width: of the convolution, in tokens.
    """

    def __init__(
        self,
        d_model: int,
        norm_eps: float,
        *,
        n_heads: int,
        head_dim: int,
        n_value_heads: int,
        value_dim: int,
        conv_width: int,
    ):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.n_value_heads, self.value_dim = n_value_heads, value_dim
        self.keys, self.values = n_heads * head_dim, n_value_heads * value_dim
        self.is_reference = False
        self.qkvz = Linear(d_model, 2 * self.keys + 2 * self.values)
        self.ba = Linear(d_model, 2 * n_value_heads)
        self.conv = ShortConv(2 * self.keys + self.values, conv_width)
        self.a_log_H = _wide(n_value_heads)
        self.dt_bias_H = _wide(n_value_heads)
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out = Linear(self.values, d_model)

    def make_cache(self, batch: int, length: int) -> StateCache:
        """Its states, the convolution's in the dtype of the parameters, for sequences of any `length`."""
        weight = self.qkvz.weight
        state = (self.n_value_heads, self.head_dim, self.value_dim)
        shapes = ((self.conv.state_shape, weight.dtype), (state, torch.float32))
        return StateCache.zeros(batch, shapes, weight.device)

    def forward(
        self,
        x_BSD: Tensor,
        cos_Sd: Tensor,
        sin_Sd: Tensor,
        cache: StateCache | None = None,
        position_S: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        before_BCk, before = None, None
        if position_S is not None or (cache is not None and cache.start):
            assert cache is not None
            before_BCk, before = cache.before(position_S)
        qkv, z = self.qkvz(x_BSD).split([2 * self.keys + self.values, self.values], dim=2)
        mixed, after_BCk = self.conv(qkv.float(), before_BCk)
        y_BHSv, after = self._rule(F.silu(mixed), self.ba(x_BSD).float(), before)
        if cache is not None:
            cache.keep(x_BSD.shape[1], position_S, after_BCk, after)
        gate = F.silu(z.unflatten(2, (-1, self.value_dim)).float())
        y_BSHv = self.norm(y_BHSv.transpose(1, 2)) * gate
        return self.out(y_BSHv.to(x_BSD.dtype).flatten(2))  # type: ignore[no-any-return]

    def _rule(self, qkv_BSn: Tensor, ba_BSn: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y [B, H, S, value_dim], the state after the last token) of the rule."""
        q, k, v = qkv_BSn.split([self.keys, self.keys, self.values], dim=2)
        q, k = (_of_length_1(x.unflatten(2, (self.n_heads, -1))) for x in (q, k))
        shared = self.n_value_heads // self.n_heads
        q, k = (x.repeat_interleave(shared, dim=2).transpose(1, 2) for x in (q * self.head_dim**-0.5, k))
        v = v.unflatten(2, (self.n_value_heads, -1)).transpose(1, 2)
        b, a = ba_BSn.transpose(1, 2).chunk(2, dim=1)
        g = -self.a_log_H.exp()[:, None] * F.softplus(a + self.dt_bias_H[:, None])
        if is_exporting():
            return outputs(q, k, v, g, b.sigmoid()), v.new_empty(0)
        if before is None:
            before = v.new_zeros(len(v), self.n_value_heads, self.head_dim, self.value_dim)
        rule = recurrent if self.is_reference or v.shape[2] == 1 else chunked
        return rule(q, k, v, g, b.sigmoid(), before)

    def use_reference(self) -> None:
        """From now on compute token by token."""
        self.is_reference = True


def _wide(width: int) -> nn.Parameter:
    """In float32 whatever the dtype of the matrices: exp of it is how fast a head forgets."""
    return nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)


def _of_length_1(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _SMALLEST)
