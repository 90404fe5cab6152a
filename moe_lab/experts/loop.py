"""experts=loop: one expert at a time, as the formula is written. The reference of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.routers.base import Routing


class Loop(Experts):
    """Weights of another dtype than x are cast, one expert at a time."""

    graph_safe = False  # reads the expert ids on the host
    only_plain = False

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`."""
        check_scale(scale)
        with phase("dispatch+experts+combine"):
            y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
            used = routing.expert_ids_TK[routing.expert_ids_TK >= 0].unique().tolist()
            for expert in used:
                token_N, slot_N = (routing.expert_ids_TK == expert).nonzero(as_tuple=True)
                weight_N1 = routing.weights_TK[token_N, slot_N, None]
                x_ND = x_TD[token_N]
                if scale == "input":
                    x_ND = (x_ND * weight_N1).to(x_TD.dtype)
                h_NF = weights.activate(_linear(x_ND, weights.w_gate_up_E2FD, weights.up_bias_E2F, expert))
                o_ND = _linear(h_NF, weights.w_down_EDF, weights.down_bias_ED, expert)
                y_TD.index_add_(0, token_N, (o_ND if scale == "input" else o_ND * weight_N1).to(y_TD.dtype))
            return y_TD.to(x_TD.dtype)


def _linear(x_ND: Tensor, w_EOD: Tensor, bias_EO: Tensor | None, expert: int) -> Tensor:
    y_NO = x_ND @ w_EOD[expert].to(x_ND.dtype).T
    return y_NO if bias_EO is None else y_NO + bias_EO[expert].to(x_ND.dtype)
