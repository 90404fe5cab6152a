"""RMSNorm in plain torch: x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 1910.07467)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of x [..., D], in its dtype, which is the weight's too."""
    is_eager = not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())
    if is_eager and x.device.type == "cpu" and x.dtype == weight_D.dtype == torch.float32 and x.numel():
        return _by_few_calls(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _by_few_calls(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same by five operations: on a CPU torch's own is nine, and a number beside a tensor costs as much as one."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight_D)


@cache
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")
