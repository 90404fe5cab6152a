"""The k best experts of each token and their weights, by one kernel: what `route` of kernels/ computes.

    x = logits + gate bias;  s = softmax(x), sigmoid(x) or sqrt(softplus(x))
    S = top-k of s + b within the best `top_groups` of `n_groups`;  w_e = scale * s_e, or scale * s_e / sum_S s

Where nothing is added to s the ranking is done on x, whose small differences s would lose. The plain-torch form is that
of the routers themselves (routers/softmax_topk.py, routers/scored_topk.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension
from moe_lab.ops.dispatch import Dispatch
from moe_lab.ops.library import call, register
from moe_lab.ops.route_peers import PEERS, require_computes
from moe_lab.ops.selection import Selection

IMPLEMENTATIONS = ("triton", "cuda_ext", *PEERS)


class Routed(NamedTuple):
    """ids [T, K] int32, weights [T, K] float32, and the slots sorted by expert where that was asked for."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    dispatch: Dispatch | None = None


def require_computable(
    implementation: str, how: Selection, n_experts: int, *, bias: bool = False, gate_bias: bool = False
) -> None:
    """Raise `UnavailableError` if this one of `IMPLEMENTATIONS` has no kernel for it."""
    if implementation in PEERS:
        require_computes(implementation, how, bias=bias, gate_bias=gate_bias)
    if implementation != "cuda_ext":
        return
    for what, size, most in (
        ("experts", n_experts, extension.MOST_EXPERTS),
        ("experts per token", how.k, extension.MOST_K),
        ("groups", how.n_groups, extension.MOST_GROUPS),
    ):
        if size > most:
            raise UnavailableError(f"router.impl=cuda_ext: supports at most {most} {what}, not {size}")


def route(
    logits_TE: Tensor,
    how: Selection,
    implementation: str,
    *,
    gate_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    sort: bool = False,
) -> Routed:
    """By one of `IMPLEMENTATIONS`, from logits of any floating dtype; biases are taken as float32.

    `sort` fills the dispatch where the kernel can (cuda_ext). Of a row with NaN or +inf, or without a finite logit, the
    ids are still different experts, and the weights of a softmax are NaN; an expert of NaN score ranks first.
    """
    of_op = arguments(how, gate_bias_E, bias_E)
    if implementation == "triton":
        return Routed(*call("route_triton", logits_TE, *of_op))
    if implementation in PEERS:
        return Routed(*PEERS[implementation](logits_TE.contiguous(), how, bias_E))
    assert implementation == "cuda_ext", implementation
    logits_TE = extension.readable(logits_TE)
    if not sort:
        return Routed(*torch.ops.moe_lab.route(logits_TE, *of_op))
    ids_TK, weights_TK, *order = torch.ops.moe_lab.route_and_sort(logits_TE, *of_op)
    return Routed(ids_TK, weights_TK, Dispatch(*order))


def arguments(how: Selection, gate_bias_E: Tensor | None, bias_E: Tensor | None) -> tuple[Any, ...]:
    """What the ops take after their tensors."""
    biases = (None if bias is None else bias.float() for bias in (gate_bias_E, bias_E))
    groups = (how.n_groups, how.top_groups, how.group_score)
    return *biases, how.k, how.score, *groups, how.renormalize, how.scale


def multiplies_gate(computes: str, n_tokens: int, d_model: int, n_experts: int, dtype: torch.dtype) -> bool:
    """Whether a router computed by `computes` (`cuda_ext:sm_90`, say) has `gate_route`, and faster than cuBLAS."""
    name, _, architecture = computes.partition(":sm_")
    return (
        name == "cuda_ext"
        and int(architecture or 0) >= 90
        and dtype in (torch.float16, torch.bfloat16)
        and d_model % 32 == 0
        and (  # docs/kernels.md
            n_experts <= extension.FEW_EXPERTS
            or (n_tokens <= extension.MOST_GATE_TOKENS and n_tokens * d_model * n_experts <= 2**25)
        )
    )


def gate_route(
    x_TD: Tensor, gate_ED: Tensor, how: Selection, *, gate_bias_E: Tensor | None = None, bias_E: Tensor | None = None
) -> Routed:
    """`route` of the logits x gate^T, rounded to x's dtype, by the extension: see `multiplies_gate`."""
    x_TD, gate_ED = x_TD.contiguous(), gate_ED.to(x_TD.dtype).contiguous()
    return Routed(*torch.ops.moe_lab.gate_route(x_TD, gate_ED, *arguments(how, gate_bias_E, bias_E)))


def _compute(
    logits: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    k: int,
    score: str,
    n_groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from moe_lab.ops.route_triton import launch

    how = Selection(k, score, n_groups, top_groups, group_score, renormalize, scale)
    return launch(logits, how, gate_bias, bias)


register(
    "route_triton(Tensor logits, Tensor? gate_bias, Tensor? bias, int k, str score, int n_groups, int top_groups, "
    "str group_score, bool renormalize, float scale) -> (Tensor, Tensor)",
    _compute,
    extension.fake_route,
)
