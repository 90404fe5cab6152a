"""LFM2's short convolution, in most layers in place of attention: out(c * conv(b * u)), with b, c, u = in(x)."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lab.models.kv_cache import StateCache
from moe_lab.models.layers import Linear
from moe_lab.models.short_conv import ShortConv


class ConvMixer(nn.Module):
    """Over x [B, S, D]; it knows no positions but the order of the tokens.

    Args:
        width: of the convolution, in tokens.
        bias: whether the convolution and the two projections have one.
    """

    def __init__(self, d_model: int, *, width: int, bias: bool):
        super().__init__()
        self.into = Linear(d_model, 3 * d_model, bias=bias)
        self.conv = ShortConv(d_model, width, bias=bias)
        self.out = Linear(d_model, d_model, bias=bias)

    def make_cache(self, batch: int, length: int) -> StateCache:
        """The convolution's state, in the dtype of the parameters, for sequences of any `length`."""
        weight = self.into.weight
        return StateCache.zeros(batch, ((self.conv.state_shape, weight.dtype),), weight.device)

    def forward(
        self,
        x_BSD: Tensor,
        cos_Sd: Tensor,
        sin_Sd: Tensor,
        cache: StateCache | None = None,
        position_S: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        before = None
        if position_S is not None or (cache is not None and cache.start):
            assert cache is not None
            (before,) = cache.before(position_S)
        b, c, u = self.into(x_BSD).chunk(3, dim=2)
        mixed, after = self.conv(b * u, before)
        if cache is not None:
            cache.keep(x_BSD.shape[1], position_S, after)
        return self.out(c * mixed)  # type: ignore[no-any-return]
