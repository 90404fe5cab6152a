"""Traces as tables: a row for each token and layer, read and written in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.records.trace import PHASES, Tokens, Trace, tokens_of

_NUMBERS, _WORDS = ("sequence", "position", "token"), ("phase", "domain")
_MOST_DOMAINS = 1 << 15


class Survey(NamedTuple):
    """What a first look through the tables found."""

    layers: list[int]
    top_k: int
    is_fixed: bool
    """Whether every token has so many experts."""
    largest: int
    columns: frozenset[str]
    domains: tuple[str, ...]
    missing: list[str]

    @property
    def has_weights(self) -> bool:
        return "weights" in self.columns


def survey(tables: Sequence[pq.ParquetFile]) -> Survey:
    """Look through all rows once. Raises `ValueError` for what is not such a table."""
    names = set(tables[0].schema_arrow.names)
    for table in tables:
        if set(table.schema_arrow.names) != names:
            raise ValueError("the files have different columns")
    for needed in ("layer", "expert_ids"):
        if needed not in names:
            raise ValueError(f"it has no column {needed}")
    columns = frozenset(names & {*_NUMBERS, *_WORDS, "weights"})
    rows: dict[int, int] = {}
    widths, largest, domains = set[int](), -1, dict[str, None]()
    wanted = ["layer", "expert_ids", *(columns & {"domain"})]
    for table in tables:
        for batch in table.iter_batches(columns=wanted):
            for layer, n in zip(*np.unique(_numbers(batch, "layer"), return_counts=True), strict=True):
                rows[int(layer)] = rows.get(int(layer), 0) + int(n)
            values, lengths = _lists(batch, "expert_ids")
            widths |= set(np.unique(lengths).tolist())
            largest = max(largest, int(values.max(initial=-1)))
            if "domain" in columns:
                domains |= dict.fromkeys(map(str, batch["domain"].unique().drop_null().to_pylist()))
    if not rows or largest < 0:
        raise ValueError("it has no routes")
    if len(set(rows.values())) > 1:
        fewest = min(rows, key=lambda layer: rows[layer])
        raise ValueError(f"layer {fewest} has {rows[fewest]} tokens, and another {max(rows.values())}")
    if len(domains) > _MOST_DOMAINS:
        raise ValueError(f"it has {len(domains)} domains; a trace has at most {_MOST_DOMAINS}")
    absent = [name for name in (*_NUMBERS, *_WORDS, "weights") if name not in columns]
    missing = [f"{', '.join(absent)}: the table has no such columns"] if absent else []
    return Survey(sorted(rows), max(widths), len(widths) == 1, largest, columns, tuple(domains), missing)


class Rows:
    """Collects rows until every layer has a token's."""

    def __init__(self, found: Survey, width: int):
        self.found, self.width = found, width
        self.waiting: dict[int, dict[str, np.ndarray]] = {}
        self.done = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Keep the rows of a batch."""
        arrays = {name: _numbers(batch, name) for name in ("layer", *(self.found.columns & {*_NUMBERS}))}
        if "phase" in self.found.columns:
            arrays["phase"] = _indices(batch["phase"], PHASES, "unknown")
        if "domain" in self.found.columns:
            arrays["domain"] = _indices(batch["domain"], self.found.domains, None)
        arrays["expert_ids"] = _padded(*_lists(batch, "expert_ids"), self.width, -1)
        if self.found.has_weights:
            values, lengths = _lists(batch, "weights")
            if not np.array_equal(lengths, _lists(batch, "expert_ids")[1]):
                raise ValueError("a row has other numbers of weights and of expert_ids")
            arrays["weights"] = _padded(values, lengths, self.width, 0)
        for layer in self.found.layers:
            chosen = arrays["layer"] == layer
            new = {name: values[chosen] for name, values in arrays.items() if name != "layer"}
            old = self.waiting.get(layer, {name: values[:0] for name, values in new.items()})
            self.waiting[layer] = {name: np.concatenate([old[name], values]) for name, values in new.items()}

    def take(self) -> tuple[Tokens, list[np.ndarray], Mapping[str, list[np.ndarray]]]:
        """The tokens that are complete, with their ids and weights layer by layer."""
        n = min(len(of_layer["expert_ids"]) for of_layer in self.waiting.values())
        taken = [{name: values[:n] for name, values in self.waiting[layer].items()} for layer in self.found.layers]
        self.waiting = {
            layer: {name: values[n:] for name, values in of_layer.items()} for layer, of_layer in self.waiting.items()
        }
        first = {name: values for name, values in taken[0].items() if name not in ("expert_ids", "weights")}
        for layer, of_layer in zip(self.found.layers, taken, strict=True):
            for name, values in first.items():
                if not np.array_equal(of_layer[name], values):
                    raise ValueError(
                        f"the rows of layer {layer} are other tokens than those of the first layer ({name})"
                    )
        numbers = np.arange(self.done, self.done + n)
        self.done += n
        tokens = tokens_of(
            first.get("sequence", np.zeros(n)),
            first.get("position", numbers),
            token=first.get("token"),
            domain=first.get("domain", -1),
        )
        tokens = tokens._replace(phase=first.get("phase", tokens.phase).astype(np.uint8))
        more = {"weights": [of_layer["weights"] for of_layer in taken]} if self.found.has_weights else {}
        return tokens, [of_layer["expert_ids"] for of_layer in taken], more

    def require_empty(self) -> None:
        """Raise `ValueError` if a token lacks a layer."""
        assert not any(len(of_layer["expert_ids"]) for of_layer in self.waiting.values())  # `survey` has counted


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{name} must be integers, without nulls")
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    if len(values) and name != "token" and int(values.min()) < 0:
        raise ValueError(f"{name} is negative")
    return values.astype(np.int64)


def _lists(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all values, the length of each row)."""
    column = batch[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise ValueError(f"{name} must be lists, without nulls")
    values = column.flatten()
    fits = pa.types.is_floating if name == "weights" else pa.types.is_integer
    if not fits(values.type) or values.null_count:
        raise ValueError(f"{name} must be lists of {'floats' if name == 'weights' else 'integers'}, without nulls")
    lengths: np.ndarray = column.value_lengths().to_numpy(zero_copy_only=False)
    return values.to_numpy(zero_copy_only=False), lengths.astype(np.int64)


def _padded(values: np.ndarray, lengths: np.ndarray, width: int, fill: float) -> np.ndarray:
    """Rows of `width`; `fill` behind their own."""
    if int(lengths.max(initial=0)) > width:
        raise ValueError(f"a token has {int(lengths.max())} experts, more than {width}")
    padded = np.full((len(lengths), width), fill, np.float32 if fill == 0 else np.int64)
    padded[np.arange(width) < lengths[:, None]] = values
    return padded


def _indices(column: pa.Array, names: Sequence[str], unknown: str | None) -> np.ndarray:
    """The place of each text in `names`; of a null that of `unknown`, or -1."""
    place: dict[Any, int] = {name: index for index, name in enumerate(names)}
    place[None] = place[unknown] if unknown is not None else -1
    encoded = column.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    if bad := [word for word in words if word not in place]:
        raise ValueError(f"{str(bad[0])[:60]}: must be one of {', '.join(names)}")
    table = np.array([*(place[word] for word in words), place[None]])
    indices = encoded.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)
    return np.asarray(table[indices])


