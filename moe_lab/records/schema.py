"""The fields of `result.json`, schema 1. Units are in the names; what is unknown is null, never 0.

A field's annotation says its type, unit and meaning. Where it is a dict, it names the fields of that in `fields`.

`reason` is null, or `mismatch: route|layers|causal|batch_invariant|static_k`, `out_of_memory`, `timeout: STEP`,
`crash: SIGNAL`, `unavailable: ...`, `impossible: ...` (a combination that cannot run), `excluded`, `interrupted`,
`unfinished: ...` (a single run that was killed, or that goes on), `error: ...`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from moe_lab.records import fields
from moe_lab.records.fields import Field, Fields

SCHEMA = 1
UNFINISHED = "unfinished: the run goes on, or it was killed (out of memory?)"
"""The reason of a single run's record from its begin to its end."""
NOT_ENDED = ("interrupted", "unfinished", "crash: SIGKILL", "crash: SIGTERM")
"""How the reason of a run begins that somebody else ended; a sweep runs such a cell again."""
LAUNCH_BOUND = "launch-bound: "
"""How the warning of a run begins whose GPU waited for the host's launches."""

BUSY = "busy machine: "
"""How the warning of a run begins that did not have the machine for itself."""
NOT_SENT = "not sent to "
"""How the warning begins that a tracker has not got the record; it goes once it has."""


VERIFIED, DOES_NOT_HOLD = "verified", "does not hold"
"""What a run says of a property that a router declares; else `not verified: ` and why."""


@dataclass(kw_only=True)
class Latency:
    """Milliseconds of one iteration."""

    n: Annotated[int, "samples", "timed iterations"]
    mean: Annotated[float, "ms", "mean time of one iteration"]
    p50: Annotated[float, "ms", "median; with `measure.replicates` the geometric mean of the replicates' medians"]
    p90: Annotated[float, "ms", "90th percentile"]
    p99: Annotated[float, "ms", "99th percentile"]
    ci95_low: Annotated[float | None, "ms", "lower end of the median's 95 % interval"]
    ci95_high: Annotated[float | None, "ms", "upper end"]
    stable: Annotated[bool, "", "whether that interval is narrower than `measure.target_ci`"]
    cache: Annotated[
        Literal["natural", "cold", "hot"],
        "",
        "`natural`, `cold` or `hot`: the state of the caches before an iteration",
    ] = "natural"
    replicate_p50: Annotated[list[float], "ms", "median of each fresh process, with `measure.replicates`"] = field(
        default_factory=list
    )
    replicate_probe_ms: Annotated[
        list[float], "ms", "median time of a fixed workload in the same rounds, for each fresh process"
    ] = field(default_factory=list)
    throttled_blocks: Annotated[
        int | None, "blocks", "blocks in these samples during which something was seen to slow the machine down"
    ] = None
    repeated_blocks: Annotated[
        int | None, "blocks", "throttled blocks that were discarded and timed again, with `measure.throttled=repeat`"
    ] = None


@dataclass(kw_only=True)
class Ratio:
    """Latency over that of the anchor, the variant that others are compared with, timed in the same rounds.

    The median over the rounds of (block median of this cell / block median of the anchor), and its 95 % interval; with
    replicates the geometric mean of theirs.
    """

    anchor: Annotated[str, "", "cell_id of the anchor that was timed in the same rounds"]
    p50: Annotated[float, "1", "latency over the anchor's: median over the rounds in which both were timed"]
    ci95_low: Annotated[float | None, "1", "lower end of its 95 % interval; missing with too few rounds"]
    ci95_high: Annotated[float | None, "1", "upper end"]
    rounds: Annotated[int, "rounds", "rounds in which both were timed"]


_PROPERTY = (
    "of this property, if the router declares it: `verified` on the run's logits, `does not hold`, or "
    "`not verified:` and what was not there to look at"
)


@dataclass(kw_only=True)
class Check:
    """How the run compares with the fp32 reference; see docs/architecture.md, "Verified before timed"."""

    passed: Annotated[bool, "", "whether the run agrees with the fp32 reference"]
    rel_error: Annotated[float | None, "1", "relative error of the output; the reference uses the run's routing"]
    max_abs_error: Annotated[float | None, "1", "largest absolute error of the output"]
    expert_rel_error: Annotated[float | None, "1", "relative error of the worst expert"]
    token_rel_error: Annotated[float | None, "1", "relative error of the worst token of an MoE layer"]
    expert_scale_error: Annotated[
        float | None, "1", "by what share the outputs of all experts, taken together, are too large or too small"
    ] = None
    cache_rel_error: Annotated[
        float | None, "1", "prefill and decoding only: relative error of the worst token's keys or values in a KV cache"
    ] = None
    near_ties: Annotated[
        int | None,
        "sets",
        "expert sets that differ only within the rounding of the scores, over all layers",
    ]
    free_rel_error: Annotated[
        float | None, "1", "relative error if the reference uses its own routing; does not affect `passed`"
    ]
    changed_sets: Annotated[
        int | None,
        "sets",
        "expert sets that differ from the reference's own routing, over all layers; does not affect `passed`",
    ]
    reference: Annotated[str, "", "description of the reference"]
    causal: Annotated[str | None, "", _PROPERTY] = None
    batch_invariant: Annotated[str | None, "", _PROPERTY] = None
    static_k: Annotated[str | None, "", _PROPERTY] = None


