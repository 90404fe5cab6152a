"""The MoE layer of router=soft (Soft MoE, Puigcerver et al. 2023, 2308.00951, algorithm 1), one slot per expert.

    l = x Phi;  D = softmax(l) over the tokens of a sequence;  C = softmax(l) over the experts
    slots = D^T x;  y = C f(slots) [+ shared expert(x)]

Phi is the layer's gate. An expert computes one row per sequence, a mixture of its tokens, however many there are; the
paper finds one or two slots per expert best. The l2 norms of x and Phi, which it adds so that wide models train
(section 2.3), are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.marks import phase
from moe_lab.models.moe_layer import MoELayer
from moe_lab.routers.base import RouteContext, Routing


class SoftMoELayer(MoELayer):
    """x_TD -> (y_TD, Routing): every token with every expert, weighted by C.

    The sequences of `ctx.seq_start_B1` are equally long; without it all tokens are one sequence. Logits and softmaxes
    are computed in fp32: an expert sees one row, in which the rounding of a logit does not average out as over many. D
    and C are then rounded to x's dtype, in which the two products with them are taken.
    """

    def forward(self, x_TD: Tensor, ctx: RouteContext, forced: Routing | None = None) -> tuple[Tensor, Routing]:
        """A `forced` routing comes back as it is and changes nothing.

        It is there so that a pass and its reference agree on what is chosen, where rounding may tip the balance. Here
        nothing is: the weights follow from x without a jump, so each pass may compute its own.
        """
        y_TD, routing = self._mixed(x_TD, ctx)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), routing if forced is None else forced

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `MoELayer.logits`; in fp32."""
        return super().logits(x_TD.float())

    def routed(self, x_TD: Tensor, routing: Routing, ctx: RouteContext) -> Tensor:
        """See `MoELayer.routed`; of `routing` nothing is used, as in `forward`."""
        return self._mixed(x_TD, ctx)[0]

    def rows(self, x_TD: Tensor, routing: Routing, ctx: RouteContext) -> tuple[Tensor, Routing]:
        """See `MoELayer.rows`: the slots [B * E, D], each with its expert."""
        return self._slots(self.experts_input(x_TD), self._weights(x_TD, ctx)[0])

    def _mixed(self, x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, Routing]:
        """(the weighted sum of the experts' outputs [T, D], the routing that holds C)."""
        D_BSE, routing = self._weights(x_TD, ctx)
        o_ND = self.compute(*self._slots(self.experts_input(x_TD), D_BSE))
        with phase("combine"):
            C_BSE = routing.weights_TK.view_as(D_BSE).to(x_TD.dtype)
            y_BSD = C_BSE @ o_ND.view(C_BSE.shape[0], C_BSE.shape[2], x_TD.shape[1])
        return self.finished(y_BSD.view_as(x_TD)), routing

    def _weights(self, x_TD: Tensor, ctx: RouteContext) -> tuple[Tensor, Routing]:
        """(D [B, S, E] in fp32, the routing that holds C [T, E])."""
        T, E = x_TD.shape[0], self.weights.n_experts
        B = 1 if ctx.seq_start_B1 is None else ctx.seq_start_B1.shape[0] - 1
        S = T // max(B, 1)
        assert B * S == T, f"{T} tokens cannot be split into {B} sequences of equal length"
        with phase("router"):
            # The router's scores are its logits, of which D is made, too.
            weights, wanted = self.weights, ctx._replace(want_scores=True)
            scored = self.router(self.gate_input(x_TD.float()), weights.gate_ED, wanted, weights.gate_bias_E)
            ids_TK, weights_TK, order, scores_TE = scored
            assert scores_TE is not None
            # Not `scored._replace`: what that makes a pass compiled by torch 2.11 cannot return.
            routing = Routing(ids_TK, weights_TK, order, scores_TE if ctx.want_scores else None)
            return scores_TE.view(B, S, E).softmax(1), routing

    def _slots(self, x_TD: Tensor, D_BSE: Tensor) -> tuple[Tensor, Routing]:
        """(slots [B * E, D], a routing that gives each to its expert with the weight 1)."""
        B, S, E = D_BSE.shape
        with phase("dispatch"):
            slots_BED = D_BSE.to(x_TD.dtype).transpose(1, 2) @ x_TD.view(B, S, x_TD.shape[1])
            ids_N = torch.arange(E, dtype=torch.int32, device=x_TD.device).repeat(B)
            ones_N1 = torch.ones(B * E, 1, device=x_TD.device)
        return slots_BED.flatten(0, 1), Routing(ids_N.unsqueeze(1), ones_N1)
