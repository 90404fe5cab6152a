"""Sinkhorn's balanced transport plan between tokens and experts, in the log domain.

With K = exp(logits / temperature), the plan is diag(a) K diag(b) with rows that sum to 1 and columns that sum to T/E
(Sinkhorn 1967; as a router: S-BASE in Clark et al. 2022, 2202.01169). One iteration scales the columns, then the rows:
on return the rows are exact, and the columns as near as `iters` iterations bring them.
"""

from __future__ import annotations

import math

from torch import Tensor


def log_plan(logits_TE: Tensor, iters: int, temperature: float) -> Tensor:
    """Natural logarithm of the plan, [T, E] float32, from finite logits [T, E] of any floating dtype."""
    T, E = logits_TE.shape
    log_K_TE = logits_TE.float() / temperature
    if T == 0:
        return log_K_TE
    log_column_sum = math.log(T / E)
    log_a_T1 = -log_K_TE.logsumexp(1, keepdim=True)
    log_b_1E = log_K_TE.new_zeros(1, E)
    for _ in range(iters):
        log_b_1E = log_column_sum - (log_K_TE + log_a_T1).logsumexp(0, keepdim=True)
        log_a_T1 = -(log_K_TE + log_b_1E).logsumexp(1, keepdim=True)
    return log_K_TE + log_a_T1 + log_b_1E
