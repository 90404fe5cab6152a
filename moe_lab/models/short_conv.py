"""A short causal convolution over the tokens, each channel alone, as Mamba (2312.00752) has before its recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """y[t, c] = sum_k w[c, k] x[t - width + 1 + k, c] (+ b[c]); what is before the first token is 0.

    Its state are the last `width` - 1 tokens, [B, C, width - 1].
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False) if bias else None

    @property
    def state_shape(self) -> tuple[int, int]:
        """Of one sequence's state."""
        channels, _, width = self.weight.shape
        return channels, width - 1

    def forward(self, x_BSC: Tensor, before_BCk: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y [B, S, C], the state after the last token); `before_BCk`: the state before the first one."""
        x_BCS = x_BSC.transpose(1, 2)
        n_before = self.weight.shape[2] - 1
        if before_BCk is None:
            x_BCS = F.pad(x_BCS, (n_before, 0))
        else:
            x_BCS = torch.cat((before_BCk.to(x_BCS.dtype), x_BCS), dim=2)
        bias = None if self.bias is None else self.bias.to(x_BSC.dtype)
        y_BCS = F.conv1d(x_BCS, self.weight.to(x_BSC.dtype), bias, groups=len(self.weight))
        return y_BCS.transpose(1, 2), x_BCS[:, :, x_BCS.shape[2] - n_before :]
