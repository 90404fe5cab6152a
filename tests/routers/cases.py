"""Every router of the package, ready to select, for the tests that hold all of them to the seam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.ops.hash_uniform import fill_uniform, stream_of
from moe_lab.routers.balancing_bias import LossFreeBias, QuantileBias
from moe_lab.routers.base import RouteContext, Router
from moe_lab.routers.base_layers import BASELayers
from moe_lab.routers.batch_aware import OpportunisticActivation, SharedBudget
from moe_lab.routers.capacity import POLICIES, Capacity
from moe_lab.routers.dynamic_k import DynamicK
from moe_lab.routers.expert_choice import ExpertChoice
from moe_lab.routers.scored_topk import ScoredTopK
from moe_lab.routers.sinkhorn import Sinkhorn
from moe_lab.routers.soft import SoftMoE
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.routers.token_hash import TokenHash, UniformRandom

NewRouter = Callable[[int, int], Router]


def ready(make: Callable[..., Router], E: int, K: int, **keys: Any) -> Router:
    """A router with its parameters filled and its calibration done; skips where it cannot run."""
    try:
        router = make(E, K, **keys)
    except UnavailableError as error:
        pytest.skip(str(error))
    for name, parameter in router.named_parameters():
        fill_uniform(parameter.data, stream_of("test", name), 0.5)
    if router.calibrates:
        generator = torch.Generator().manual_seed(5)
        router.fit(torch.randn(256, E, generator=generator) - torch.arange(E) / E)
    return router


def with_capacity(E: int, K: int, policy: str, factor: float = 0.7) -> Router:
    """Softmax top-k with too little room."""
    return Capacity(E, K, SoftmaxTopK(E, K), factor=factor, policy=policy)


def context(T: int) -> RouteContext:
    """With token ids, of which some repeat."""
    return RouteContext(token_ids_T=torch.arange(T) * 7 % 101)


CASES: dict[str, NewRouter] = {
    "softmax": SoftmaxTopK,
    "softmax-plain": partial(SoftmaxTopK, renormalize=False),
    "gate-bias": partial(ready, partial(SoftmaxTopK, gate_bias=True)),
    "sinkhorn": Sinkhorn,
    "sigmoid-bias": partial(ready, partial(ScoredTopK, bias=True, scale=2.5)),
    "softmax-bias": partial(ready, partial(ScoredTopK, score="softmax", bias=True, renormalize=False)),
    "sqrt-softplus": partial(ready, partial(ScoredTopK, score="sqrt_softplus")),
    "input-scale": partial(ready, partial(ScoredTopK, renormalize=False, scales_input=True)),
    "expert-choice": ExpertChoice,
    "base": partial(ready, BASELayers),
    "hash": TokenHash,
    "random": UniformRandom,
    "soft": SoftMoE,
    "loss-free": partial(ready, partial(LossFreeBias, rate=0.05)),
    "quantile": partial(ready, QuantileBias),
    "top-p": partial(DynamicK, rule="top_p", threshold=0.4),
    "min-p": partial(DynamicK, rule="min_p", threshold=0.5),
    "expert-skip": partial(ready, partial(DynamicK, rule="min_p")),
    "oea": OpportunisticActivation,
    "xshare": partial(SharedBudget, budget=0.3),
    **{f"capacity-{policy}": partial(with_capacity, policy=policy) for policy in POLICIES},
}
EVERY = pytest.mark.parametrize("new_router", [pytest.param(make, id=name) for name, make in CASES.items()])
EVERY_WHOSE_TOKENS_STAY_APART = pytest.mark.parametrize(
    "new_router", [pytest.param(make, id=name) for name, make in CASES.items() if name != "soft"]
)
"""Those whose `causal` and `batch_invariant` are decided by `select`. Soft MoE mixes its tokens in the layer:
tests/models/test_soft_moe.py holds that to what the router declares."""
