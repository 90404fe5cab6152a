"""Sinkhorn's balanced transport plan between tokens and experts, in the log domain.

With K = exp(logits / temperature), the plan is diag(a) K diag(b) with rows that sum to 1 and columns that sum to T/E
(Sinkhorn 1967; as a router: S-BASE in Clark et al. 2022, 2202.01169). One iteration scales the columns (b), then
the rows (a, which the log-softmax does): on return the rows are exact, the columns as near as `iters` brings them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting, register


def sinkhorn_scores(logits_TE: Tensor, iters: int, temperature: float) -> Tensor:
    """What is ranked, [T, E] float32: `log_plan`; of one token, whose plan is uniform, the logits."""
    if is_exporting():  # one node of the graph
        return torch.ops.moe_lab.sinkhorn_scores(logits_TE, iters, temperature)  # type: ignore[no-any-return]
    return _compute(logits_TE, iters, temperature)


def _compute(logits: Tensor, iters: int, temperature: float) -> Tensor:
    return logits.float() if logits.shape[0] == 1 else log_plan(logits, iters, temperature)


def _fake(logits: Tensor, iters: int, temperature: float) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)


register(
    "sinkhorn_scores(Tensor logits, int iters, float temperature) -> Tensor",
    _compute,
    _fake,
    onnx="moe_lab.ops.sinkhorn_onnx",
)


def log_plan(logits_TE: Tensor, iters: int, temperature: float) -> Tensor:
    """Natural logarithm of the plan, [T, E] float32, from finite logits [T, E] of any floating dtype."""
    T, E = logits_TE.shape
    wide_TE = logits_TE.float()
    if T == 0:
        return wide_TE
    # The shift of a row cancels: with its largest entry at 0 nothing overflows, and large logits keep their digits.
    log_K_TE = (wide_TE - wide_TE.amax(1, keepdim=True)).clamp(min=-1e30) / temperature
    log_b_E = log_K_TE.new_zeros(E)
    log_P_TE = log_K_TE.log_softmax(1)
    for _ in range(iters):
        log_b_E = log_b_E + (math.log(T / E) - log_P_TE.logsumexp(0))
        log_P_TE = (log_K_TE + log_b_E).log_softmax(1)
    return log_P_TE
