"""`few_rows`: y = x W^T + b of few rows, which reads a weight matrix at the rate of the memory.

A product of one row with a matrix is a copy of the matrix that is summed on its way. A library's product of matrices
reads it at about half the rate of a copy, because its tiles are made for many rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.ops.library import call, register

MOST_ROWS = 8
"""Of x; beyond them the tiles of a matrix product are as quick."""


def few_rows(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[T, N] = x W^T + b, summed in fp32, by the Triton kernel.

    Args:
        x_TK: T of 1 to `MOST_ROWS`, rows with unit stride.
        weight_NK: contiguous, of the same dtype.
    """
    result: Tensor = call("few_rows", x_TK, weight_NK, bias_N)
    return result


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from moe_lab.ops.few_rows_triton import launch

    return launch(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


register("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _few_rows, _fake, reference=F.linear)
