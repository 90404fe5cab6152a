"""Sinkhorn's balanced transport plan between tokens and experts, in the log domain.

With K = exp(logits / temperature), the plan is diag(a) K diag(b) with rows that sum to 1 and columns that sum to T/E
(Sinkhorn 1967; as a router: S-BASE in Clark et al. 2022, 2202.01169). One iteration scales the columns (b), then
the rows (a, which the log-softmax does): on return the rows are exact, the columns as near as `iters` brings them, or
left alone once all sums lie within `tolerance` (a share of T/E).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension
from moe_lab.ops.library import call, is_exporting, register

IMPLEMENTATIONS = ("triton", "cuda_ext")
"""Who chooses the experts too: see `sinkhorn_route`."""


def sinkhorn_scores(logits_TE: Tensor, iters: int, temperature: float, tolerance: float = 0.0) -> Tensor:
    """What is ranked, [T, E] float32: `log_plan`; of one token, whose plan is uniform, the logits."""
    if is_exporting():  # one node of the graph
        return torch.ops.moe_lab.sinkhorn_scores(logits_TE, iters, temperature, tolerance)  # type: ignore[no-any-return]
    return _compute(logits_TE, iters, temperature, tolerance)


def _compute(logits: Tensor, iters: int, temperature: float, tolerance: float) -> Tensor:
    return logits.float() if logits.shape[0] == 1 else log_plan(logits, iters, temperature, tolerance)


def _fake(logits: Tensor, iters: int, temperature: float, tolerance: float) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32)


register(
    "sinkhorn_scores(Tensor logits, int iters, float temperature, float tolerance) -> Tensor",
    _compute,
    _fake,
    onnx="moe_lab.ops.sinkhorn_onnx",
)


def log_plan(logits_TE: Tensor, iters: int, temperature: float, tolerance: float = 0.0) -> Tensor:
    """Natural logarithm of the plan, [T, E] float32, from finite logits [T, E] of any floating dtype."""
    T, E = logits_TE.shape
    if T == 0:
        return logits_TE.float()
    log_K_TE = _log_kernel(logits_TE, temperature)
    log_b_E = log_K_TE.new_zeros(E)
    log_P_TE = log_K_TE.log_softmax(1)
    for _ in range(iters):
        step_E = math.log(T / E) - log_P_TE.logsumexp(0)
        if tolerance > 0:  # nothing is read on the host: columns that are near enough stay as they are
            step_E = torch.where(((-step_E).exp() - 1).abs().amax() <= tolerance, 0.0, step_E)
        log_b_E = log_b_E + step_E
        log_P_TE = (log_K_TE + log_b_E).log_softmax(1)
    return log_P_TE


def _log_kernel(logits_TE: Tensor, temperature: float) -> Tensor:
    # The shift of a row cancels: with its largest entry at 0 nothing overflows, and large logits keep their digits.
    wide_TE = logits_TE.float()
    return (wide_TE - wide_TE.amax(1, keepdim=True)).clamp(min=-1e30) / temperature


def require_computable(implementation: str, top_k: int, n_experts: int) -> None:
    """Raise `UnavailableError` where this one of `IMPLEMENTATIONS` has no kernel for it."""
    if implementation == "cuda_ext" and (n_experts > extension.MOST_EXPERTS or top_k > extension.MOST_K):
        raise UnavailableError(
            f"router.impl=cuda_ext: supports at most {extension.MOST_EXPERTS} experts and "
            f"{extension.MOST_K} experts per token, not {n_experts} and {top_k}"
        )


def sinkhorn_route(
    logits_TE: Tensor, top_k: int, iters: int, temperature: float, tolerance: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and choice, by one of `IMPLEMENTATIONS`: ids [T, K] int32, weights [T, K] float32, log b [E] float32.

    The k largest of `sinkhorn_scores`, ties to the lowest id, with the softmax of their logits as weights; log b is
    the columns' scale, from which `scores_of` makes the scores. The same bits from run to run. Of logits that are not
    finite the ids are still different experts.
    """
    settings = (top_k, iters, temperature, tolerance)
    if implementation == "triton":
        return call("sinkhorn_route_triton", logits_TE, *settings)  # type: ignore[no-any-return]
    assert implementation == "cuda_ext", implementation
    logits_TE = extension.readable(logits_TE)
    return torch.ops.moe_lab.sinkhorn_route(logits_TE, *settings)  # type: ignore[no-any-return]


def scores_of(logits_TE: Tensor, log_b_E: Tensor, temperature: float) -> Tensor:
    """`sinkhorn_scores` of columns already scaled."""
    if logits_TE.shape[0] < 2:
        return logits_TE.float()
    return (_log_kernel(logits_TE, temperature) + log_b_E).log_softmax(1)


def _compute_by_triton(
    logits: Tensor, top_k: int, iters: int, temperature: float, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_lab.ops.sinkhorn_triton import launch

    return launch(logits, top_k, iters, temperature, tolerance)


register(
    "sinkhorn_route_triton(Tensor logits, int top_k, int iters, float temperature, float tolerance) "
    "-> (Tensor, Tensor, Tensor)",
    _compute_by_triton,
    extension.fake_sinkhorn_route,
)
