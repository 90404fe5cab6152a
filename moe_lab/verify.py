"""Verified before timed: is what ran what was asked for?

route   each layer's expert ids and weights against the fp32 selection of the same logits. The sets must be equal but
        for near-ties: tokens whose boundary margin lies below the dtype's rounding. Those are counted.
layers  the fp32 reference of the whole model with the run's routing forced, layer by layer; and each MoE layer alone
        on the run's own input, by token and by expert, where one wrong expert of many cannot hide in an average. Of
        prefill and decoding also what the cache holds at each position: of a long context one wrong key or value
        changes the output by less than bf16 rounds.
free    the reference with its own routing: recorded, decides nothing (a near-tie may flip an expert, and a flipped
        expert is no error).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import MismatchError
from moe_lab.measure.roofline import count_flops
from moe_lab.models import Output
from moe_lab.models.kv_cache import KVCache, LayerCache
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.serving import Decode, Prefill, whole_routing
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.ops.dispatch import dispatch
from moe_lab.records.schema import Check
from moe_lab.routers.base import RouteContext, Routing, check_finite


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains in one dtype; everything beyond is a fault. About twice what correct runs were seen to do.

    `model`, `expert` and `token` bound ||y - reference|| / ||reference||.
    """

    model: float  # of the whole model's output, times the square root of its depth: rounding adds up like a random walk
    expert: float  # of one expert's outputs, before they are weighted and summed; the worst expert
    token: float  # of one token's output of one MoE layer; the worst token
    score: float  # of a selection score, as a share of the token's largest: below it two experts are a near-tie
    weight: float  # absolute, of a routing weight
    logit: float = 0.0  # of a router logit, as a share of the token's median one, where the run's own are not at hand
    cache: float = 0.0  # of a token's keys or values in a layer's cache: `token` times the square root of the depth


TOLERANCES = {
    torch.float32: Tolerance(model=1e-5, expert=1e-5, token=3e-5, score=1e-6, weight=1e-5),
    torch.float16: Tolerance(model=1.5e-3, expert=2e-3, token=4e-3, score=1e-3, weight=2e-3),
    torch.bfloat16: Tolerance(model=1.3e-2, expert=1.5e-2, token=3e-2, score=8e-3, weight=1.6e-2),
}
_TOKENS_AT_ONCE = 1 << 14  # of whole sequences in one pass of the reference
_ROWS_AT_ONCE = 1 << 13  # what the checks compute in one piece, so that they need little memory beside the run's own


def tolerance_of(model: nn.Module, dtype: torch.dtype, *, fuses: bool = False) -> Tolerance:
    """The tolerances for `model` in `dtype`; `fuses` as in `verify`."""
    allowed = TOLERANCES[dtype]
    walk = max(len(getattr(model, "layers", ())), 1) ** 0.5
    allowed = replace(allowed, model=allowed.model * walk, cache=allowed.token * walk)
    if not fuses:
        return allowed
    # Rounding on the way to the logits is that of the model's output so far; the median is 2/3 of a standard deviation.
    return replace(allowed, logit=3 * allowed.model, weight=allowed.weight + allowed.model)


