"""RMSNorm in plain torch: x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of x [..., D], in its dtype, which is the weight's too."""
    is_eager = not torch.compiler.is_compiling()
    if is_eager and x.device.type == "cpu" and x.dtype == weight_D.dtype == torch.float32 and x.numel():
        return _by_few_passes(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _by_few_passes(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Torch's own makes four tensors of x's size on a CPU.

    Mixing a Python number with a tensor costs as much as another op. So a small norm takes 0.8 of torch's time, and a
    large one 0.6 and less (one Xeon core, torch 2.13).
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.full_like(length, eps).addcmul_(length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight_D)
