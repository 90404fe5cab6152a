"""Each MoE layer of a run against its fp32 reference: its routes, and its output by token and by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import MismatchError
from moe_lab.measure.tolerances import Tolerance, exact_products
from moe_lab.models.moe_layer import MoELayer, indexed_moe_layers, moe_layers
from moe_lab.routers.base import RouteContext, Router, Routing, check_finite
from moe_lab.routers.contract import members, weights_by_expert

_ROWS_AT_ONCE = 1 << 13  # what the checks compute in one piece, so that they need little memory beside the run's own
_LEAST = 1e-30  # squared length of an output: below it nothing is divided by it


def compare_routes(
    ran: Routing,
    reference: Routing,
    n_experts: int,
    layer: int,
    tolerance: Tolerance,
    weights_TK: Tensor | None = None,
    logits_TE: Tensor | None = None,
    *,
    static_k: bool = True,
) -> int:
    """Number of near-ties in which `ran` chose otherwise than `reference` (which holds its scores).

    `weights_TK` are the weights that the reference gives to the experts of `ran`, where its router can tell
    (`Router.weigh`); else, of a near-tie, only what the weights add up to is compared. `logits_TE` are those that the
    reference selected from, for `tolerance.logit`. Where a token's number of experts is not fixed (`static_k`), a score
    says by how much an expert was chosen or missed, and each that differs must be small.

    Raises:
        MismatchError: a set differs where the scores do not tie, or a weight differs.
    """
    changed_T, near_T = _changed_sets(ran, reference, n_experts, tolerance, logits_TE, static_k)
    if bool((changed_T & ~near_T).any()):
        token = int((changed_T & ~near_T).nonzero()[0, 0])
        raise MismatchError(
            "route",
            f"layer {layer}: for {int((changed_T & ~near_T).sum())} tokens the experts differ from the fp32 selection "
            f"of the same logits (first: token {token}, {sorted(ran.expert_ids_TK[token].tolist())} instead of "
            f"{sorted(reference.expert_ids_TK[token].tolist())})",
        )
    off_T = _weight_errors(ran, reference, n_experts, weights_TK, changed_T)
    if off_T.numel() and not float(off_T.max()) <= tolerance.weight:  # NaN too
        raise MismatchError(
            "route",
            f"layer {layer}: a routing weight of token {int(off_T.argmax())} differs by {float(off_T.max()):.2e} "
            f"(allowed: {tolerance.weight:.0e})",
        )
    return int(near_T.sum())


def differing_tokens(
    got: Routing,
    wanted: Routing,
    n_experts: int,
    tolerance: Tolerance,
    weights_TK: Tensor | None,
    logits_TE: Tensor,
) -> Tensor:
    """[T] bool: whose experts or weights differ, but for near-ties; arguments as in `compare_routes`."""
    changed_T, near_T = _changed_sets(got, wanted, n_experts, tolerance, logits_TE, fills_slots(got, wanted))
    off_T = _weight_errors(got, wanted, n_experts, weights_TK, changed_T)
    return (changed_T & ~near_T) | ~(off_T <= tolerance.weight)  # NaN too


def fills_slots(*routings: Routing) -> bool:
    """Whether every token has an expert in each slot: what `scores_TE` then says is a ranking, else a margin."""
    return all(bool((routing.expert_ids_TK >= 0).all()) for routing in routings)


def is_constant(values_TE: Tensor) -> Tensor:
    """[T] bool: whose values are all equal."""
    return values_TE.amax(1) == values_TE.amin(1)


def scored_selection(router: Router, logits_TE: Tensor, ctx: RouteContext) -> Routing:
    """What `router` selects, with what it ranked.

    Raises:
        ValueError: it does not say that of each expert.
    """
    routing = router.select(logits_TE, ctx._replace(want_scores=True, want_dispatch=False))
    if routing.scores_TE is None:
        raise ValueError(f"router: {type(router).__name__}.select must fill scores_TE if ctx.want_scores.")
    if routing.scores_TE.shape != logits_TE.shape:
        raise ValueError(
            f"router: {type(router).__name__}.select gives scores_TE {tuple(routing.scores_TE.shape)} of logits "
            f"{tuple(logits_TE.shape)}; the shapes must be equal."
        )
    return routing


def _changed_sets(
    ran: Routing,
    reference: Routing,
    n_experts: int,
    tolerance: Tolerance,
    logits_TE: Tensor | None,
    static_k: bool,
) -> tuple[Tensor, Tensor]:
    """Which tokens have another set of experts than in `reference`, and which of these are near-ties; [T] bool each."""
    assert reference.scores_TE is not None
    ran_TE, want_TE = members(ran.expert_ids_TK, n_experts), members(reference.expert_ids_TK, n_experts)
    scores_TE = reference.scores_TE.float()
    # The worst score against the best among the experts that only one of the two chose. Rounding is a share of the
    # scores that the reference chose: an expert that is masked or hardly likely says nothing about it.
    differs_TE = ran_TE != want_TE
    highest_T = scores_TE.masked_fill(~differs_TE, -torch.inf).amax(-1)
    lowest_T = scores_TE.masked_fill(~differs_TE, torch.inf).amin(-1)
    scale_T = scores_TE.masked_fill(~want_TE | ~scores_TE.isfinite(), 0).abs().amax(-1)
    changed_T = differs_TE.any(-1)
    allowed_T = tolerance.score * scale_T
    if logits_TE is not None and tolerance.logit:
        allowed_T = allowed_T + tolerance.logit * logits_TE.float().abs().median(-1).values
    if static_k:
        near_T = changed_T & (highest_T - lowest_T <= allowed_T) & (ran_TE.sum(-1) == want_TE.sum(-1))
    else:
        near_T = changed_T & (torch.maximum(highest_T, -lowest_T) <= allowed_T)
    if logits_TE is not None:  # where all scores of a token are equal and its logits are not, nothing says it is one
        near_T &= ~is_constant(scores_TE) | is_constant(logits_TE)
    return changed_T, near_T


def _weight_errors(
    ran: Routing, reference: Routing, n_experts: int, weights_TK: Tensor | None, changed_T: Tensor
) -> Tensor:
    """[T]: how far each token's weights are off, at most; of a changed set see `compare_routes`."""
    ran_weights_TE = weights_by_expert(ran, n_experts)
    off_TE = ran_weights_TE - weights_by_expert(reference, n_experts)
    if weights_TK is None:
        tied_off_T = off_TE.sum(-1).abs()
    else:
        wanted = Routing(ran.expert_ids_TK, weights_TK.masked_fill(ran.expert_ids_TK < 0, 0))
        tied_off_T = (ran_weights_TE - weights_by_expert(wanted, n_experts)).abs().amax(-1)
    return torch.where(changed_T, tied_off_T, off_TE.abs().amax(-1))


