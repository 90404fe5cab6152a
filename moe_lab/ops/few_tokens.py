"""The expert MLPs of few tokens (decoding), without sorting them: each expert in use multiplies all tokens at once.

    h[t, k] = silu(g) * u,  (g, u) = x[t] W_gate_up[e]^T;   o[t, k] = h[t, k] W_down[e]^T     where ids[t, k] = e

Each product plus a bias of the expert's, and the clamped activation of gpt-oss or gelu(g) * u instead of silu(g) * u,
if asked for.

A matrix unit takes 16 rows at the least, and no token has an expert twice. So with at most 16 tokens there is nothing
to gain from gathering an expert's own: the weights are read once, which is what decoding costs, and rows that are not
its own are dropped. In 16 bits 64 rows are still few: they make 64 operations for each byte of the weights, and a GPU
does more than that while it reads the byte. Nothing is read on the host.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_lab.ops.library import call, register


def most_tokens(dtype: torch.dtype) -> int:
    """How many tokens of this dtype are few."""
    return 16 if dtype == torch.float32 else 64


def few_tokens_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    scales_input: bool,
    up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: tuple[float, float] | Literal["gelu_tanh"] | None = None,
) -> Tensor:
    """[T, D], the weighted sum of each token's experts; by Triton kernels, fp32 accumulation.

    Args:
        x_TD: at most `most_tokens`.
        ids_TK: int32, -1 for an unused slot; no token has an expert twice.
        weights_TK: float32; they multiply the expert's input where `scales_input`, else its output.
        w_gate_up_E2FD, w_down_EDF: contiguous, of x's dtype.
        up_bias_E2F, down_bias_ED: both or none; contiguous.
        activation: see `experts.weights.Activation`; of a clamped one alpha and limit.

    Raises:
        ValueError: the matrices have another dtype.
    """
    alpha, limit = activation if isinstance(activation, tuple) else (0.0, 0.0)
    operands = (x_TD, ids_TK, weights_TK, w_gate_up_E2FD, w_down_EDF)
    settings = (alpha, limit, activation == "gelu_tanh")
    result: Tensor = call("few_tokens_mlp", *operands, scales_input, up_bias_E2F, down_bias_ED, *settings)
    return result


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    if not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise ValueError(
            f"few_tokens_mlp: x and the weights must have the same dtype; got {x.dtype}, "
            f"{w_gate_up.dtype} and {w_down.dtype}"
        )


def _compute(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, alpha: float = 0.0, limit: float = 0.0,
    gelu: bool = False,
) -> Tensor:  # fmt: skip
    from moe_lab.ops.few_tokens_triton import launch

    _check(x, w_gate_up, w_down)
    assert x.shape[0] <= most_tokens(x.dtype) and w_gate_up.is_contiguous() and w_down.is_contiguous()
    return launch(x, ids, weights, w_gate_up, w_down, scales_input, up_bias, down_bias, alpha, limit, gelu)


def _fake(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, alpha: float = 0.0, limit: float = 0.0,
    gelu: bool = False,
) -> Tensor:  # fmt: skip
    _check(x, w_gate_up, w_down)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "few_tokens_mlp(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, bool scales_input, "
    "Tensor? up_bias=None, Tensor? down_bias=None, float alpha=0.0, float limit=0.0, bool gelu=False) -> Tensor",
    _compute,
    _fake,
)