def write(trace: Trace, path: Path) -> None:
    """A trace as a table, piece by piece: token by token, of each its layers in order; unused slots are left out."""
    has_weights = "weights" in trace.columns
    schema = pa.schema(
        [
            *((name, pa.int32()) for name in _NUMBERS),
            *((name, pa.string()) for name in _WORDS),
            ("layer", pa.int32()),
            ("expert_ids", pa.list_(pa.int16())),
            *([("weights", pa.list_(pa.float32()))] if has_weights else []),
        ]
    )
    layers = range(len(trace.layers))
    streams = [trace.pieces_of(index, "expert_ids") for index in layers]
    weights = [trace.pieces_of(index, "weights") for index in layers] if has_weights else []
    tokens, done = trace.tokens(), 0
    with pq.ParquetWriter(path, schema) as writer:
        for n in trace.pieces:
            part = Tokens(*(values[done : done + n] for values in tokens))
            done += n
            ids_L = [next(stream) for stream in streams]
            weights_L = [next(stream) for stream in weights]
            writer.write_table(pa.table(_columns(trace, part, ids_L, weights_L), schema=schema))


def _columns(
    trace: Trace, tokens: Tokens, ids_L: Sequence[np.ndarray], weights_L: Sequence[np.ndarray]
) -> dict[str, pa.Array]:
    L, n = len(ids_L), tokens.n
    domain = np.where(tokens.domain < 0, len(trace.domains), tokens.domain)
    words = {
        "phase": pa.array(PHASES).take(pa.array(tokens.phase)),
        "domain": pa.array([*trace.domains, None], pa.string()).take(pa.array(domain)),
    }
    rows = np.arange(n).repeat(L)
    columns = {name: pa.array(getattr(tokens, name)[rows]) for name in _NUMBERS}
    columns |= {name: values.take(pa.array(rows)) for name, values in words.items()}
    columns["layer"] = pa.array(np.tile([layer.layer for layer in trace.layers], n), pa.int32())
    lengths = np.stack([(ids_TK >= 0).sum(axis=1) for ids_TK in ids_L], axis=1).reshape(-1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    for name, arrays in (("expert_ids", ids_L), ("weights", weights_L)):
        if arrays:
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(_by_token(ids_L, arrays)))
    return columns


def _by_token(ids_L: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The used slots of token 0 in layer 0, 1, ..., then of token 1."""
    widest = max(ids_TK.shape[1] for ids_TK in ids_L)
    padded = [np.pad(values_TK, ((0, 0), (0, widest - values_TK.shape[1])), constant_values=0) for values_TK in arrays]
    used = [np.pad(ids_TK >= 0, ((0, 0), (0, widest - ids_TK.shape[1]))) for ids_TK in ids_L]
    return np.stack(padded, axis=1)[np.stack(used, axis=1)]