@contextmanager
def exact_products() -> Iterator[None]:
    """Full fp32 matrix products inside: TF32 off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Distance:
    """||y - reference|| and ||reference||, Frobenius, summed in fp64 over as many pieces as are added."""

    def __init__(self) -> None:
        self.largest, self._off, self._size = 0.0, 0.0, 0.0

    def add(self, y: Tensor, reference: Tensor) -> None:
        """One more piece."""
        for some, wanted in zip(y.flatten().split(1 << 22), reference.flatten().split(1 << 22), strict=True):
            off = some.double() - wanted.double()
            self._off += float(off.square().sum())
            self._size += float(wanted.double().square().sum())
            if off.numel() and not math.isnan(self.largest):
                largest = float(off.abs().max())
                self.largest = self.largest if largest <= self.largest else largest  # NaN stays

    def relative(self) -> float:
        """||y - reference|| / ||reference||; infinite if y holds anything not finite."""
        if not math.isfinite(self._off):
            return math.inf
        return math.sqrt(self._off / self._size) if self._size > 0 else (0.0 if self._off == 0 else math.inf)


def relative_error(y: Tensor, reference: Tensor) -> float:
    """See `Distance.relative`."""
    distance = Distance()
    distance.add(y, reference)
    return distance.relative()


def moe_layers(model: nn.Module) -> list[tuple[int, MoELayer]]:
    """(index of the layer in the model, MoELayer), in the order of `Output.routings`."""
    found: list[tuple[int, MoELayer]] = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found.append((numbers[0] if numbers else 0, module))
    return found


def check_contract(routing: Routing, n_tokens: int, n_experts: int, layer: int) -> None:
    """Raise `MismatchError` naming the clause of the router's contract that `routing` breaks."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK

    def broken(clause: str) -> MismatchError:
        return MismatchError("route", f"layer {layer}: the router breaks its contract: {clause}", clause)

    if ids_TK.dim() != 2 or ids_TK.shape[0] != n_tokens or weights_TK.shape != ids_TK.shape:
        raise broken(f"ids {tuple(ids_TK.shape)} and weights {tuple(weights_TK.shape)} are not both [{n_tokens}, K]")
    if ids_TK.dtype != torch.int32 or weights_TK.dtype != torch.float32:
        raise broken(f"ids are {ids_TK.dtype} and weights {weights_TK.dtype}, not int32 and float32")
    if bool(((ids_TK < -1) | (ids_TK >= n_experts)).any()):
        raise broken(f"an expert id lies outside -1 .. {n_experts - 1}")
    ordered = ids_TK.sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise broken("a token names one expert twice")
    if not bool(weights_TK.isfinite().all()):
        raise broken("a weight is NaN or infinite")
    if bool((weights_TK[ids_TK < 0] != 0).any()):
        raise broken("an unused slot (id -1) has a weight")
    if routing.dispatch is not None:
        wanted = dispatch(ids_TK, n_experts)
        if not all(torch.equal(its, other) for its, other in zip(routing.dispatch, wanted, strict=True)):
            raise broken("the slots of its dispatch are not sorted by expert")


def members(ids_TK: Tensor, n_experts: int) -> Tensor:
    """[T, E] bool: which experts each token uses."""
    spread_TE = ids_TK.new_zeros(ids_TK.shape[0], n_experts + 1)
    spread_TE.scatter_(1, torch.where(ids_TK < 0, n_experts, ids_TK).long(), 1)
    return spread_TE[:, :n_experts].bool()


def weights_by_expert(routing: Routing, n_experts: int) -> Tensor:
    """[T, E] float32, 0 for experts that are not used."""
    spread_TE = routing.weights_TK.new_zeros(routing.weights_TK.shape[0], n_experts + 1)
    ids_TK = torch.where(routing.expert_ids_TK < 0, n_experts, routing.expert_ids_TK).long()
    return spread_TE.scatter_add_(1, ids_TK, routing.weights_TK)[:, :n_experts]


def changed_sets(a: Sequence[Routing], b: Sequence[Routing], n_experts: Sequence[int]) -> int:
    """How many (layer, token) pairs use another set of experts in `a` than in `b`."""
    return sum(
        int((members(one.expert_ids_TK, E) != members(other.expert_ids_TK, E)).any(-1).sum())
        for one, other, E in zip(a, b, n_experts, strict=True)
    )


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
    if bool((changed_T & ~near_T).any()):
        token = int((changed_T & ~near_T).nonzero()[0, 0])
        raise MismatchError(
            "route",
            f"layer {layer}: {int((changed_T & ~near_T).sum())} tokens go to other experts than the fp32 selection of "
            f"their logits (first: token {token}, {sorted(ran.expert_ids_TK[token].tolist())} instead of "
            f"{sorted(reference.expert_ids_TK[token].tolist())})",
        )
    ran_weights_TE = weights_by_expert(ran, n_experts)
    off_TE = ran_weights_TE - weights_by_expert(reference, n_experts)
    if weights_TK is None:
        tied_off_T = off_TE.sum(-1).abs()
    else:
        wanted = Routing(ran.expert_ids_TK, weights_TK.masked_fill(ran.expert_ids_TK < 0, 0))
        tied_off_T = (ran_weights_TE - weights_by_expert(wanted, n_experts)).abs().amax(-1)
    off_T = torch.where(changed_T, tied_off_T, off_TE.abs().amax(-1))
    if off_T.numel() and float(off_T.max()) > tolerance.weight:
        raise MismatchError(
            "route",
            f"layer {layer}: a routing weight of token {int(off_T.argmax())} differs by {float(off_T.max()):.2e} "
            f"(allowed: {tolerance.weight:.0e})",
        )
    return int(near_T.sum())


