"""The columns of a sweep's tables, in their order, with their types; docs/results-format.md says what they mean.

A name that ends in `.*` is the place of columns that only some records have: what a plug-in's model, kernel or export
adds. Their type is that of the values found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

Columns = dict[str, Any]
"""Name -> pyarrow type, or None for the place of columns that only some records have."""

OPTIONS = ("model", "router", "experts", "workload", "device", "dtype", "execution")
"""The groups whose chosen option is a column."""

TEXT, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TEXTS, FLOATS = pa.list_(TEXT), pa.list_(FLOAT)

_LOAD = ("load_max_over_mean", "load_min_over_mean", "load_cv", "load_gini", "load_entropy", "effective_experts")
_SCORES = ("aux_loss", "z_loss", "token_entropy", "mutual_information", "top1_prob", "top1_margin", "boundary_margin")
_RANKS = tuple(
    f"rank_load_{place}_{R}" for place in ("contiguous", "round_robin", "eplb") for R in (2, 4, 8, 16, 32, 64)
)
_LOST = ("topk_mass", "dropped_fraction", "dropped_tokens_fraction", "tile_waste_64", "tile_waste_128")
ROUTING: Columns = {
    **dict.fromkeys(_LOAD, FLOAT),
    **dict.fromkeys(("dead_experts", "unique_experts"), FLOAT),  # of decoding a mean over steps
    **dict.fromkeys((*_SCORES, *_LOST), FLOAT),
    **dict.fromkeys(("uniform_unique_experts", "expert_mb", "shared_with_previous", "first_choice_repeats"), FLOAT),
    **dict.fromkeys(_RANKS, FLOAT),
}
"""The metrics of measure/routing_metrics.py."""
PROPERTIES = ("causal", "batch_invariant", "static_k", "graph_safe", "needs_token_ids", "scales_input", "calibrates")
"""What a router declares, in moe_lab/routers/base.py."""
AGREEMENT = dict.fromkeys(("jaccard", "same_experts", "same_first_choice", "combine_l1", "rel_error"), FLOAT)
"""The measures of agreement.py."""
_INTERVAL = ("", "_ci95_low", "_ci95_high")
QUALITY = (
    *(f"{name}{end}" for name in ("bits_per_byte", "nats_per_token") for end in _INTERVAL),
    "native_bits_per_byte",
    *(f"{name}{end}" for name in ("delta_bits_per_byte", "kl_to_native", "top1_agreement") for end in _INTERVAL),
)
"""The measures of quality.py."""


_NATIVE = {str: TEXT, int: INT, float: FLOAT, bool: BOOL}


def _under(prefix: str, columns: Columns) -> Columns:
    return {f"{prefix}.{name}": kind for name, kind in columns.items()}


RUNS: Columns = {
    **dict.fromkeys(("model", "router", "experts"), TEXT),
    **dict.fromkeys(("batch", "seq_len", "seed"), INT),
    **dict.fromkeys(("workload", "device", "dtype", "execution", "variant", "setting_id"), TEXT),
    "config.*": None,
    **dict.fromkeys(("status", "reason", "cell_id"), TEXT),
    "n_records": INT,
    **dict.fromkeys(("code_id", "env_id", "name"), TEXT),
    **dict.fromkeys(("overrides", "interleaved_with"), TEXTS),
    "implementation.router": TEXT,
    "implementation.gate": TEXT,
    "implementation.experts": TEXT,
    "implementation.add_rms_norm": TEXT,
    "implementation.segment_mm": TEXT,
    "implementation.*": None,
    "latency_ms.n": INT,
    **_under("latency_ms", dict.fromkeys(("mean", "p50", "p90", "p99", "ci95_low", "ci95_high"), FLOAT)),
    "latency_ms.stable": BOOL,
    "latency_ms.cache": TEXT,
    "latency_ms.replicate_p50": FLOATS,
    "latency_ms.replicate_probe_ms": FLOATS,
    **dict.fromkeys(("latency_hot_ms", "latency_cold_ms"), FLOAT),
    "ratio_to_anchor.anchor": TEXT,
    **_under("ratio_to_anchor", dict.fromkeys(("p50", "ci95_low", "ci95_high"), FLOAT)),
    "ratio_to_anchor.rounds": INT,
    **_under("throughput", dict.fromkeys(("tokens_per_s", "time_per_token_us"), FLOAT)),
    "throughput.time_per_output_token_ms": FLOAT,
    "phases_ms.execution": TEXT,
    **_under("phases_ms", dict.fromkeys(("router", "dispatch", "experts", "combine", "attention"), FLOAT)),
    "phases_ms.*": None,
    **_under("phases_ms", dict.fromkeys(("other", "sum_ms", "launch_gap_ms"), FLOAT)),
    **_under("memory", dict.fromkeys(("peak_mb", "parameters_mb"), FLOAT)),
    "check.passed": BOOL,
    **_under("check", dict.fromkeys(("rel_error", "max_abs_error", "expert_rel_error", "token_rel_error"), FLOAT)),
    "check.cache_rel_error": FLOAT,
    "check.near_ties": INT,
    "check.free_rel_error": FLOAT,
    "check.changed_sets": INT,
    "check.reference": TEXT,
    **_under("routing.pooled", ROUTING),
    **_under("routing.worst", ROUTING),
    "routing.steps": INT,
    **_under("router", dict.fromkeys(PROPERTIES, BOOL)),
    "agreement.reference": TEXT,
    "agreement.seconds": FLOAT,
    "agreement.output_rel_error": FLOAT,
    **_under("agreement.pooled", AGREEMENT),
    **_under("agreement.worst", AGREEMENT),
    "agreement.floor.output_rel_error": FLOAT,
    **_under("agreement.floor.pooled", AGREEMENT),
    **_under("agreement.floor.worst", AGREEMENT),
    **_under("quality", dict.fromkeys(("tokens", "windows", "windows_left_out", "bytes"), INT)),
    **_under("quality", dict.fromkeys(QUALITY, FLOAT)),
    "quality.*": None,
    "roofline.flops": INT,
    "roofline.bytes": INT,
    **_under("roofline", dict.fromkeys(("floor_ms", "fraction_of_floor", "bytes_per_s", "flops_per_s"), FLOAT)),
    "roofline.peak_source": TEXT,
    "export.*": None,
    **_under("environment", dict.fromkeys(("device", "device_name", "compute_capability"), TEXT)),
    "environment.device_memory_mb": FLOAT,
    "environment.cpu": TEXT,
    "environment.cpus": INT,
    "environment.threads": INT,
    "environment.cpu_capability": TEXT,
    "environment.host_memory_mb": FLOAT,
    **_under("environment", dict.fromkeys(("system", "driver", "cuda", "torch", "triton", "python"), TEXT)),
    **_under("environment", dict.fromkeys(("hydra", "numpy", "moe_lab", "git_sha"), TEXT)),
    "environment.git_dirty": BOOL,
    "environment.*": None,
    "started": TEXT,
    "elapsed_s": FLOAT,
    "warnings": TEXTS,
    "schema": INT,
    "directory": TEXT,
    "*": None,
}

_OF_A_SETTING = ("model", "batch", "seq_len", "seed", "workload", "device", "dtype")
_OF_A_RESULT = (
    *("latency_ms.n", "latency_ms.p50", "latency_ms.ci95_low", "latency_ms.ci95_high", "latency_ms.stable"),
    *("latency_hot_ms", "latency_cold_ms"),
    *(
        "throughput.tokens_per_s",
        "throughput.time_per_output_token_ms",
        "ratio_to_anchor.p50",
        "ratio_to_anchor.ci95_low",
        "ratio_to_anchor.ci95_high",
    ),
    *("ratio_to_anchor.rounds", "ratio_to_anchor.paired", "memory.peak_mb"),
    *(f"routing.pooled.{name}" for name in ("load_max_over_mean", "load_cv", "load_entropy", "effective_experts")),
    *(f"routing.pooled.{name}" for name in ("dead_experts", "dropped_fraction", "topk_mass", "expert_mb")),
    *("routing.worst.load_max_over_mean", "agreement.reference", "agreement.output_rel_error"),
    *("agreement.floor.output_rel_error", "agreement.pooled.jaccard", "agreement.worst.jaccard"),
    *(f"quality.{name}" for name in QUALITY if "nats" not in name),
    *("check.passed", "check.rel_error"),
    *("check.expert_rel_error", "check.token_rel_error", "check.free_rel_error", "check.near_ties"),
)
_NEW = {"anchor": TEXT, "is_anchor": BOOL, "n_replicates": INT, "ratio_to_anchor.paired": BOOL}
SUMMARY: Columns = {
    name: {**RUNS, **_NEW}[name]
    for name in (
        *_OF_A_SETTING,
        *("config.*", "environment.device_name", "setting_id", "env_id"),
        *("variant", "anchor", "is_anchor", "router", "experts", "execution"),
        *("status", "reason", "n_records", "n_replicates", *_OF_A_RESULT, "cell_id", "directory"),
    )
}

SAMPLES: Columns = {
    "cell_id": TEXT,
    **dict.fromkeys(("replicate", "round", "order"), INT),
    **dict.fromkeys(("ms", "stamp_s"), FLOAT),
    "directory": TEXT,
}
COACTIVATION: Columns = {
    "cell_id": TEXT,
    **dict.fromkeys(("layer", "expert", "other", "tokens"), INT),
    "directory": TEXT,
}
UNREADABLE: Columns = {"path": TEXT, "error": TEXT}


def check(row: dict[str, Any]) -> None:
    """Hold a record's row to the types of `RUNS`; a whole number where a float belongs becomes one.

    Raises:
        ValueError: a value of another type, or a whole number beyond 64 bits.
    """
    for name, value in row.items():
        kind = RUNS.get(name)
        if value is None or (kind is not INT and kind is not None and kind is _NATIVE.get(type(value))):
            continue  # the quick way for most
        row[name] = _typed(name, value, kind)


def _typed(name: str, value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list) and kind in (TEXTS, FLOATS):
        return [_typed(name, item, FLOAT if kind is FLOATS else TEXT) for item in value]
    if type(value) is int and not _fits(value):
        raise ValueError(f"{name} is a whole number of more than 64 bits.")
    if kind is FLOAT and type(value) is int:
        return float(value)
    if kind is not None and kind is not _NATIVE.get(type(value)):
        raise ValueError(f"{name}={str(value)[:60]!r} is no {kind}.")
    return value


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> Any:
    """The rows as a `pyarrow.Table` with every column of `columns`, and at their places those that some rows have."""
    present = dict.fromkeys(name for row in rows for name in row)
    arrays = {}
    for name in _ordered(present, columns):
        values = [row.get(name) for row in rows]
        if (kind := columns.get(name)) is None:
            kind, values = _infer(values)
        arrays[name] = pa.array(values, kind)
    return pa.table(arrays)


def _ordered(present: Iterable[str], columns: Columns) -> list[str]:
    others = sorted(name for name in present if name not in columns)
    ordered: list[str] = []
    for name, kind in columns.items():
        here = [name] if kind is not None else [other for other in others if other.startswith(name.removesuffix("*"))]
        others = [other for other in others if other not in here]
        ordered += here
    return ordered


def _infer(values: list[Any]) -> tuple[Any, list[Any]]:
    """The type that all values share; where there is none, each that is no text becomes JSON."""
    found = {type(value) for value in values if value is not None}
    if found <= {int, float} and all(_fits(value) for value in values if type(value) is int):
        if found != {int}:
            return FLOAT, [None if value is None else float(value) for value in values]
        return INT, values
    if len(found) == 1 and (kind := _NATIVE.get(*found)) in (TEXT, BOOL):
        return kind, values
    if found == {list} and all(isinstance(item, str) for value in values for item in value or ()):
        return TEXTS, values
    return TEXT, [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]


def frame(table: Any) -> pd.DataFrame:
    """As pandas, whole numbers and truth values nullable, lists as lists."""
    result = table.to_pandas(types_mapper={INT: pd.Int64Dtype(), BOOL: pd.BooleanDtype()}.get)
    for field in table.schema:
        if pa.types.is_list(field.type):
            result[field.name] = pd.Series(table[field.name].to_pylist(), dtype=object)
    return result
