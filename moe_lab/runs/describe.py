"""What an option declares and which kernels compute it here, without building a model: for `moe-lab list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from moe_lab.config import targets
from moe_lab.errors import UnavailableError
from moe_lab.experts.weights import ExpertWeights
from moe_lab.ops.library import DTYPES, asked_of
from moe_lab.routers.base import PROPERTIES
from moe_lab.runs import build, passes


class Description(NamedTuple):
    """The option of one group.

    properties: those that it declares.
    implementations: what can compute it; of experts, the kernels that do.
    chosen: of a router, which of them computes it here.
    skip: why it cannot run here, None if it can.
    undeclared: properties of a router that it neither declares nor denies.
    """

    properties: list[str]
    implementations: list[str]
    chosen: str | None = None
    skip: str | None = None
    undeclared: Sequence[str] = ()


def describe(group: str, cfg: DictConfig) -> Description:
    """The option of `group`, `router` or `experts`, for the sizes and the device of `cfg`."""
    try:
        device = build.resolve_device(cfg)
        with torch.device("meta"):
            return _router(cfg, device) if group == "router" else _experts(cfg, device)
    except (UnavailableError, ValueError) as error:
        return Description([], [], skip=f"{error}{targets.place_of(error)}")


def _router(cfg: DictConfig, device: torch.device) -> Description:
    router = build.undecided_router(cfg)
    build.decide(cfg, router, device, load=False)
    fixes = cfg.router.get("name") == cfg.router.get("impl")  # router=torch
    implementations = [router.impl] if fixes else list(router.implementations)
    properties = [name for name in PROPERTIES if getattr(router, name)]
    undeclared = [name for name in PROPERTIES if getattr(router, name) is None]
    return Description(properties, implementations, router.implementation(), undeclared=undeclared)


def _experts(cfg: DictConfig, device: torch.device) -> Description:
    experts, sizes = build.build_experts(cfg), cfg.model.get("shape") or cfg.model
    weights = ExpertWeights(sizes.n_experts, sizes.d_model, sizes.mlp_hidden_dim)
    experts = experts.for_layer(weights, sizes.top_k)
    experts.compute_on(device, load=False)
    x_T0 = torch.empty(passes.n_tokens(cfg), 0, dtype=DTYPES[cfg.dtype.name], device=device)
    with asked_of(cfg.execution.name):
        declared = {"graph_safe": experts.graph_safe, "reads_dispatch": experts.reads_dispatch(x_T0)}
        kernels = experts.implementation(x_T0, weights).items()
    implementations = [name if op == "experts" else f"{op}={name}" for op, name in kernels]
    return Description([name for name, is_true in declared.items() if is_true], implementations)