class LayerProbe:
    """Looks at every MoE layer of an eager pass with the run's routing forced, against the fp32 reference twin."""

    def __init__(self, model: nn.Module, twin: nn.Module, tolerance: Tolerance, *, routes: bool = True):
        self.tolerance, self.near_ties, self.routes = tolerance, 0, routes
        self.expert_error, self.token_error = 0.0, 0.0
        self._handles = []
        self.n_layers = len(moe_layers(model))
        for (index, layer), (_, reference) in zip(moe_layers(model), moe_layers(twin), strict=True):
            self._handles.append(layer.register_forward_hook(self._hook(index, reference)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int, reference: MoELayer) -> Any:
        def look(layer: MoELayer, arguments: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
            x_TD, ctx = arguments[0], arguments[1]
            routing = result[1]
            if self.routes:
                self._compare_routes(index, layer, reference, x_TD, ctx, routing)
            y_TD = layer.routed(x_TD, routing, ctx)
            with exact_products():
                y_reference_TD = reference.routed(x_TD.float(), routing, ctx)
            self._keep_worst("token_error", *_squares(y_TD, y_reference_TD))
            self._compare_experts(layer, reference, *layer.rows(x_TD, routing, ctx))

        return look

    def _compare_routes(
        self, index: int, layer: MoELayer, reference: MoELayer, x_TD: Tensor, ctx: RouteContext, routing: Routing
    ) -> None:
        logits_TE = layer.logits(x_TD)
        check_finite(logits_TE, index)
        router, E = reference.router, layer.weights.n_experts
        with exact_products():
            want = router.select(logits_TE.float(), ctx._replace(want_scores=True))
            weights_TK = router.weigh(logits_TE.float(), routing.expert_ids_TK)
        if want.scores_TE is None:
            raise ValueError(f"router: {type(router).__name__}.select gave no scores_TE when asked to.")
        self.near_ties += compare_routes(
            routing, want, E, index, self.tolerance, weights_TK, logits_TE, static_k=router.static_k
        )

    def _compare_experts(self, layer: MoELayer, reference: MoELayer, x_TD: Tensor, routing: Routing) -> None:
        """Each used slot as a token of its own with the weight 1: nothing hides in the sum over a token's experts."""
        E, K = layer.weights.n_experts, routing.expert_ids_TK.shape[1]
        ids_N = routing.expert_ids_TK.flatten()
        off_E, size_E = torch.zeros(2, E, device=x_TD.device, dtype=torch.float64)
        for slot_N in (ids_N >= 0).nonzero().squeeze(1).split(_ROWS_AT_ONCE):
            alone = Routing(ids_N[slot_N, None], torch.ones(len(slot_N), 1, device=x_TD.device))
            x_ND = x_TD[slot_N // K]
            y_ND = layer.compute(x_ND, alone)
            with exact_products():
                y_reference_ND = reference.compute(x_ND.float(), alone)
            off_N, size_N = _squares(y_ND, y_reference_ND)
            off_E.index_add_(0, ids_N[slot_N], off_N.double())
            size_E.index_add_(0, ids_N[slot_N], size_N.double())
        self._keep_worst("expert_error", off_E, size_E)

    def _keep_worst(self, name: str, off: Tensor, size: Tensor) -> None:
        """Note the largest sqrt(off / size) under `name`; infinity if anything is not finite."""
        if off.numel():
            error = float((off / size.clamp(min=1e-30)).max().sqrt()) if bool(off.isfinite().all()) else float("inf")
            setattr(self, name, max(getattr(self, name), error))


def _squares(y: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: squared distance to the reference, and the reference's squared length."""
    return (y.float() - reference).square().sum(-1), reference.square().sum(-1)


class _ComparedLayer(LayerCache):
    """Instead of keeping keys and values, compares them with those that are there."""

    def __init__(self, kept: LayerCache):
        super().__init__(kept.k_BHNd, kept.v_BHNd)
        self.error = 0.0
        """Of the worst token's keys or values, over all heads; infinite if anything is not finite."""

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> None:
        """See `LayerCache.begin`."""
        for kept_BHNd, wanted_BHSd in ((self.k_BHNd, k_BHSd), (self.v_BHNd, v_BHSd)):
            off = (kept_BHNd[:, :, : wanted_BHSd.shape[2]].float() - wanted_BHSd).square().sum((1, 3))
            size = wanted_BHSd.square().sum((1, 3))
            error = float((off / size.clamp(min=1e-30)).max().sqrt()) if bool(off.isfinite().all()) else math.inf
            self.error = max(self.error, error)


class _ComparedCache(KVCache):
    """Stands in for a cache in a cacheless pass of the reference, and is compared with what that computes."""

    def __init__(self, cache: KVCache):
        super().__init__(_ComparedLayer(layer) for layer in cache.layers if isinstance(layer, LayerCache))

    def error(self) -> float:
        """Of the worst layer."""
        return max((layer.error for layer in self.layers if isinstance(layer, _ComparedLayer)), default=0.0)


@dataclass
class Verification:
    """The record's check, why it failed if it did, and the operations counted on the way."""

    check: Check
    mismatch: MismatchError | None = None
    flops: int = 0


def _nothing_known(more: str = "") -> Check:
    return Check(
        passed=False,
        rel_error=None,
        max_abs_error=None,
        expert_rel_error=None,
        token_rel_error=None,
        near_ties=None,
        free_rel_error=None,
        changed_sets=None,
        reference=f"fp32, torch, one expert at a time{more}",
    )


@torch.inference_mode()
def verify(
    model: nn.Module,
    twin: nn.Module,
    x: Tensor,
    ran: Output,
    dtype: torch.dtype,
    *,
    fuses: bool = False,
    forced: bool = False,
) -> Verification:
    """Compare `ran`, the output of the run's own execution, with the fp32 reference `twin`.

    The logits that the route check selects from are those of an eager pass with the run's routing forced. An execution
    that `fuses` rounds otherwise on the way there, so its scores may differ by what the model's output may. Such an
    execution's own kernels are seen by the whole model's error alone; by expert and by token the eager ones are.

    Where the run's routing was `forced`, no router chose it: there is no route to check, and nothing to compare freely.

    Raises:
        ValueError: router logits that are not finite (the message names the layer), or a reference that is not fp32.
    """
    tolerance = tolerance_of(model, dtype, fuses=fuses)
    layers = moe_layers(model)
    n_tokens = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()  # hidden states [..., D], or ids
    result = Verification(_nothing_known())
    check = result.check
    if not _keeps_contract(result, layers, [ran], n_tokens):
        return result
    reference_x = x.float() if x.is_floating_point() else x
    off = Distance()
    with exact_products():
        reference: Output
        if isinstance(model, Prefill) and isinstance(twin, Prefill):  # before a pass writes into the cache again
            cache = _ComparedCache(model.cache)
            reference = twin.decoder(x, ran.routings, cache=cache, last=1)
            check.cache_rel_error = cache.error()
        else:
            reference = twin(reference_x, forced_routing=ran.routings)
        if reference.y.dtype != torch.float32:
            raise ValueError(
                f"model: its reference pass computes in {reference.y.dtype}; let each operation cast its weight to the "
                "dtype of its input, and an embedding follow use_reference() (see moe_lab/models/__init__.py)."
            )
        off.add(ran.y, reference.y)
        del reference
    _probe_layers(result, LayerProbe(model, twin, tolerance, routes=not forced), lambda: model(x, ran.routings))
    with exact_products():
        free, result.flops = count_flops(lambda: twin(reference_x, forced_routing=ran.routings if forced else None))
    check.rel_error, check.max_abs_error = off.relative(), off.largest
    if not forced:
        check.free_rel_error = relative_error(ran.y, free.y)
        sizes = [layer.weights.n_experts for _, layer in layers]
        check.changed_sets = changed_sets(ran.routings, free.routings, sizes) if layers else None
    return _judged(result, tolerance, dtype)


_STEPS_PROBED = 4


@torch.inference_mode()
def verify_decode(
    task: Decode,
    twin: TransformerDecoder,
    ids_BN: Tensor,
    steps: Sequence[Output],
    context: Sequence[Routing],
    dtype: torch.dtype,
    *,
    fuses: bool = False,
    forced: bool = False,
) -> Verification:
    """As `verify`, for decoding: the output of every step against one pass of `twin` over whole sequences, cacheless.

    So what the steps find in the cache is checked too. Layer by layer some of the steps are looked at, and which stands
    in the record. A router that looks at the whole batch has no free choice over whole sequences to compare with.

    Args:
        steps: what the run's own execution computed, step by step; the cache is as they left it.
        context: the routing of each MoE layer in the cached context.
    """
    tolerance = tolerance_of(task, dtype, fuses=fuses)
    layers, (B, N), n = moe_layers(task), ids_BN.shape, len(steps)
    probed = sorted({round(i * (n - 1) / max(_STEPS_PROBED - 1, 1)) for i in range(_STEPS_PROBED)})
    result = Verification(_nothing_known(f", over whole sequences; layers alone in {len(probed)} of {n} steps"))
    if not _keeps_contract(result, layers, steps, B):
        return result

    whole = [
        whole_routing(of_layer[0], of_layer[1:], B)
        for of_layer in zip(context, *(s.routings for s in steps), strict=True)
    ]
    y_BSV = torch.cat([step.y for step in steps], dim=1)
    is_free = bool(layers) and not forced and all(layer.router.batch_invariant for _, layer in layers)
    off, free_off, changed, cache_error, rows = Distance(), Distance(), 0, 0.0, max(1, _TOKENS_AT_ONCE // N)
    for a in range(0, B, rows):
        ran = [
            Routing(one.expert_ids_TK[a * N : (a + rows) * N], one.weights_TK[a * N : (a + rows) * N]) for one in whole
        ]
        some_BN, y = ids_BN[a : a + rows], y_BSV[a : a + rows]
        cache = _ComparedCache(task.cache.rows(a, a + rows))
        with exact_products():
            off.add(y, twin(some_BN, ran, last=n, cache=cache).y)
            cache_error = max(cache_error, cache.error())
            if is_free:
                free = twin(some_BN, last=n)
                free_off.add(y, free.y)
                for (_, layer), one, other in zip(layers, ran, free.routings, strict=True):
                    E = layer.weights.n_experts
                    differs_BN = (members(one.expert_ids_TK, E) != members(other.expert_ids_TK, E)).any(-1).view(-1, N)
                    changed += int(differs_BN[:, N - n :].sum())
    check = result.check
    check.rel_error, check.max_abs_error, check.cache_rel_error = off.relative(), off.largest, cache_error
    if is_free:
        check.free_rel_error, check.changed_sets = free_off.relative(), changed

    def some_steps() -> None:  # they write into the cache again, so it was compared before
        for index in probed:
            task.seek(index)
            task(ids_BN, steps[index].routings)

    _probe_layers(result, LayerProbe(task, twin, tolerance, routes=not forced), some_steps)
    task.seek(n - 1)
    _, result.flops = count_flops(lambda: task.on(twin)(ids_BN, steps[-1].routings if forced else None))
    return _judged(result, tolerance, dtype)


def _keeps_contract(
    result: Verification, layers: Sequence[tuple[int, MoELayer]], outputs: Sequence[Output], n_tokens: int
) -> bool:
    """Whether every routing keeps the router's contract; else there is nothing to compute, and `result` says why."""
    try:
        for output in outputs:
            for (index, layer), routing in zip(layers, output.routings, strict=True):
                check_contract(routing, n_tokens, layer.weights.n_experts, index)
    except MismatchError as error:
        result.mismatch = error
        return False
    return True


def _probe_layers(result: Verification, probe: LayerProbe, run: Callable[[], Any]) -> None:
    """`run` the model with the run's routing forced, under the eyes of `probe`; what it saw goes into `result`."""
    check = result.check
    try:
        run()
        if probe.n_layers:
            check.expert_rel_error, check.token_rel_error = probe.expert_error, probe.token_error
            check.near_ties = probe.near_ties if probe.routes else None
    except MismatchError as error:
        result.mismatch = error
    finally:
        probe.close()


def _judged(result: Verification, tolerance: Tolerance, dtype: torch.dtype) -> Verification:
    """`result` with its verdict."""
    if result.mismatch is None:
        result.mismatch = _beyond(result.check, tolerance, dtype)
    result.check.passed = result.mismatch is None
    return result


def _beyond(check: Check, tolerance: Tolerance, dtype: torch.dtype) -> MismatchError | None:
    """The mismatch of the layers check, if an error is larger than its tolerance (or NaN)."""
    limits = (
        ("model", check.rel_error, tolerance.model),
        ("expert", check.expert_rel_error, tolerance.expert),
        ("token", check.token_rel_error, tolerance.token),
        ("cache", check.cache_rel_error, tolerance.cache),
    )
    over = [
        f"{name} {error:.2e} > {most:.1e}" for name, error, most in limits if error is not None and not error <= most
    ]
    return MismatchError("layers", f"relative error beyond what {dtype} explains: {', '.join(over)}") if over else None
