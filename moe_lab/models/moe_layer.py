"""One MoE layer, and model=moe_layer: that layer alone, for work on routers and expert kernels.

y = experts(x, router(x W_gate^T)) [+ shared expert(x)]

With norms of its own the layer is given the residual stream, which experts, gate and shared expert each norm (Gemma 4):

y = norm(experts(norm(x), router(norm(x) W_gate^T))) [+ norm(shared expert(norm(x)))]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_lab.experts.base import Experts
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Activation, ExpertWeights, Scale
from moe_lab.marks import phase
from moe_lab.models.layers import AddRMSNorm, GatedMLP, Linear, RMSNorm
from moe_lab.routers.base import RouteContext, Router, Routing, gate_logits


class SharedExpert(nn.Module):
    """An expert that every token passes (DeepSeekMoE, 2401.06066); gated by sigmoid(x w) as in Qwen2-MoE.

    `norm_eps`: it has norms of what it reads and of what it gives.
    """

    def __init__(
        self,
        d_model: int,
        hidden_dim: int,
        *,
        gated: bool,
        activation: Activation = None,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.mlp = GatedMLP(d_model, hidden_dim, activation)
        self.gate = Linear(d_model, 1) if gated else None
        self.norm_before = None if norm_eps is None else RMSNorm(d_model, norm_eps)
        self.norm_after = None if norm_eps is None else RMSNorm(d_model, norm_eps)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = _normed(self.norm_before, x_TD)
        y_TD = _normed(self.norm_after, self.mlp(x_TD))
        return y_TD if self.gate is None else torch.sigmoid(self.gate(x_TD)) * y_TD


class OwnNorms(nn.Module):
    """Norms of what the gate reads, of what the experts read, and of what they give together.

    The gate's weight is fp32: of Gemma 4 it is a scale times 1/sqrt(d_model).
    """

    def __init__(self, d_model: int, norm_eps: float):
        super().__init__()
        self.gate_norm = RMSNorm(d_model, norm_eps, wide=True)
        self.norm_before = RMSNorm(d_model, norm_eps)
        self.norm_after = RMSNorm(d_model, norm_eps)


def _normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class MoELayer(nn.Module):
    """x_TD -> (y_TD, Routing). Models make it by `make_moe_layer`, for a router may ask for a layer of another kind."""

    def __init__(
        self,
        weights: ExpertWeights,
        router: Router,
        experts: Experts,
        shared: SharedExpert | None = None,
        norms: OwnNorms | None = None,
    ):
        super().__init__()
        self.weights, self.router, self.shared, self.norms = weights, router, shared, norms
        self.experts = experts.for_layer(weights, router.top_k, static_k=bool(router.static_k))

    def forward(self, x_TD: Tensor, ctx: RouteContext, forced: Routing | None = None) -> tuple[Tensor, Routing]:
        """`forced` replaces the router's own choice; where that fills every slot (`static_k`), it does too."""
        routing = forced
        if routing is None:
            with phase("router"):
                if self.experts.reads_dispatch(x_TD):
                    ctx = ctx._replace(want_dispatch=True)
                ctx = self.with_guess(ctx)
                routing = self.router(self.gate_input(x_TD), self.weights.gate_ED, ctx, self.weights.gate_bias_E)
        y_TD = self.routed(x_TD, routing, ctx)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), routing

    def multiplies_gate(self, x_TD: Tensor) -> bool:
        """Whether the router's own kernels do the gate's product for so many tokens, in this dtype."""
        if self.weights.gate_bias_E is not None or self.experts.reads_dispatch(x_TD):  # sorting takes logits, too
            return False
        return self.router.multiplies_gate(len(x_TD), self.weights.gate_ED, x_TD.dtype)

    def norms_input(self, x_TD: Tensor, norm: nn.Module) -> bool:
        """Whether the router's own kernels do this norm before the layer, for so many tokens, in this dtype."""
        return (
            isinstance(norm, AddRMSNorm)
            and norm.may_be_fused
            and self.multiplies_gate(x_TD)
            and self.router.norms_input(len(x_TD), norm.weight, self.weights.gate_ED, x_TD.dtype)
        )

    def norm_and_route(self, x_TD: Tensor, residual_TD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Routing]:
        """What `norm` gives, and the routing of the normed, to be given to `forward` as `forced`."""
        assert isinstance(norm, AddRMSNorm), "see norms_input"
        with phase("router"):
            return self.router.norm_and_route(x_TD, residual_TD, norm.weight, norm.eps, self.weights.gate_ED)

    def gate_input(self, x_TD: Tensor) -> Tensor:
        """What the gate reads of the layer's input."""
        return x_TD if self.norms is None else self.norms.gate_norm(x_TD)

    def experts_input(self, x_TD: Tensor) -> Tensor:
        """What the experts read of the layer's input."""
        return x_TD if self.norms is None else self.norms.norm_before(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        """The router's logits [T, E]."""
        return gate_logits(self.gate_input(x_TD), self.weights.gate_ED, self.weights.gate_bias_E)

    def with_guess(self, ctx: RouteContext) -> RouteContext:
        """`ctx` with this layer's logits for what the MLP of the layer before read, if the router looks ahead."""
        if not self.router.looks_ahead or ctx.previous_TD is None:
            return ctx
        return ctx._replace(guess_TE=self.logits(ctx.previous_TD))

    def routed(self, x_TD: Tensor, routing: Routing, ctx: RouteContext) -> Tensor:
        """The output less the shared expert's."""
        return self.finished(self.compute(*self.rows(x_TD, routing, ctx)))

    def finished(self, y_TD: Tensor) -> Tensor:
        """The output less the shared expert's, of the tokens' weighted sums."""
        return y_TD if self.norms is None else self.norms.norm_after(y_TD)

    def rows(self, x_TD: Tensor, routing: Routing, ctx: RouteContext) -> tuple[Tensor, Routing]:
        """(what the experts are given [N, D], which of them each row goes to): here the tokens themselves."""
        return self.experts_input(x_TD), routing

    def compute(self, x_ND: Tensor, routing: Routing, experts: Experts | None = None) -> Tensor:
        """The experts' outputs [N, D], weighted and summed by row; by the layer's own unless `experts` are given."""
        scale: Scale = "input" if self.router.scales_input else "output"
        if (scale_E := self.weights.scale_E) is not None:
            assert scale == "output", "a scale of outputs has no place among weights of inputs"
            ids_TK, weights_TK, order, _ = routing
            scale_TK = scale_E.index_select(0, ids_TK.flatten().clamp(min=0)).view_as(weights_TK)
            routing = Routing(ids_TK, weights_TK * scale_TK, order)
        return (experts or self.experts)(x_ND, routing, self.weights, scale=scale)

    def use_reference(self) -> None:
        self.experts = Loop()


@contextmanager
def hooked(layers: Iterable[MoELayer], hook: Callable[..., None], *, before: bool = False) -> Iterator[None]:
    """Inside, `hook` is called after every forward pass of `layers`, or `before` it: a forward hook of torch."""
    register = nn.Module.register_forward_pre_hook if before else nn.Module.register_forward_hook
    handles = [register(layer, hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`, in the order of `Output.routings`."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def indexed_moe_layers(model: nn.Module) -> list[tuple[int, MoELayer]]:
    """(index of the layer in the model, MoELayer), in the order of `moe_layers`."""
    layers: list[tuple[int, MoELayer]] = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            layers.append((numbers[0] if numbers else 0, module))
    return layers
