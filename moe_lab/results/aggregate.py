"""The tables of a sweep's folder, as docs/results-format.md describes them.

Reading is incremental: `.aggregate.parquet` keeps what was taken from each record, with the time stamp and size of its
files, and is ignored where it does not fit. Samples and pairs of experts that have not changed are taken from the
tables made before. With nothing changed, nothing is written.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from moe_lab.records.identity import PACKAGE
from moe_lab.records.store import PLAN, RESULT, ROUTING, SAMPLES, write_atomic
from moe_lab.results import coactivation, columns, load
from moe_lab.results.arrays import Arrays
from moe_lab.results.load import UNREADABLE_BECAUSE, Entry, Found
from moe_lab.results.spreadsheet import FORMULA, guarded
from moe_lab.results.summary import summarize

OUTPUTS = (
    "runs.parquet",
    "runs.csv",
    "summary.parquet",
    "summary.csv",
    "samples.parquet",
    "coactivation.parquet",
    "unreadable.csv",
)
CACHE = ".aggregate.parquet"
_CACHED = pa.schema(
    [
        ("folder", pa.string()),
        *((f"{file}_{what}", pa.int64()) for file in ("result", "samples", "routing") for what in ("ns", "bytes")),
        *((name, pa.int64()) for name in ("n_samples", "pairs_batch", "pairs_first", "n_pairs")),
        *((name, pa.string()) for name in ("entry", "problems", "pairs_problem")),
    ]
)
_ARRAYS = {"replicate": np.int64, "round": np.int64, "order": np.int64, "ms": np.float64, "stamp_s": np.float64}

_json = json.JSONEncoder(ensure_ascii=False).encode

Samples = dict[str, "np.ndarray[Any, Any]"]


class Aggregate(NamedTuple):
    """The tables as pandas. `runs["directory"]` is relative to the sweep's folder."""

    runs: pd.DataFrame
    summary: pd.DataFrame
    unreadable: pd.DataFrame


class Taken(NamedTuple):
    """What was taken from a record's folder: the entry (None: unreadable), the samples, and (path, what is wrong)."""

    entry: Entry | None
    samples: Samples
    problems: list[tuple[str, str]]
    text: str | None = None
    """The entry as the cache has it."""
    pairs: coactivation.Rows | None = None
    pairs_problem: str | None = None


def aggregate(directory: str | Path) -> Aggregate:
    """Write the tables of the records under `directory` into it, and return them.

    A record that cannot be read is listed in `unreadable`; the others are still read.

    Raises:
        ValueError: the folder does not exist.
        OSError: a table cannot be written; the error names it, and the earlier table is unchanged.
    """
    root = load.folder(directory)
    with _without_collection():
        return _aggregate(root)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Rows are trees of plain data: looking for circles among thousands of them takes an eighth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _aggregate(root: Path) -> Aggregate:
    folders, problems = load.search(root)
    try:
        plan = load.read_plan(root)
    except UNREADABLE_BECAUSE as error:
        plan = load.Plan()
        problems.append((PLAN, f"ignored: {load.one_line(error)}"))
    inputs = hashlib.sha256(json.dumps([folders, problems, plan]).encode()).hexdigest()
    if (before := _unchanged(root, inputs)) is not None:
        return before

    cached = _cached(root)
    taken = [cached.get(record) or _take(root, record) for record in folders]
    problems += [problem for record in taken for problem in record.problems]
    pairs = _pairs(root, folders, taken)
    problems += [(_path(cell, ROUTING), cell.problem) for cell in pairs.cells if cell.problem is not None]
    entries = [record.entry for record in taken if record.entry is not None]
    rows = load.complete(entries, plan)
    runs = columns.table(rows, columns.RUNS)
    summary = columns.table(summarize(rows, [entry.content for entry in entries], plan), columns.SUMMARY)
    unreadable = _unreadable(problems)
    _write(root / "runs.parquet", _parquet(runs))
    _write(root / "runs.csv", _csv(runs))
    _write(root / "summary.parquet", _parquet(summary))
    _write(root / "summary.csv", _csv(summary))
    _write(root / "samples.parquet", _parquet(_samples_table(taken)))
    _write(root / "unreadable.csv", _csv(unreadable))
    _write(root / "coactivation.parquet", pairs.content)
    _write(root / CACHE, _parquet(_cache_table(root, inputs, folders, taken, pairs.cells, problems)))
    return Aggregate(*map(columns.frame, (runs, summary, unreadable)))


