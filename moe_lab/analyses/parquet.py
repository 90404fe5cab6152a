"""Traces as tables: a row for each token and layer, read and written in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.records.trace import (
    COLUMNS,
    GUESSES,
    PHASES,
    TOKEN_COLUMNS,
    Layer,
    Tokens,
    Trace,
    shape_of,
    tokens_of,
)

_NUMBERS, _WORDS = ("sequence", "position", "token"), ("phase", "domain")
_USUAL = (*_NUMBERS, *_WORDS, "weights")
"""What a person is told of if a table does not have it."""
_TYPES = {
    "layer": pa.int32(),
    "expert_ids": pa.list_(pa.int16()),
    **dict.fromkeys(_NUMBERS, pa.int32()),
    **dict.fromkeys(_WORDS, pa.string()),
    "weights": pa.list_(pa.float32()),
    "margin": pa.float32(),
    "logits": pa.list_(pa.float32()),
    **dict.fromkeys(GUESSES, pa.list_(pa.int16())),
    "log_p": pa.list_(pa.float32()),
    "predicted": pa.int32(),
}
"""All columns that are written and read. Those of tokens stand in the rows of all layers."""
assert set(COLUMNS) | set(TOKEN_COLUMNS) < set(_TYPES)
_MOST_DOMAINS = 1 << 15
_ROWS_AT_ONCE = 1 << 18


class Survey(NamedTuple):
    """What a first look through the tables found."""

    layers: list[int]
    top_k: int
    is_fixed: bool
    """Whether every token has so many experts."""
    largest: int
    columns: frozenset[str]
    domains: tuple[str, ...]
    n_logits: dict[int, int]
    """How many logits a row of each layer has, where there are any: the layer's experts."""
    n_log_p: int
    missing: list[str]

    @property
    def of_layers(self) -> tuple[str, ...]:
        """Those of `COLUMNS`."""
        return tuple(name for name in COLUMNS if name in self.columns)

    @property
    def of_tokens(self) -> dict[str, int]:
        """Those of `TOKEN_COLUMNS`, with their widths."""
        widths = {"log_p": self.n_log_p, "predicted": 1}
        return {name: width for name, width in widths.items() if name in self.columns}


def survey(tables: Sequence[pq.ParquetFile]) -> Survey:
    """Look through all rows once. Raises `ValueError` for what is not such a table."""
    names = set(tables[0].schema_arrow.names)
    for table in tables:
        if set(table.schema_arrow.names) != names:
            raise ValueError("the files have different columns")
    for needed in ("layer", "expert_ids"):
        if needed not in names:
            raise ValueError(f"it has no column {needed}")
    columns = frozenset(names & _TYPES.keys())
    rows: dict[int, int] = {}
    widths, largest, domains = set[int](), -1, dict[str, None]()
    logits: dict[int, set[int]] = {}
    log_p = set[int]()
    wanted = ["layer", "expert_ids", *(columns & {"domain", "logits", "log_p", *GUESSES})]
    for batch in (batch for table in tables for batch in table.iter_batches(columns=wanted)):
        number = _numbers(batch, "layer")
        for layer, n in zip(*np.unique(number, return_counts=True), strict=True):
            rows[int(layer)] = rows.get(int(layer), 0) + int(n)
            if "logits" in columns:
                logits.setdefault(int(layer), set()).update(_lists(batch, "logits")[1][number == layer].tolist())
        widths |= set(np.unique(_lists(batch, "expert_ids")[1]).tolist())
        largest = max(largest, *(int(_lists(batch, name)[0].max(initial=-1)) for name in _ids(columns)))
        if "log_p" in columns:
            log_p |= set(_lists(batch, "log_p")[1].tolist())
        if "domain" in columns:
            domains |= dict.fromkeys(map(str, batch["domain"].unique().drop_null().to_pylist()))
    if not rows or largest < 0:
        raise ValueError("it has no routes")
    if len(set(rows.values())) > 1:
        fewest = min(rows, key=lambda layer: rows[layer])
        raise ValueError(f"layer {fewest} has {rows[fewest]} tokens, and another {max(rows.values())}")
    if len(domains) > _MOST_DOMAINS:
        raise ValueError(f"it has {len(domains)} domains; a trace has at most {_MOST_DOMAINS}")
    n_log_p = _only(log_p, "log_p") if log_p else 0
    if log_p and n_log_p not in TOKEN_COLUMNS["log_p"].widths:
        raise ValueError(f"log_p has {n_log_p} values in a row, and a trace at least 3 (see docs/traces.md)")
    n_logits = {layer: _only(lengths, f"layer {layer}: logits") for layer, lengths in logits.items()}
    missing = _missing(names)
    return Survey(
        sorted(rows), max(widths), len(widths) == 1, largest, columns, tuple(domains), n_logits, n_log_p, missing
    )


