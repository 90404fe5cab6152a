"""Typed schemas of `moe-lab analyze`, as those of a run in schemas.py: conf/analyze.yaml and conf/analysis/*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Analyze:
    """The top level of `moe-lab analyze`; see conf/analyze.yaml."""

    out: str | None
    phase: str | None
    processes: int | None
    expert_cache: Any
    unique_experts: Any
    speculation: Any
    placement: Any
    ranks: Any
    specialisation: Any
    stability: Any
    load_fit: Any
    counterfactual: Any


@dataclass
class ExpertCache:
    """analysis/expert_cache."""

    scope: list[str]
    policy: list[str]
    prefetch: list[str]
    capacity: list[int] | None
    expert_mb: float | None
    gb_per_s: float | None
    rates: str | None
    link: str
    compute_ms: float | None
    decode_run: str | None


@dataclass
class UniqueExperts:
    """analysis/unique_experts."""

    tokens: list[int]
    batch: list[int]


@dataclass
class Speculation:
    """analysis/speculation."""

    results: str | None
    acceptance: list[float]
    draft_ms: float | None


@dataclass
class Placement:
    """analysis/placement."""

    plan: list[str]
    ranks: list[int]
    copies: list[int] | None
    step_tokens: int
    window: list[int]
    age: list[int]
    horizon: int


@dataclass
class Ranks:
    """analysis/ranks."""

    ranks: list[int]
    step_tokens: int
    token_bytes: int
    ranks_per_node: int
    node_limit: int
    alpha_us: float
    node_gb_per_s: float
    network_gb_per_s: float


@dataclass
class Specialisation:
    """analysis/specialisation."""

    guess: list[str]


@dataclass
class Stability:
    """analysis/stability."""

    against: str | None


@dataclass
class LoadFit:
    """analysis/load_fit."""

    step_tokens: int


@dataclass
class Counterfactual:
    """analysis/counterfactual."""

    routes: list[int]


ANALYSES: dict[str, type] = {
    "expert_cache": ExpertCache,
    "unique_experts": UniqueExperts,
    "speculation": Speculation,
    "placement": Placement,
    "ranks": Ranks,
    "specialisation": Specialisation,
    "stability": Stability,
    "load_fit": LoadFit,
    "counterfactual": Counterfactual,
}
"""By their keys, in the order of the page."""