def _unreadable(problems: Sequence[Sequence[str]]) -> Any:
    rows = [dict(zip(columns.UNREADABLE, problem, strict=True)) for problem in problems]
    return columns.table(rows, columns.UNREADABLE)


def _take(root: Path, files: Found) -> Taken:
    problems: list[tuple[str, str]] = []
    try:
        entry = load.read(root, files.folder)
    except UNREADABLE_BECAUSE as error:
        return Taken(None, _no_samples(), [(_path(files, RESULT), load.one_line(error))])
    samples = _no_samples()
    if files.samples[1] >= 0:
        try:
            with open(f"{root}/{files.folder}/{SAMPLES}", "rb") as file:
                samples = read_samples(file.read())
        except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
            problems.append((_path(files, SAMPLES), load.one_line(error)))
    return Taken(entry, samples, problems)


def _pairs(root: Path, folders: Sequence[Found], taken: Sequence[Taken]) -> coactivation.Table:
    """The table of the pairs of experts; if the earlier one is damaged, without it."""
    cells = [
        coactivation.Cell(files.folder, record.entry.row["cell_id"], record.pairs, record.pairs_problem)
        for files, record in zip(folders, taken, strict=True)
        if record.entry
    ]
    if any(record.pairs is not None for record in taken):
        try:
            return coactivation.table(root, cells, coactivation.Earlier(root / "coactivation.parquet"))
        except (*UNREADABLE_BECAUSE, pa.ArrowException):
            pass
    return coactivation.table(root, cells)


def _path(files: Found | coactivation.Cell, name: str) -> str:
    return load.printable(Path(files.folder, name))


def _no_samples() -> Samples:
    return {name: np.empty(0, dtype) for name, dtype in _ARRAYS.items()}


def read_samples(content: bytes) -> Samples:
    """The arrays of a `samples.npz`; `replicate` is 0 where an older one lacks it.

    Raises `ValueError`, or an error of zipfile, zlib or numpy, if these are not such arrays.
    """
    samples: Samples = {}
    there = Arrays(content)
    for name, dtype in _ARRAYS.items():
        if name == "replicate" and name not in there:
            continue
        array = there[name]
        if array.ndim != 1 or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ValueError(f"{name} of {array.dtype} {list(array.shape)}: must be a list of {np.dtype(dtype)}.")
        samples[name] = array.astype(dtype, copy=False)
    samples.setdefault("replicate", np.zeros(len(samples["ms"]), np.int64))
    if len({len(array) for array in samples.values()}) > 1:
        raise ValueError(f"arrays of different length: { {name: len(array) for name, array in samples.items()} }.")
    return samples


def _samples_table(taken: Sequence[Taken]) -> Any:
    lengths = [len(record.samples["ms"]) for record in taken]
    of_cell = pa.array(np.repeat(np.arange(len(taken), dtype=np.int32), lengths))
    arrays = {
        name: pa.array(np.concatenate([_no_samples()[name], *(record.samples[name] for record in taken)]))
        for name in _ARRAYS
    }
    for name in ("cell_id", "directory"):
        texts = pa.array([record.entry.row[name] if record.entry else None for record in taken], pa.string())
        arrays[name] = pa.DictionaryArray.from_arrays(of_cell, texts).cast(pa.string())
    return pa.table({name: arrays[name] for name in columns.SAMPLES})


# ---- what was read before