def _ids(columns: frozenset[str]) -> list[str]:
    """The columns that hold expert ids."""
    return ["expert_ids", *(name for name in GUESSES if name in columns)]


def _only(lengths: set[int], what: str) -> int:
    if len(lengths) > 1:
        raise ValueError(f"{what} has rows of {min(lengths)} and of {max(lengths)} values")
    return next(iter(lengths))


def _missing(names: set[str]) -> list[str]:
    missing = []
    if absent := [name for name in _USUAL if name not in names]:
        missing.append(f"{', '.join(absent)}: the table has no such columns")
    if others := sorted(names - _TYPES.keys()):
        missing.append(f"{', '.join(others)}: columns of the table that a trace does not have")
    return missing


class Rows:
    """Collects rows until every layer has a token's."""

    def __init__(self, found: Survey, layers: Sequence[Layer]):
        self.found, self.layers = found, layers
        self.waiting: dict[int, dict[str, np.ndarray]] = {}
        self.done = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Keep the rows of a batch."""
        number = _numbers(batch, "layer")
        for layer in self.layers:
            part = batch.filter(pa.array(number == layer.layer))
            new = {name: self._read(part, name, layer) for name in self.found.columns if name != "layer"}
            old = self.waiting.get(layer.layer, {name: values[:0] for name, values in new.items()})
            self.waiting[layer.layer] = {name: np.concatenate([old[name], values]) for name, values in new.items()}

    def _read(self, batch: pa.RecordBatch, name: str, layer: Layer) -> np.ndarray:
        """One column of rows of one layer, as a trace has it."""
        if name in (*_NUMBERS, "predicted"):
            return _numbers(batch, name)
        if name == "phase":
            return _indices(batch[name], PHASES, "unknown")
        if name == "domain":
            return _indices(batch[name], self.found.domains, None)
        if name == "margin":
            return _floats(batch, name)
        values, lengths = _lists(batch, name)
        if name == "log_p":
            return values.reshape(-1, self.found.n_log_p)
        if name == "weights" and not np.array_equal(lengths, _lists(batch, "expert_ids")[1]):
            raise ValueError("a row has other numbers of weights and of expert_ids")
        width = shape_of(name, layer, len(lengths))[1]
        return _padded(name, values, lengths, width)

    def take(self) -> tuple[Tokens, list[np.ndarray], dict[str, np.ndarray], Mapping[str, list[np.ndarray]]]:
        """The tokens that are complete: they, their ids layer by layer, and what else tokens and layers have."""
        n = min(len(of_layer["expert_ids"]) for of_layer in self.waiting.values())
        taken = [{name: values[:n] for name, values in self.waiting[layer].items()} for layer in self.found.layers]
        self.waiting = {
            layer: {name: values[n:] for name, values in of_layer.items()} for layer, of_layer in self.waiting.items()
        }
        first = {name: values for name, values in taken[0].items() if name not in ("expert_ids", *COLUMNS)}
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
        more = {name: [of_layer[name] for of_layer in taken] for name in self.found.of_layers}
        of_tokens = {name: first[name] for name in self.found.of_tokens}
        return tokens, [of_layer["expert_ids"] for of_layer in taken], of_tokens, more

    def require_empty(self) -> None:
        """Raise `ValueError` if a token lacks a layer."""
        assert not any(len(of_layer["expert_ids"]) for of_layer in self.waiting.values())  # `survey` has counted


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{name} must be integers, without nulls")
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    if len(values) and name not in ("token", "predicted") and int(values.min()) < 0:
        raise ValueError(f"{name} is negative")
    return values.astype(np.int64)


def _floats(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch[name]
    if not pa.types.is_floating(column.type) or column.null_count:
        raise ValueError(f"{name} must be floats, without nulls")
    values: np.ndarray = column.to_numpy(zero_copy_only=False)
    return values


def _lists(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all values, the length of each row)."""
    column = batch[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise ValueError(f"{name} must be lists, without nulls")
    values, holds_ids = column.flatten(), name in ("expert_ids", *GUESSES)
    fits = pa.types.is_integer if holds_ids else pa.types.is_floating
    if not fits(values.type) or values.null_count:
        raise ValueError(f"{name} must be lists of {'integers' if holds_ids else 'floats'}, without nulls")
    lengths: np.ndarray = column.value_lengths().to_numpy(zero_copy_only=False)
    return values.to_numpy(zero_copy_only=False), lengths.astype(np.int64)


def _padded(name: str, values: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Rows of `width`; behind their own -1 in place of ids, else 0."""
    if int(lengths.max(initial=0)) > width:
        what = "experts" if name == "expert_ids" else name
        raise ValueError(f"a token has {int(lengths.max())} {what}, more than {width}")
    holds_ids = name in ("expert_ids", *GUESSES)
    padded = np.full((len(lengths), width), -1 if holds_ids else 0, np.int64 if holds_ids else np.float32)
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
    of_layers = ("expert_ids", *trace.columns)
    names = ["layer", *_NUMBERS, *_WORDS, *of_layers, *trace.token_columns]
    schema = pa.schema([(name, _TYPES[name]) for name in names])
    layers = range(len(trace.layers))
    streams = {name: [trace.pieces_of(index, name) for index in layers] for name in of_layers}
    tokens, done = trace.tokens(), 0
    with pq.ParquetWriter(path, schema) as writer:
        for piece, n in enumerate(trace.pieces):
            of_tokens = Tokens(*(values[done : done + n] for values in tokens))._asdict()
            of_tokens |= {name: trace.piece_of_tokens(name, piece) for name in trace.token_columns}
            arrays = {name: [next(stream) for stream in of_name] for name, of_name in streams.items()}
            done += n
            for rows in _slices(n, max(1, _ROWS_AT_ONCE // len(layers))):
                cut = {name: [values[rows] for values in of_layers] for name, of_layers in arrays.items()}
                columns = _columns(trace, {name: values[rows] for name, values in of_tokens.items()}, cut)
                writer.write_table(pa.table({name: columns[name] for name in names}, schema=schema))


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, n, size))


def _columns(
    trace: Trace, of_tokens: Mapping[str, np.ndarray], of_layers: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, pa.Array]:
    L, n = len(trace.layers), len(of_tokens["token"])
    rows = np.arange(n).repeat(L)
    domain = np.where(of_tokens["domain"] < 0, len(trace.domains), of_tokens["domain"])
    columns = {
        "layer": pa.array(np.tile([layer.layer for layer in trace.layers], n), pa.int32()),
        "phase": pa.array(PHASES).take(pa.array(of_tokens["phase"][rows])),
        "domain": pa.array([*trace.domains, None], pa.string()).take(pa.array(domain[rows])),
    }
    for name, values in of_tokens.items():
        if name not in _WORDS:
            columns[name] = pa.array(values[rows]) if values.ndim == 1 else _as_lists([values] * L)
    for name, arrays in of_layers.items():
        if name == "margin":
            columns[name] = pa.array(np.stack(arrays, axis=1).reshape(-1))
        elif name == "logits":
            columns[name] = _as_lists(arrays)
        else:  # used slots alone
            ids = arrays if name in GUESSES else of_layers["expert_ids"]
            columns[name] = _as_lists(arrays, [ids_TK >= 0 for ids_TK in ids])
    return columns


def _as_lists(arrays: Sequence[np.ndarray], chosen: Sequence[np.ndarray] | None = None) -> pa.ListArray:
    """Lists of the (chosen) values [n, W] of token 0 in layer 0, 1, ..., then of token 1."""
    widest = max(array.shape[1] for array in arrays)
    chosen = chosen or [np.ones(array.shape, bool) for array in arrays]
    values_NLW, chosen_NLW = (
        np.stack([np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in of_layers], axis=1)
        for of_layers in (arrays, chosen)
    )
    offsets = np.concatenate([[0], np.cumsum(chosen_NLW.sum(axis=2).reshape(-1))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values_NLW[chosen_NLW]))
