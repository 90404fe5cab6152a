"""Decoding verified: every step against one pass of the fp32 reference over whole sequences, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.measure.distance import Distance
from moe_lab.measure.layer_probe import LayerProbe
from moe_lab.measure.roofline import count_flops
from moe_lab.measure.router_properties import declared_properties
from moe_lab.measure.tolerances import exact_products, tolerance_of
from moe_lab.models import Output
from moe_lab.models.moe_layer import indexed_moe_layers
from moe_lab.models.serving import Decode, whole_routing
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.records.schema import Check
from moe_lab.routers.base import Routing
from moe_lab.routers.contract import members
from moe_lab.runs.compared_cache import ComparedCache
from moe_lab.runs.memory_estimate import TOKENS_AT_ONCE
from moe_lab.runs.verify import Verification, judged, keep_properties, keeps_contract, nothing_known, probe_layers

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
    in the record. A router that looks at later tokens or other sequences, or does not say, has no free
    choice over whole sequences to compare with.

    Args:
        steps: what the run's own execution computed, step by step; the cache is as they left it.
        context: the routing of each MoE layer in the cached context.
    """
    tolerance = tolerance_of(task, dtype, fuses=fuses)
    layers, B, n = indexed_moe_layers(task), ids_BN.shape[0], len(steps)
    probed = sorted({round(i * (n - 1) / max(_STEPS_PROBED - 1, 1)) for i in range(_STEPS_PROBED)})
    result = Verification(nothing_known(f", over whole sequences; layers alone in {len(probed)} of {n} steps"))
    if not keeps_contract(result, layers, steps, B * task.window):
        return result

    whole = [
        whole_routing(of_layer[0], of_layer[1:], B)
        for of_layer in zip(context, *(s.routings for s in steps), strict=True)
    ]
    routers = [layer.router for _, layer in layers]
    is_free = bool(layers) and not forced and all(router.causal and router.batch_invariant for router in routers)
    with declared_properties(task, twin, forced=forced) as properties:
        _compare_whole(result.check, task, twin, ids_BN, steps, whole, is_free=is_free)

    probe = LayerProbe(task, twin, tolerance, routes=not forced)

    def some_steps() -> None:  # they write into the cache again, so it was compared before
        for index in range(n) if task.cache.in_order else probed:
            probe.looks = index in probed
            task.seek(index)
            task(ids_BN, steps[index].routings)

    probe_layers(result, probe, some_steps)
    task.seek(n - 1)
    _, result.flops = count_flops(lambda: task.on(twin)(ids_BN, steps[-1].routings if forced else None))
    keep_properties(result, properties)
    return judged(result, tolerance, dtype)


def _compare_whole(
    check: Check,
    task: Decode,
    twin: TransformerDecoder,
    ids_BN: Tensor,
    steps: Sequence[Output],
    whole: Sequence[Routing],
    *,
    is_free: bool,
) -> None:
    """Enter into `check` how far the steps and the cache are from passes of `twin` over whole sequences.

    Args:
        whole: the routing of each MoE layer over whole sequences, which the passes are given.
        is_free: compare with passes that choose their experts themselves, too.
    """
    y_BSV = torch.cat([step.y for step in steps], dim=1)
    (B, N), n = ids_BN.shape, y_BSV.shape[1]
    off, free_off, changed, cache_error = Distance(), Distance(), 0, 0.0
    rows = max(1, TOKENS_AT_ONCE // N)
    for a in range(0, B, rows):
        tokens = slice(a * N, (a + rows) * N)
        ran = [Routing(layer.expert_ids_TK[tokens], layer.weights_TK[tokens]) for layer in whole]
        some_BN, y = ids_BN[a : a + rows], y_BSV[a : a + rows]
        cache = ComparedCache(task.cache.rows(a, a + rows))
        with exact_products():
            off.add(y, twin(some_BN, ran, last=n, cache=cache).y)
            cache_error = max(cache_error, cache.error())
            if is_free:
                free = twin(some_BN, last=n)
                free_off.add(y, free.y)
                changed += _changed_sets(task, ran, free.routings, N, n)
    check.rel_error, check.max_abs_error, check.cache_rel_error = off.relative(), off.largest, cache_error
    if is_free:
        check.free_rel_error, check.changed_sets = free_off.relative(), changed


def _changed_sets(task: Decode, ran: Sequence[Routing], free: Sequence[Routing], N: int, n: int) -> int:
    """How many sets of experts differ in the last `n` of `N` positions, over all layers."""
    changed = 0
    for (_, layer), routing, other in zip(indexed_moe_layers(task), ran, free, strict=True):
        E = layer.weights.n_experts
        differs_BN = (members(routing.expert_ids_TK, E) != members(other.expert_ids_TK, E)).any(-1).view(-1, N)
        changed += int(differs_BN[:, N - n :].sum())
    return changed
