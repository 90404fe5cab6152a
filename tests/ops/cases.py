"""What the tests of Triton kernels share: where they run, in which dtypes (half of them are slow), and on what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where a fixture cannot say it
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded by its sizes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)