@cache
def _code() -> str:
    """Hash of what decides how a record becomes a row."""
    hashed = hashlib.sha256()
    for path in sorted(file for part in ("records", "results") for file in (PACKAGE / part).glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _unchanged(root: Path, inputs: str) -> Aggregate | None:
    """The existing tables, if they were made from these inputs by this code and have not changed since."""
    try:
        state = json.loads(pq.read_schema(root / CACHE).metadata[b"moe_lab"])
        outputs = {name: list(load.stamp(root / name)) for name in OUTPUTS}
        if (state["code"], state["inputs"], state["outputs"]) != (_code(), inputs, outputs):
            return None
        runs, summary = (pq.read_table(root / f"{name}.parquet") for name in ("runs", "summary"))
        return Aggregate(*map(columns.frame, (runs, summary, _unreadable(state["unreadable"]))))
    except (*UNREADABLE_BECAUSE, pa.ArrowException):
        return None


def _cached(root: Path) -> dict[Found, Taken]:
    """The entries of an earlier aggregation by record; empty if its cache is outdated or broken."""
    try:
        kept = pq.read_table(root / CACHE, page_checksum_verification=True)
        state = json.loads(kept.schema.metadata[b"moe_lab"])
        as_written = all(
            state["outputs"][name] == list(load.stamp(root / name))
            for name in ("samples.parquet", "coactivation.parquet")
        )
        if state["code"] != _code() or not as_written:
            return {}
        samples = pq.read_table(root / "samples.parquet", columns=list(_ARRAYS), page_checksum_verification=True)
        arrays = {name: samples[name].to_numpy() for name in _ARRAYS}
        ends = np.cumsum(kept["n_samples"].to_numpy())
        result = {}
        for row, stop in zip(kept.to_pylist(), ends.tolist(), strict=True):
            stamps = ((row[f"{file}_ns"], row[f"{file}_bytes"]) for file in ("result", "samples", "routing"))
            entry = Entry(*json.loads(row["entry"])) if row["entry"] is not None else None
            slices = {name: array[stop - row["n_samples"] : stop] for name, array in arrays.items()}
            pairs = coactivation.Rows(row["pairs_batch"], row["pairs_first"], row["n_pairs"])
            problems = [(path, error) for path, error in json.loads(row["problems"])]
            result[Found(row["folder"], *stamps)] = Taken(
                entry, slices, problems, row["entry"], pairs if entry else None, row["pairs_problem"]
            )
            if entry is not None:
                columns.check(entry.row)
    except (*UNREADABLE_BECAUSE, pa.ArrowException):
        return {}
    return result


def _cache_table(
    root: Path,
    inputs: str,
    folders: Sequence[Found],
    taken: Sequence[Taken],
    cells: Sequence[coactivation.Cell],
    problems: Sequence[tuple[str, str]],
) -> Any:
    rows = []
    known = iter(cells)
    for files, record in zip(folders, taken, strict=True):
        text, pairs, problem = None, coactivation.Rows(0, 0, 0), None
        if record.entry is not None:
            text = record.text or _json(record.entry)
            cell = next(known)
            assert cell.rows is not None
            pairs, problem = cell.rows, cell.problem
        stamps = (*files.result, *files.samples, *files.routing)
        numbers = (*stamps, len(record.samples["ms"]), *pairs)
        rows.append((load.printable(files.folder), *numbers, text, _json(record.problems), problem))
    state = {
        "code": _code(),
        "inputs": inputs,
        "outputs": {name: load.stamp(root / name) for name in OUTPUTS},
        "unreadable": problems,
    }
    arrays = [pa.array([row[index] for row in rows], field.type) for index, field in enumerate(_CACHED)]
    return pa.Table.from_arrays(arrays, schema=_CACHED.with_metadata({"moe_lab": json.dumps(state)}))


# ---- writing


def _parquet(table: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def _csv(table: Any) -> bytes:
    """Numbers with all their digits, text in quotes, what is missing empty, lists as JSON; no formulas."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else _json(v) for v in table[index].to_pylist()]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_string(field.type) and pc.any(pc.match_substring_regex(table[index], FORMULA)).as_py():
            texts = [None if v is None else guarded(v) for v in table[index].to_pylist()]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(table, buffer)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
