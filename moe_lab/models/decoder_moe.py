"""model=decoder_moe: the Transformer decoder with an MoE layer in place of each MLP (but for the first dense ones)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_lab.config.checks import top_k_mistake
from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models import MakeRouter
from moe_lab.models.layer_kinds import make_moe_layer
from moe_lab.models.layers import GatedMLP
from moe_lab.models.moe_layer import MoELayer, OwnNorms, SharedExpert
from moe_lab.models.transformer_decoder import Block, TransformerDecoder


class DecoderMoE(TransformerDecoder):
    """The keys are those of conf/model/decoder_moe.yaml; `mlp_hidden_dim` is the width of one expert.

    `top_k` is the number of experts per token, in all layers or one for each that has experts.

    A checkpoint may ask for more: `expert_settings`, the options of `ExpertWeights`, and `own_norms` (`OwnNorms`), with
    which an MoE layer is given the residual stream.
    """

    def __init__(
        self,
        *,
        make_router: MakeRouter,
        experts: Experts,
        n_experts: int,
        top_k: int | Sequence[int],
        shared_expert_hidden_dim: int,
        shared_expert_gate: bool,
        n_dense_layers: int,
        dense_hidden_dim: int | None,
        expert_settings: Mapping[str, Any] | None = None,
        own_norms: bool = False,
        **decoder: Any,
    ):
        self.make_router, self.experts, self.n_experts = make_router, experts, n_experts
        self.shared_hidden_dim, self.shared_gate = shared_expert_hidden_dim, shared_expert_gate
        self.n_dense_layers, self.dense_hidden_dim = n_dense_layers, dense_hidden_dim
        self.expert_settings, self.own_norms = expert_settings or {}, own_norms
        layers = [layer for layer in range(decoder["n_layers"]) if not self.is_dense(layer)]
        if (mistake := top_k_mistake(top_k, len(layers), n_experts)) is not None:
            raise ValueError(mistake)
        self.k_of_layer = dict(zip(layers, [top_k] * len(layers) if isinstance(top_k, int) else top_k, strict=True))
        super().__init__(**decoder)
        blocks = [block for block in self.layers if isinstance(block, Block)]
        if len(blocks) > 1 and any(isinstance(b.mlp, MoELayer) and b.mlp.router.looks_ahead for b in blocks):
            self.looks_ahead = True
            for block in blocks:
                block.shows_input = True

    def is_dense(self, layer: int) -> bool:
        """Whether this layer has no experts."""
        return layer < self.n_dense_layers

    def make_mlp(self, layer: int) -> nn.Module:
        if self.is_dense(layer):
            return GatedMLP(self.d_model, self.dense_hidden_dim or self.mlp_hidden_dim, self.activation)
        shared, eps = None, self.norm_eps if self.own_norms else None
        if self.shared_hidden_dim:
            sizes = (self.d_model, self.shared_hidden_dim)
            shared = SharedExpert(*sizes, gated=self.shared_gate, activation=self.activation, norm_eps=eps)
        return make_moe_layer(
            ExpertWeights(self.n_experts, self.d_model, self.mlp_hidden_dim, **self.expert_settings),
            self.make_router(self.n_experts, self.k_of_layer[layer]).at_layer(layer),
            self.experts,
            shared,
            None if eps is None else OwnNorms(self.d_model, eps),
        )