class LayerProbe:
    """Looks at every MoE layer of an eager pass with the run's routing forced, against the fp32 reference twin."""

    def __init__(self, model: nn.Module, twin: nn.Module, tolerance: Tolerance, *, routes: bool = True):
        self.tolerance, self.near_ties, self.routes = tolerance, 0, routes
        self.expert_error, self.token_error = 0.0, 0.0
        self._along, self._size, self._size_squared = 0.0, 0.0, 0.0
        self.looks = True
        """Whether a pass is looked at."""
        self._handles = []
        self.n_layers = len(moe_layers(model))
        for (index, layer), reference in zip(indexed_moe_layers(model), moe_layers(twin), strict=True):
            self._handles.append(layer.register_forward_hook(self._hook(index, reference)))

    @property
    def scale_error(self) -> float:
        """By what share the outputs of all experts, taken together, are too large or too small."""
        return abs(self._along) / max(self._size, _LEAST)

    @property
    def n_outputs(self) -> float:
        """How many outputs that is: as many as would weigh the same if they were equally large."""
        return self._size**2 / self._size_squared if self._size_squared else 0.0

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int, reference: MoELayer) -> Any:
        def look(layer: MoELayer, arguments: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
            if not self.looks:
                return
            x_TD, ctx = arguments[0], arguments[1]
            routing = result[1]
            if self.routes:
                self._compare_routes(index, layer, reference, x_TD, ctx, routing)
            y_TD = layer.routed(x_TD, routing, ctx)
            with exact_products():
                y_reference_TD = reference.routed(x_TD.float(), routing, ctx)
            off_T, _, size_T = _compared(y_TD, y_reference_TD)
            self._keep_worst("token_error", (off_T / size_T).sqrt())
            self._compare_experts(layer, reference, *layer.rows(x_TD, routing, ctx))

        return look

    def _compare_routes(
        self, index: int, layer: MoELayer, reference: MoELayer, x_TD: Tensor, ctx: RouteContext, routing: Routing
    ) -> None:
        logits_TE, ctx = layer.logits(x_TD), layer.with_guess(ctx)
        check_finite(logits_TE, index)
        router, E = reference.router, layer.weights.n_experts
        with exact_products():
            want = scored_selection(router, logits_TE.float(), ctx)
            weights_TK = router.weigh(logits_TE.float(), routing.expert_ids_TK)
        static_k = router.static_k if router.static_k is not None else fills_slots(routing, want)
        self.near_ties += compare_routes(
            routing, want, E, index, self.tolerance, weights_TK, logits_TE, static_k=static_k
        )

    def _compare_experts(self, layer: MoELayer, reference: MoELayer, x_TD: Tensor, routing: Routing) -> None:
        """Each used slot as a token of its own with the weight 1: nothing hides in the sum over a token's experts.

        By what computes so many tokens as there are, not slots.
        """
        experts = layer.experts.chosen(x_TD)
        E, K = layer.weights.n_experts, routing.expert_ids_TK.shape[1]
        ids_N = routing.expert_ids_TK.flatten()
        sums_3E = torch.zeros(3, E, device=x_TD.device, dtype=torch.float64)
        squared = torch.zeros((), device=x_TD.device, dtype=torch.float64)
        for slot_N in (ids_N >= 0).nonzero().squeeze(1).split(_ROWS_AT_ONCE):
            alone = Routing(ids_N[slot_N, None], torch.ones(len(slot_N), 1, device=x_TD.device))
            x_ND = x_TD[slot_N // K]
            y_ND = layer.compute(x_ND, alone, experts)
            with exact_products():
                y_reference_ND = reference.compute(x_ND.float(), alone)
            compared_3N = _compared(y_ND, y_reference_ND).double()
            sums_3E.index_add_(1, ids_N[slot_N], compared_3N)
            squared += compared_3N[2].square().sum()
        off_E, along_E, size_E = sums_3E
        self._keep_worst("expert_error", (off_E / size_E.clamp(min=_LEAST)).sqrt())
        self._along, self._size = self._along + float(along_E.sum()), self._size + float(size_E.sum())
        self._size_squared += float(squared)

    def _keep_worst(self, name: str, errors: Tensor) -> None:
        """Note the largest under `name`; infinity if any is not finite."""
        if errors.numel():
            error = float(errors.max()) if bool(errors.isfinite().all()) else float("inf")
            setattr(self, name, max(getattr(self, name), error))


def _compared(y: Tensor, reference: Tensor) -> Tensor:
    """[3, rows]: of the difference to the reference the squared length, and how much of it lies along the reference;
    the reference's squared length.
    """
    off = y.float() - reference
    size = reference.square().sum(-1).clamp(min=_LEAST)
    return torch.stack([off.square().sum(-1), (off * reference).sum(-1), size])
