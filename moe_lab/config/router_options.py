"""Schemas of the routers' options (see `schemas`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class RouterOption:
    """What every router of the package has."""

    _target_: str
    name: str
    impl: str
    top_k: int | None
    """Instead of the model's."""


@dataclass
class SoftmaxTopK(RouterOption):
    """Softmax over the experts, then the k largest."""

    renormalize: bool
    gate_bias: bool


@dataclass
class ScoredTopK(RouterOption):
    """Top-k of a score with a selection bias, within limited groups."""

    score: str
    bias: bool
    n_groups: int
    top_groups: int
    group_score: str
    renormalize: bool
    scale: float
    scales_input: bool
    hash_layers: int


@dataclass
class Sinkhorn(RouterOption):
    """Top-k of a balanced transport plan between tokens and experts."""

    iters: int
    temperature: float
    tolerance: float
    renormalize: bool | None


@dataclass
class SparseMixer(RouterOption):
    """Top-k one after the other, each weighted among its near rivals."""

    jitter_eps: float


@dataclass
class ExpertChoice(RouterOption):
    """Every expert takes its best tokens."""

    factor: float


@dataclass
class TokenRounding(RouterOption):
    """Whole tiles of tokens for every expert."""

    tile: int
    renormalize: bool | None


@dataclass
class UniformRandom(RouterOption):
    """Drawn at random."""

    seed: int


@dataclass
class BalancingBias(RouterOption):
    """A bias fitted in a calibration pass."""

    steps: int
    calibration_tokens: int


@dataclass
class LossFreeBias(BalancingBias):
    """... in steps of a fixed size."""

    rate: float


@dataclass
class QuantileBias(BalancingBias):
    """... from quantiles of the logits."""

    renormalize: bool | None


@dataclass
class DynamicK(RouterOption):
    """Fewer experts for tokens that need fewer."""

    rule: str
    threshold: float | None
    k_max: int | None
    renormalize: bool | None
    calibration_tokens: int


@dataclass
class OpportunisticActivation(RouterOption):
    """Few experts of its own for every token, and those of the others."""

    k0: int
    renormalize: bool | None


@dataclass
class SharedBudget(RouterOption):
    """A set of experts that the batch shares."""

    budget: float
    keeps_best: bool
    window: int | None
    renormalize: bool | None


@dataclass
class Capacity(RouterOption):
    """Another router with limited room at each expert."""

    inner: Any
    factor: float
    policy: str


@dataclass
class Lookahead(RouterOption):
    """Another router, asked one layer ahead."""

    inner: Any


ROUTERS: dict[str, type] = {
    "router": RouterOption,
    "softmax_topk": SoftmaxTopK,
    "scored_topk": ScoredTopK,
    "sinkhorn": Sinkhorn,
    "sparse_mixer": SparseMixer,
    "expert_choice": ExpertChoice,
    "token_rounding": TokenRounding,
    "random": UniformRandom,
    "balancing_bias": BalancingBias,
    "loss_free": LossFreeBias,
    "quantile": QuantileBias,
    "dynamic_k": DynamicK,
    "oea": OpportunisticActivation,
    "xshare": SharedBudget,
    "capacity": Capacity,
    "lookahead": Lookahead,
}
