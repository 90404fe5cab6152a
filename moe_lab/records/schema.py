"""The fields of `result.json`, schema 1. Units are in the names; what is unknown is null, never 0.

`reason` is null, or `mismatch: route|layers`, `out_of_memory`, `timeout: STEP`, `crash: SIGNAL`, `unavailable: ...`,
`impossible: ...` (a combination that makes no run), `excluded`, `interrupted`, `error: ...`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1


@dataclass(kw_only=True)
class Latency:
    """Milliseconds of one iteration; the interval is the 95 % interval of the median."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    ci95_low: float | None
    ci95_high: float | None
    stable: bool
    cache: Literal["natural", "cold", "hot"] = "natural"
    replicate_p50: list[float] = field(default_factory=list)
    """The median of each fresh process (`measure.replicates`), in order."""
    replicate_probe_ms: list[float] = field(default_factory=list)
    """In a sweep: the median of a fixed piece of work in the same rounds, which says how fast the machine was."""


@dataclass(kw_only=True)
class Ratio:
    """Latency over that of the anchor, the variant that others are compared with, timed in the same rounds.

    The median over the rounds of (block median of this cell / block median of the anchor), and its 95 % interval.
    """

    anchor: str
    """The anchor's cell_id."""
    p50: float
    ci95_low: float | None
    ci95_high: float | None
    rounds: int


@dataclass(kw_only=True)
class Check:
    """How the run compares with the fp32 reference; see docs/architecture.md, "Verified before timed"."""

    passed: bool
    rel_error: float | None
    max_abs_error: float | None
    expert_rel_error: float | None
    token_rel_error: float | None
    near_ties: int | None
    free_rel_error: float | None
    changed_sets: int | None
    reference: str
    cache_rel_error: float | None = None


@dataclass(kw_only=True)
class Record:
    """One run: what was asked, what ran, what came out."""

    schema: int = SCHEMA
    status: Literal["ok", "failed", "skipped"]
    reason: str | None = None
    cell_id: str
    code_id: str
    env_id: str | None = None
    name: str | None = None
    overrides: list[str] = field(default_factory=list)
    interleaved_with: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    implementation: dict[str, str] = field(default_factory=dict)
    latency_ms: Latency | None = None
    latency_hot_ms: float | None = None
    """Median of a call among 20 in one CUDA graph."""
    latency_cold_ms: float | None = None
    """Median of a CUDA graph's replay with nothing in the L2 cache."""
    gpu_busy_ms: float | None = None
    """Of an eager run: what a GPU computes in one iteration, without waiting for the host's launches."""
    ratio_to_anchor: Ratio | None = None
    throughput: dict[str, float] | None = None
    phases_ms: dict[str, Any] | None = None
    memory: dict[str, float | None] | None = None
    check: Check | None = None
    router: dict[str, bool] | None = None
    """Which of the properties of `routers.base.PROPERTIES` it declares."""
    routing: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None
    """With the routes and outputs of `measure.reference_router`; see moe_lab/agreement.py."""
    quality: dict[str, Any] | None = None
    roofline: dict[str, Any] | None = None
    export: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    started: str | None = None
    elapsed_s: float | None = None
    directory: str | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "directory"}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Record:
        """The inverse of `to_dict`. Raises `ValueError` for another schema or unknown or missing fields."""
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema={content.get('schema')!r}: this version of moe-lab reads schema {SCHEMA}.")
        fields = dict(content)
        try:
            for name, kind in (("latency_ms", Latency), ("ratio_to_anchor", Ratio), ("check", Check)):
                if fields.get(name) is not None:
                    fields[name] = kind(**fields[name])
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a record of schema {SCHEMA}: {error}") from error