@dataclass(kw_only=True)
class Record:
    """One run: what was asked, what ran, what came out."""

    schema: Annotated[int, "", "schema version of `result.json`"] = SCHEMA
    status: Annotated[Literal["ok", "failed", "skipped"], "", "`ok`, `failed` or `skipped`"]
    reason: Annotated[
        str | None, "", "why the run is not ok: `out_of_memory`, `mismatch: layers`, `unavailable: ...`, ..."
    ] = None
    cell_id: Annotated[str, "", "12 hex digits: hash of the configuration that affects the result"]
    code_id: Annotated[str, "", "12 hex digits: hash of the source code"]
    env_id: Annotated[
        str | None,
        "",
        "12 hex digits: hash of the machine and its software versions; missing if the run did not reach a device",
    ] = None
    name: Annotated[str | None, "", "label given as `name=...`"] = None
    overrides: Annotated[list[str], "", "overrides of the command line"] = field(default_factory=list)
    interleaved_with: Annotated[list[str], "", "cell_ids timed in the same rounds"] = field(default_factory=list)
    config: Annotated[dict[str, Any], ()] = field(default_factory=dict)
    implementation: Annotated[dict[str, str], fields.IMPLEMENTATION] = field(default_factory=dict)
    latency_ms: Latency | None = None
    latency_hot_ms: Annotated[
        float | None, "ms", "with `execution=cuda_graph`: median time of 20 calls in one graph, divided by 20"
    ] = None
    latency_cold_ms: Annotated[
        float | None,
        "ms",
        "with `execution=cuda_graph`: median time of a replay that finds nothing of its own in the L2 cache",
    ] = None
    gpu_busy_ms: Annotated[
        float | None,
        "ms",
        "eager runs only: time that the GPU computes in one iteration; excludes waiting for the host",
    ] = None
    ratio_to_anchor: Ratio | None = None
    throughput: Annotated[dict[str, float] | None, fields.THROUGHPUT] = None
    phases_ms: Annotated[dict[str, Any] | None, fields.PHASES] = None
    phases_share: Annotated[dict[str, float | None] | None, fields.PHASE_SHARES] = None
    memory: Annotated[dict[str, float | None] | None, fields.MEMORY] = None
    check: Check | None = None
    routing: Annotated[dict[str, Any] | None, fields.ROUTING] = None
    router: Annotated[dict[str, bool | None] | None, fields.PROPERTIES] = None
    agreement: Annotated[dict[str, Any] | None, fields.AGREEMENT] = None
    quality: Annotated[dict[str, Any] | None, fields.QUALITY] = None
    weight_changes: Annotated[dict[str, Any] | None, fields.WEIGHT_CHANGES] = None
    roofline: Annotated[dict[str, Any] | None, fields.ROOFLINE] = None
    export: Annotated[dict[str, Any] | None, fields.EXPORT] = None
    energy: Annotated[dict[str, Any] | None, fields.ENERGY] = None
    profile: Annotated[dict[str, Any] | None, fields.PROFILE] = None
    contention: Annotated[dict[str, Any] | None, fields.CONTENTION] = None
    environment: Annotated[dict[str, Any], fields.ENVIRONMENT] = field(default_factory=dict)
    started: Annotated[str | None, "UTC, ISO 8601", "start of the run"] = None
    elapsed_s: Annotated[float | None, "s", "duration of the whole run"] = None
    warnings: Annotated[list[str], "", "warnings of the run"] = field(default_factory=list)
    directory: Annotated[
        str | None,
        "",
        "folder of the record: in the files relative to the sweep's folder, from `moe_lab.load` below the folder given",
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "directory"}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Record:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another schema, unknown or missing fields, or a record that contradicts itself.
        """
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema={content.get('schema')!r}: this version of moe-lab reads schema {SCHEMA}.")
        values = dict(content)
        try:
            for name, kind in (("latency_ms", Latency), ("ratio_to_anchor", Ratio), ("check", Check)):
                if values.get(name) is not None:
                    values[name] = kind(**values[name])
            record = cls(**values)
        except TypeError as error:
            raise ValueError(f"not a record of schema {SCHEMA}: {error}") from error
        if (contradiction := _contradiction(record)) is not None:
            raise ValueError(f"the record contradicts itself: {contradiction}; was it edited?")
        return record


def _contradiction(record: Record) -> str | None:
    if record.status == "ok" and record.check is not None and record.check.passed is False:
        return "status is ok, and check.passed false"
    latency = record.latency_ms
    ends = (None, None) if latency is None else (latency.ci95_low, latency.ci95_high)
    if latency is not None and all(isinstance(value, int | float) for value in (latency.p50, *ends)):
        low, high = ends
        assert low is not None and high is not None
        if latency.p50 < low or latency.p50 > high:
            return f"latency_ms.p50={latency.p50} lies outside of its interval, [{low}, {high}]"
    return None


def fields_of(kind: Any) -> Fields:
    """Every field of a dataclass of this file, in order, nested ones under their name."""
    assert dataclasses.is_dataclass(kind), f"{kind} has neither fields nor a unit and a meaning"
    every: list[Field] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not said:
            every += fields.under(name, fields_of(_without_none(value)))
        elif len(said) == 1:
            every += fields.under(name, said[0])
        else:
            unit, meaning = said
            every.append(Field(name, _without_none(value), unit, meaning))
    return tuple(every)


def _without_none(hint: Any) -> Any:
    """The type of a value that is there; a choice of words is text."""
    if get_origin(hint) is Literal:
        return str
    return next(kind for kind in get_args(hint) if kind is not type(None)) if type(None) in get_args(hint) else hint
