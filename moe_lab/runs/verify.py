"""Verified before timed: is what ran what was asked for?

route   each layer's expert ids and weights against the fp32 selection of the same logits. The sets must be equal but
        for near-ties: tokens whose boundary margin lies below the dtype's rounding. Those are counted.
layers  the fp32 reference of the whole model with the run's routing forced, layer by layer; and each MoE layer alone
        on the run's own input, by token and by expert, where one wrong expert of many cannot hide in an average. Of
        prefill and decoding also what the cache holds at each position: of a long context one wrong key or value
        changes the output by less than bf16 rounds.
properties  what the router declares (causal, batch_invariant, static_k), on the run's own logits in float32
        (measure/router_properties.py).
free    the reference with its own routing: recorded, decides nothing (a near-tie may flip an expert, and a flipped
        expert is no error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import MismatchError
from moe_lab.measure.distance import Distance, relative_error
from moe_lab.measure.layer_probe import LayerProbe
from moe_lab.measure.roofline import count_flops
from moe_lab.measure.router_properties import Findings, declared_properties
from moe_lab.measure.tolerances import Tolerance, exact_products, tolerance_of
from moe_lab.models import Output
from moe_lab.models.moe_layer import MoELayer, indexed_moe_layers
from moe_lab.models.serving import Prefill
from moe_lab.records.schema import Check
from moe_lab.routers.base import Routing
from moe_lab.routers.contract import changed_sets, check_contract
from moe_lab.runs.compared_cache import ComparedCache


@dataclass
class Verification:
    """The record's check, why it failed if it did, and what was counted on the way: outputs of experts, operations."""

    check: Check
    mismatch: MismatchError | None = None
    n_outputs: float = 0.0
    flops: int = 0


def nothing_known(more: str = "") -> Check:
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
    layers = indexed_moe_layers(model)
    n_tokens = x.numel() // x.shape[-1] if x.is_floating_point() else x.numel()  # hidden states [..., D], or ids
    result = Verification(nothing_known())
    check = result.check
    if not keeps_contract(result, layers, [ran], n_tokens):
        return result
    reference_x = x.float() if x.is_floating_point() else x
    off = Distance()
    with exact_products(), declared_properties(model, twin, forced=forced) as properties:
        reference: Output
        if isinstance(model, Prefill) and isinstance(twin, Prefill):  # before a pass writes into the cache again
            cache = ComparedCache(model.cache)
            reference = twin.decoder(x, ran.routings, cache=cache, last=1)
            check.cache_rel_error = cache.error()
        else:
            reference = twin(reference_x, forced_routing=ran.routings)
        if reference.y.dtype != torch.float32:
            raise ValueError(
                f"model: the reference pass computes in {reference.y.dtype}, not fp32; cast each weight to the dtype "
                "of its input, and make an embedding follow use_reference() (see moe_lab/models/__init__.py)."
            )
        off.add(ran.y, reference.y)
        del reference
    probe_layers(result, LayerProbe(model, twin, tolerance, routes=not forced), lambda: model(x, ran.routings))
    with exact_products():
        free, result.flops = count_flops(lambda: twin(reference_x, forced_routing=ran.routings if forced else None))
    check.rel_error, check.max_abs_error = off.relative(), off.largest
    if not forced:
        check.free_rel_error = relative_error(ran.y, free.y)
        sizes = [layer.weights.n_experts for _, layer in layers]
        check.changed_sets = changed_sets(ran.routings, free.routings, sizes) if layers else None
    keep_properties(result, properties)
    return judged(result, tolerance, dtype)


def keep_properties(result: Verification, properties: Findings) -> None:
    """What was found of the router's properties goes into `result`; another mismatch, found before, stays the cause."""
    for name, found in properties.found.items():
        setattr(result.check, name, found)
    result.mismatch = result.mismatch or properties.mismatch


def keeps_contract(
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


@contextmanager
def routers_watched(model: nn.Module) -> Iterator[None]:
    """If an eager pass fails inside of what a router chose, raise the `MismatchError` that names the clause."""
    broken: list[MismatchError] = []

    def hook(index: int, n_experts: int) -> Callable[..., None]:
        def look(router: nn.Module, given: tuple[Any, ...], routing: Routing) -> None:
            try:
                check_contract(routing, len(given[0]), n_experts, index)
            except MismatchError as error:
                broken.append(error)

        return look

    layers = indexed_moe_layers(model)
    handles = [layer.router.register_forward_hook(hook(index, layer.weights.n_experts)) for index, layer in layers]
    try:
        yield
    except Exception as error:
        if broken:
            raise broken[0] from error
        raise
    finally:
        for handle in handles:
            handle.remove()


def probe_layers(result: Verification, probe: LayerProbe, run: Callable[[], Any]) -> None:
    """`run` the model with the run's routing forced, under the eyes of `probe`; what it saw goes into `result`."""
    check = result.check
    try:
        run()
        if probe.n_layers:
            check.expert_rel_error, check.token_rel_error = probe.expert_error, probe.token_error
            check.expert_scale_error, result.n_outputs = probe.scale_error, probe.n_outputs
            check.near_ties = probe.near_ties if probe.routes else None
    except MismatchError as error:
        result.mismatch = error
    finally:
        probe.close()


def judged(result: Verification, tolerance: Tolerance, dtype: torch.dtype) -> Verification:
    """`result` with its verdict."""
    if result.mismatch is None:
        result.mismatch = _beyond(result, tolerance, dtype)
    result.check.passed = result.mismatch is None
    return result


def _beyond(result: Verification, tolerance: Tolerance, dtype: torch.dtype) -> MismatchError | None:
    """The mismatch of the layers check, if an error is larger than its tolerance (or NaN)."""
    check = result.check
    limits = (
        ("model", check.rel_error, tolerance.model),
        ("expert", check.expert_rel_error, tolerance.expert),
        ("scale of the experts", check.expert_scale_error, tolerance.scale(result.n_outputs)),
        ("token", check.token_rel_error, tolerance.token),
        ("cache", check.cache_rel_error, tolerance.cache),
    )
    over = [
        f"{name} {error:.2e} > {most:.1e}" for name, error, most in limits if error is not None and not error <= most
    ]
    message = f"relative error above the tolerance of {dtype}: {', '.join(over)}"
    return MismatchError("layers", message) if over else None
