"""The columns of a sweep's tables, in their order, with their types and what docs/results-format.md says of them.

Those of a record's fields come from records/schema.py; here stand those that only the tables have, and which of all
the summary shows. A name that ends in `.*` is the place of columns that only some records have: what a plug-in's model,
kernel or export adds. Their type is that of the values found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
import pyarrow as pa

from moe_lab.records import fields
from moe_lab.records.fields import Field, Fields
from moe_lab.records.schema import Record, fields_of

Columns = dict[str, Any]
"""Name -> pyarrow type, or None for the place of columns that only some records have."""

TEXT, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TEXTS, FLOATS = pa.list_(TEXT), pa.list_(FLOAT)
_NATIVE: dict[Any, Any] = {str: TEXT, int: INT, float: FLOAT, bool: BOOL}
_ARROW = {**_NATIVE, list[str]: TEXTS, list[float]: FLOATS, None: None}

_CONFIGURED = (
    Field("model", str, "", "option of the group"),
    Field("router", str, "", "option; missing if the model does not use a router"),
    Field("experts", str, "", "option; missing if the model does not use experts"),
    Field("batch", int, "sequences", "sequences of one iteration"),
    Field("seq_len", int, "tokens", "tokens per sequence; missing if the model does not use it"),
    Field("seed", int, "", "seed of the parameters and the input"),
    Field("workload", str, "", "option"),
    Field("device", str, "", "option (`auto` stays `auto`; see `environment.device`)"),
    Field("dtype", str, "", "option"),
    Field("execution", str, "", "option"),
)
OPTIONS = tuple(field.name for field in _CONFIGURED if field.kind is str)
"""The groups whose chosen option is a column."""
SETTINGS = tuple(field.name for field in _CONFIGURED if field.kind is int)
"""The keys of the configuration that are a column."""

_VARIANT = (
    Field(
        "variant",
        str,
        "",
        "how the cell differs from the cells it is compared with (`sweep.compare`): the name in `plan.json`, or a name "
        "made from the records",
    ),
    Field("setting_id", str, "", "12 hex digits: hash of the configuration that compared cells share"),
    Field(
        "config.*",
        None,
        "as configured",
        "a value of the configuration, such as `config.model.top_k`, in which records with the same option of a group "
        "differ",
    ),
)
_N_RECORDS = Field(
    "n_records",
    int,
    "records",
    "records in this folder with this cell_id; more than 1 for copies, or for one cell on several machines",
)
_REST = Field("*", None, "", "any other value of the record")
_RECORDED = {field.name: field for field in fields_of(Record)}
_FIRST, _LAST = ("status", "reason", "cell_id"), ("schema", "directory")

_RUNS = (
    *_CONFIGURED,
    *_VARIANT,
    *(_RECORDED[name] for name in _FIRST),
    _N_RECORDS,
    *(field for name, field in _RECORDED.items() if name not in _FIRST + _LAST),
    *(_RECORDED[name] for name in _LAST),
    _REST,
)

_OF_SUMMARY = (
    Field("anchor", str, "", "variant that the setting's others are compared with"),
    Field("is_anchor", bool, "", "whether this row is that variant"),
    Field("n_replicates", int, "processes", "processes in which the latency was measured; 0 without a latency"),
    Field(
        "ratio_to_anchor.p50",
        float,
        "1",
        "latency over the anchor's: the value in `runs` if it has this anchor, else the ratio of the two medians; "
        "missing for the anchor",
    ),
    Field(
        "ratio_to_anchor.paired",
        bool,
        "",
        "true: both were timed in the same rounds; false: only the ratio of the two medians, without an interval",
    ),
    Field("directory", str, "", "folder of that record, relative to the sweep's"),
)
_SUMMARY_NAMES = (
    "model",
    "batch",
    "seq_len",
    "seed",
    "workload",
    "device",
    "dtype",
    "config.*",
    "environment.device_name",
    "setting_id",
    "env_id",
    "variant",
    "anchor",
    "is_anchor",
    "router",
    "experts",
    "execution",
    "status",
    "reason",
    "n_records",
    "n_replicates",
    "latency_ms.n",
    "latency_ms.p50",
    "latency_ms.ci95_low",
    "latency_ms.ci95_high",
    "latency_ms.stable",
    "latency_hot_ms",
    "latency_cold_ms",
    "throughput.tokens_per_s",
    "throughput.time_per_output_token_ms",
    "ratio_to_anchor.p50",
    "ratio_to_anchor.ci95_low",
    "ratio_to_anchor.ci95_high",
    "ratio_to_anchor.rounds",
    "ratio_to_anchor.paired",
    "memory.peak_mb",
    "routing.pooled.load_max_over_mean",
    "routing.pooled.load_cv",
    "routing.pooled.load_entropy",
    "routing.pooled.effective_experts",
    "routing.pooled.dead_experts",
    "routing.pooled.unused_slots_fraction",
    "routing.pooled.dropped_tokens_fraction",
    "routing.pooled.topk_mass",
    "routing.pooled.expert_mb",
    "routing.worst.load_max_over_mean",
    "agreement.reference",
    "agreement.output_rel_error",
    "agreement.floor.output_rel_error",
    "agreement.pooled.jaccard",
    "agreement.worst.jaccard",
    *(f"quality.{name}" for name in fields.names(fields.PREDICTIONS) if not name.startswith("nats_per_token")),
    "check.passed",
    "check.rel_error",
    "check.expert_rel_error",
    "check.expert_scale_error",
    "check.token_rel_error",
    "check.free_rel_error",
    "check.near_ties",
    "cell_id",
    "directory",
)


_SHOWN = {field.name: field for field in (*_RUNS, *_OF_SUMMARY)}

TABLES: dict[str, Fields] = {
    "runs": _RUNS,
    "summary": tuple(_SHOWN[name] for name in _SUMMARY_NAMES),
    "samples": (
        _RECORDED["cell_id"],
        Field("replicate", int, "", "index of the fresh process, from 0"),
        Field("round", int, "", "index of the round in which each cell of the group was timed once"),
        Field("order", int, "", "position in the round"),
        Field("ms", float, "ms", "time of one iteration"),
        Field(
            "stamp_s",
            float,
            "s",
            "clock of the host when the iteration ended (CUDA: when its block ended); its zero is arbitrary",
        ),
        Field("directory", str, "", "folder of the record, relative to the sweep's; it distinguishes copies of a cell"),
    ),
    "coactivation": (
        _RECORDED["cell_id"],
        Field("layer", int, "", "index in the model"),
        Field("expert", int, "", "from 0"),
        Field("other", int, "", "another expert, or the same"),
        Field("tokens", int, "tokens", "tokens that use both experts"),
        Field("directory", str, "", "folder of the record, relative to the sweep's"),
    ),
    "unreadable": (
        Field("path", str, "", "path of the file, relative to the sweep's folder"),
        Field("error", str, "", "what is wrong with it"),
    ),
}
"""The tables of a folder, by name, with what their columns mean."""


def _columns(table: str) -> Columns:
    return {field.name: _ARROW[field.kind] for field in TABLES[table]}


RUNS, SUMMARY = _columns("runs"), _columns("summary")
KNOWN: Columns = {
    name: kind for name, kind in RUNS.items() if kind is not None and name not in ("variant", "setting_id", "n_records")
}
"""What one record alone tells, and every table has."""
SAMPLES, COACTIVATION, UNREADABLE = _columns("samples"), _columns("coactivation"), _columns("unreadable")


def check(row: dict[str, Any]) -> None:
    """Check a record's row against the types of `RUNS`; an integer in a column of floats becomes a float.

    Raises:
        ValueError: a value of another type, or an integer beyond 64 bits.
    """
    for name in _doubtful(tuple(row), tuple(map(type, row.values()))):
        row[name] = _typed(name, row[name], RUNS.get(name))


@lru_cache(maxsize=1024)
def _doubtful(names: tuple[str, ...], types: tuple[type, ...]) -> list[str]:
    """The names whose values have to be looked at; for the others the type suffices. Most rows are alike in that."""
    pairs = ((name, RUNS.get(name), kind) for name, kind in zip(names, types, strict=True) if kind is not type(None))
    return [name for name, wanted, kind in pairs if wanted in (None, INT) or wanted is not _NATIVE.get(kind)]


def _typed(name: str, value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list) and kind in (TEXTS, FLOATS):
        return [_typed(name, item, FLOAT if kind is FLOATS else TEXT) for item in value]
    if type(value) is int and not _fits(value):
        raise ValueError(f"{name} is an integer of more than 64 bits.")
    if kind is FLOAT and type(value) is int:
        return float(value)
    if kind is not None and kind is not _NATIVE.get(type(value)):
        raise ValueError(f"{name}={str(value)[:60]!r} is not of type {kind}.")
    return value


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> Any:
    """The rows as a `pyarrow.Table` with every column of `columns`, and at their places those that some rows have."""
    present: set[str] = set()
    for row in rows:
        present |= row.keys()
    arrays = {}
    for name in _ordered(present, columns):
        values = [row.get(name) for row in rows]
        if (kind := columns.get(name)) is None:
            kind, values = _infer(values)
        arrays[name] = pa.array(values, kind)
    return pa.table(arrays)


def joined(arrays: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Any:
    """The table `runs` of these columns, and of those that some rows have beside."""
    present: set[str] = set(arrays)
    for row in others:
        present |= row.keys()
    found = {}
    for name in _ordered(present, RUNS):
        if name not in arrays:
            kind, values = _infer([row.get(name) for row in others])
            found[name] = pa.array(values, kind)
        else:
            found[name] = arrays[name]
    return pa.table(found)


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
    types = {type(value) for value in values if value is not None}
    if types <= {int, float} and all(_fits(value) for value in values if type(value) is int):
        if types != {int}:
            return FLOAT, [None if value is None else float(value) for value in values]
        return INT, values
    if len(types) == 1 and (kind := _NATIVE.get(*types)) in (TEXT, BOOL):
        return kind, values
    if types == {list} and all(isinstance(item, str) for value in values for item in value or ()):
        return TEXTS, values
    return TEXT, [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]


def as_written(table: Any) -> Any:
    """A table that was read from a file as it was before: Parquet calls the items of a list otherwise."""
    kinds = (pa.list_(kind.value_type) if pa.types.is_list(kind) else kind for kind in table.schema.types)
    return table.cast(pa.schema(list(zip(table.schema.names, kinds, strict=True))))


def frame(table: Any) -> pd.DataFrame:
    """As pandas, whole numbers and truth values nullable, lists as lists."""
    result = table.to_pandas(types_mapper={INT: pd.Int64Dtype(), BOOL: pd.BooleanDtype()}.get)
    for field in table.schema:
        if pa.types.is_list(field.type):
            result[field.name] = pd.Series(table[field.name].to_pylist(), dtype=object)
    return result
