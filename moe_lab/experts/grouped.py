"""experts=grouped: slots sorted by expert, then one grouped matrix product per projection.

On CUDA few tokens, as in decoding, are not sorted (16 in fp32, 64 in 16 bits): `ops/few_tokens.py`. On a CPU in fp32
up to 16 tokens are sorted in Python.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.ops import extension
from moe_lab.ops.combine import combine
from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.few_tokens import few_tokens_mlp, most_tokens
from moe_lab.ops.library import HAS_TRITON, is_compiled
from moe_lab.ops.segment_mm import implementation_for, segment_loop, segment_mm
from moe_lab.routers.base import Routing


class Grouped(Experts):
    """On CUDA nothing is read on the host; on a CPU only the experts in use are touched."""

    graph_safe = True
    only_plain = False

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`.

        Raises:
            UnavailableError: the device and dtype have no grouped product (see ops/segment_mm.py).
        """
        check_scale(scale)
        if _takes_few_tokens(x_TD):
            with phase("dispatch+experts+combine"):
                return few_tokens_mlp(
                    x_TD, routing.expert_ids_TK, routing.weights_TK, weights.w_gate_up_E2FD, weights.w_down_EDF,
                    scale == "input", weights.up_bias_E2F, weights.down_bias_ED, weights.activation,
                )  # fmt: skip
        if _takes_few_on_cpu(x_TD):
            compute = _one_token if len(x_TD) == 1 else _few_on_cpu
            return compute(x_TD, routing, weights, scale)
        return _sorted(x_TD, routing, weights, scale)

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        """See `Experts`: of few tokens it is not made."""
        return not (_takes_few_tokens(x_TD) or _takes_few_on_cpu(x_TD))

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: `grouped:few_tokens` or `grouped:one_token`, or `grouped` and what computes `segment_mm`.

        Where the extension sorts and sums: `dispatch` and `combine` too. Else torch does, or Python.
        """
        if _takes_few_tokens(x_TD):
            return {"experts": "grouped:few_tokens"}
        if _takes_few_on_cpu(x_TD) and len(x_TD) == 1:
            return {"experts": "grouped:one_token"}
        ran = {"experts": "grouped", "segment_mm": _segment_mm_for(x_TD, weights)}
        if _takes_few_on_cpu(x_TD):
            return ran
        if extension.sorts(x_TD.device, weights.n_experts):
            ran["dispatch"] = extension.label(x_TD.device)
        if extension.computes(x_TD.device):
            ran["combine"] = extension.label(x_TD.device)
        return ran


def _segment_mm_for(x_TD: Tensor, weights: ExpertWeights) -> str:
    return implementation_for(x_TD.device, x_TD.dtype, *weights.w_down_EDF.shape[1:])


def _takes_few_tokens(x_TD: Tensor) -> bool:
    """Whether so few tokens are computed without sorting them (ops/few_tokens.py)."""
    return x_TD.is_cuda and len(x_TD) <= most_tokens(x_TD.dtype) and HAS_TRITON


def _sorted(x_TD: Tensor, routing: Routing, weights: ExpertWeights, scale: Scale) -> Tensor:
    """The general case: gather the slots by expert, multiply, and sum each token's outputs."""
    K = routing.expert_ids_TK.shape[1]
    with phase("dispatch"):
        order = routing.dispatch or dispatch(routing.expert_ids_TK, weights.n_experts)
        perm_N = order.perm_N
        if x_TD.device.type == "cpu" and x_TD.dtype == torch.float32 and not torch.compiler.is_compiling():
            perm_N = perm_N[: int(order.offsets_E1[-1])]  # the used ones
        x_ND = x_TD.index_select(0, perm_N // K)
        if scale == "input":
            x_ND = (x_ND * routing.weights_TK.reshape(-1)[perm_N, None]).to(x_TD.dtype)
    with phase("experts"):
        implementation = _segment_mm_for(x_TD, weights)
        expert_N = None if weights.up_bias_E2F is None else routing.expert_ids_TK.reshape(-1)[perm_N].clamp(min=0)
        u_N2F = segment_mm(x_ND, weights.w_gate_up_E2FD, order.offsets_E1, implementation)
        h_NF = weights.activate(_biased(u_N2F, weights.up_bias_E2F, expert_N))
        o_ND = segment_mm(h_NF, weights.w_down_EDF, order.offsets_E1, implementation)
        o_ND = _biased(o_ND, weights.down_bias_ED, expert_N)
    with phase("combine"):
        weights_TK = routing.weights_TK if scale == "output" else None
        return combine(o_ND, order.inverse_N, weights_TK, routing.expert_ids_TK)


def _biased(y_NO: Tensor, bias_EO: Tensor | None, expert_N: Tensor | None) -> Tensor:
    """Each row plus its expert's bias."""
    return y_NO if bias_EO is None or expert_N is None else y_NO + bias_EO[expert_N].to(y_NO.dtype)


_FEW_TOKENS = 16  # whose slots Python sorts sooner than ten calls of torch do


def _takes_few_on_cpu(x_TD: Tensor) -> bool:
    """Whether so few tokens are sorted on the host (`_one_token`, `_few_on_cpu`)."""
    on_cpu = x_TD.device.type == "cpu" and x_TD.dtype == torch.float32 and not is_compiled()
    return on_cpu and 0 < len(x_TD) <= _FEW_TOKENS


def _few_on_cpu(x_TD: Tensor, routing: Routing, weights: ExpertWeights, scale: Scale) -> Tensor:
    """As `_sorted`, for few tokens on a CPU: the ids are at hand there, and lists of them cost less than tensors."""
    with phase("dispatch"):
        K = routing.expert_ids_TK.shape[1]
        ids = routing.expert_ids_TK.flatten().tolist()
        used = sorted((slot for slot, expert in enumerate(ids) if expert >= 0), key=ids.__getitem__)
        rows: dict[int, int] = {}
        for slot in used:
            rows[ids[slot]] = rows.get(ids[slot], 0) + 1
        slots = np.array(used, dtype=np.int64)  # torch.tensor takes three times as long
        slot_N, token_N = torch.from_numpy(slots), torch.from_numpy(slots // K)
        x_ND, weight_N1 = x_TD.index_select(0, token_N), routing.weights_TK.reshape(-1, 1).index_select(0, slot_N)
        if scale == "input":
            x_ND = x_ND * weight_N1
    with phase("experts"):
        expert_N = None if weights.up_bias_E2F is None else routing.expert_ids_TK.reshape(-1)[slot_N]
        u_N2F = _biased(segment_loop(x_ND, weights.w_gate_up_E2FD, rows), weights.up_bias_E2F, expert_N)
        o_ND = segment_loop(weights.activate(u_N2F), weights.w_down_EDF, rows)
        o_ND = _biased(o_ND, weights.down_bias_ED, expert_N)
    with phase("combine"):
        return torch.zeros_like(x_TD).index_add_(0, token_N, o_ND * weight_N1 if scale == "output" else o_ND)


def _one_token(x_1D: Tensor, routing: Routing, weights: ExpertWeights, scale: Scale) -> Tensor:
    """The same for one token, of which there is nothing to sort."""
    with phase("dispatch+experts+combine"):
        ids_1K, weights_1K = routing.expert_ids_TK.tolist(), routing.weights_TK.tolist()
        used = [(expert, weight) for expert, weight in zip(ids_1K[0], weights_1K[0], strict=True) if expert >= 0]
        w_up_E2FD, w_down_EDF = weights.w_gate_up_E2FD, weights.w_down_EDF
        up_bias_E2F, down_bias_ED = weights.up_bias_E2F, weights.down_bias_ED
        x_D, h_K2F = x_1D[0], x_1D.new_empty(len(used), w_up_E2FD.shape[1])
        for (expert, weight), h_2F in zip(used, h_K2F.unbind(), strict=True):
            torch.mv(w_up_E2FD[expert], x_D * weight if scale == "input" else x_D, out=h_2F)
            if up_bias_E2F is not None:
                h_2F += up_bias_E2F[expert]
        y_D = torch.zeros_like(x_D)
        for (expert, weight), h_F in zip(used, weights.activate(h_K2F).unbind(), strict=True):
            alpha = weight if scale == "output" else 1.0
            y_D.addmv_(w_down_EDF[expert], h_F, alpha=alpha)
            if down_bias_ED is not None:
                y_D.add_(down_bias_ED[expert], alpha=alpha)
        return y_D.unsqueeze(0)
