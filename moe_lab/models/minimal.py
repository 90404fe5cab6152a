"""model=minimal: a linear layer, its residual, and the custom op.

y = RMSNorm(x W^T + x) * weight,  x [batch, hidden]
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_lab.models import ForcedRouting, Output
from moe_lab.models.layers import AddRMSNorm, Linear


class Minimal(nn.Module):
    """The smallest model that goes through every part of the lab."""

    vocab_size: int | None = None

    def __init__(self, *, hidden: int, norm_eps: float, implementation: str):
        super().__init__()
        self.hidden = hidden
        self.linear = Linear(hidden, hidden)
        self.norm = AddRMSNorm(hidden, norm_eps, implementation)

    def input_shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        """[batch, hidden]: it has no sequence."""
        return batch, self.hidden

    def forward(self, x: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """x [batch, hidden] -> y of the same shape."""
        normed, _ = self.norm(self.linear(x), x)
        return Output(normed)
