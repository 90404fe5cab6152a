"""Every router of the package, ready to select, for the tests that hold all of them to the seam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from moe_lab.config.targets import locate
from moe_lab.errors import UnavailableError
from moe_lab.ops.hash_uniform import fill_uniform, stream_of
from moe_lab.routers.base import RouteContext, Router
from moe_lab.routers.capacity import POLICIES
from tests import tiny

NewRouter = Callable[[int, int], Router]


def make(option: str, n_experts: int, top_k: int, **keys: Any) -> Router:
    """router=option, with the keys of its YAML but for those that are given; `inner` is a router."""
    kind = locate(tiny.option("router", option)["_target_"])
    router: Router = kind(n_experts, top_k, **{**tiny.keys_of("router", option), **keys})
    return router


SCORED = partial(make, "minimax_m2", bias=False)
"""Top-k of the sigmoid: what is common to the options of routers/scored_topk.py."""


def ready(new_router: Callable[..., Router], E: int, K: int, **keys: Any) -> Router:
    """A router with its parameters filled and its calibration done; skips where it cannot run."""
    try:
        router = new_router(E, K, **keys)
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
    return make("capacity", E, K, inner=make("mixtral", E, K), factor=factor, policy=policy)


def looking_ahead(E: int, K: int, inner: str = "mixtral") -> Router:
    """With another router inside."""
    return make("lookahead", E, K, inner=make(inner, E, K))


def context(T: int) -> RouteContext:
    """With token ids, of which some repeat."""
    return RouteContext(token_ids_T=torch.arange(T) * 7 % 101)


CASES: dict[str, NewRouter] = {
    "softmax": partial(make, "mixtral"),
    "softmax-plain": partial(make, "olmoe"),
    "gate-bias": partial(ready, partial(make, "gpt_oss")),
    "sinkhorn": partial(make, "sinkhorn"),
    "sinkhorn-plain": partial(make, "sinkhorn", renormalize=False),
    "sparse-mixer": partial(make, "sparse_mixer", jitter_eps=0.2),
    "sigmoid-bias": partial(ready, partial(SCORED, bias=True, scale=2.5)),
    "softmax-bias": partial(ready, partial(SCORED, score="softmax", bias=True, renormalize=False)),
    "sqrt-softplus": partial(ready, partial(SCORED, score="sqrt_softplus")),
    "sqrt-softplus-table": partial(ready, partial(make, "deepseek_v4", hash_layers=1)),
    "input-scale": partial(ready, partial(SCORED, renormalize=False, scales_input=True)),
    "expert-choice": partial(make, "expert_choice"),
    "token-rounding": partial(make, "token_rounding", tile=4),
    "token-rounding-plain": partial(make, "token_rounding", tile=3, renormalize=False),
    "base": partial(ready, partial(make, "base")),
    "hash": partial(make, "hash"),
    "random": partial(make, "random"),
    "soft": partial(make, "soft"),
    "loss-free": partial(ready, partial(make, "loss_free", rate=0.05)),
    "quantile": partial(ready, partial(make, "quantile")),
    "quantile-plain": partial(ready, partial(make, "quantile", renormalize=False)),
    "top-p": partial(make, "top_p"),
    "top-p-plain": partial(make, "top_p", renormalize=False),
    "min-p": partial(make, "min_p"),
    "expert-skip": partial(ready, partial(make, "expert_skip")),
    "oea": partial(make, "oea"),
    "oea-plain": partial(make, "oea", renormalize=False),
    "xshare": partial(make, "xshare", budget=0.3),
    "moe-spec": partial(make, "moe_spec", budget=0.3, window=8),
    "lookahead": looking_ahead,
    **{f"capacity-{policy}": partial(with_capacity, policy=policy) for policy in POLICIES},
}
EVERY = pytest.mark.parametrize("new_router", [pytest.param(make, id=name) for name, make in CASES.items()])
EVERY_WHOSE_TOKENS_STAY_APART = pytest.mark.parametrize(
    "new_router", [pytest.param(make, id=name) for name, make in CASES.items() if name != "soft"]
)
"""Those whose `causal` and `batch_invariant` are decided by `select`. Soft MoE mixes its tokens in the layer:
tests/models/test_soft_moe.py holds that to what the router declares."""
