"""The tables of a sweep's folder, as docs/results-format.md describes them.

Reading is incremental: `.aggregate.parquet` keeps what was taken from each record, with the time stamp and size of its
files, and is ignored where it does not fit. With nothing changed, nothing is written. The pairs of experts alone are
read anew from all records when anything has changed: they may be too many to keep.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from moe_lab.records import files as reading
from moe_lab.records.identity import PACKAGE
from moe_lab.records.store import PLAN, RESULT, ROUTING, SAMPLES, write_atomic
from moe_lab.results import coactivation, columns, load
from moe_lab.results.load import UNREADABLE_BECAUSE, Entry, Found
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
        *((name, pa.int64()) for name in ("result_ns", "result_bytes", "samples_ns", "samples_bytes", "n_samples")),
        *((name, pa.string()) for name in ("entry", "problems")),
    ]
)
_ARRAYS = {"replicate": np.int64, "round": np.int64, "order": np.int64, "ms": np.float64, "stamp_s": np.float64}

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


def aggregate(directory: str | Path) -> Aggregate:
    """Write the tables of the records under `directory` into it, and return them.

    A record that cannot be read is listed in `unreadable`; the others are still read.

    Raises:
        ValueError: the folder does not exist.
        OSError: a table cannot be written; the error names it, and the earlier table is unchanged.
    """
    root = load.folder(directory)
    folders, problems = load.search(root)
    try:
        plan = load.read_plan(root)
    except UNREADABLE_BECAUSE as error:
        plan = load.Plan()
        problems.append((PLAN, f"ignored: {load.one_line(error)}"))
    routings = [load.stamp(f"{root}/{record.folder}/{ROUTING}") for record in folders]
    inputs = hashlib.sha256(json.dumps([folders, routings, problems, plan]).encode()).hexdigest()
    if (before := _unchanged(root, inputs)) is not None:
        return before

    cached = _cached(root)
    taken = [cached.get(record) or _take(root, record) for record in folders]
    problems += [problem for record in taken for problem in record.problems]
    cells = [
        (files.folder, record.entry.row["cell_id"])
        for files, record in zip(folders, taken, strict=True)
        if record.entry
    ]
    pairs, damaged = coactivation.table(root, cells)
    problems += damaged
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
    _write(root / "coactivation.parquet", pairs)
    _write(root / CACHE, _parquet(_cache_table(root, inputs, folders, taken, problems)))
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
            samples = read_samples(reading.read_bytes(f"{root}/{files.folder}/{SAMPLES}", reading.MOST_TEXT_BYTES))
        except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
            problems.append((_path(files, SAMPLES), load.one_line(error)))
    return Taken(entry, samples, problems)


def _path(files: Found, name: str) -> str:
    return load.printable(Path(files.folder, name))


def _no_samples() -> Samples:
    return {name: np.empty(0, dtype) for name, dtype in _ARRAYS.items()}


def read_samples(content: bytes) -> Samples:
    """The arrays of a `samples.npz`; `replicate` is 0 where an older one lacks it.

    `np.load` spends most of its time on parsing the arrays' headers, which are the same in most files; here each is
    parsed once. Raises `ValueError`, or an error of zipfile, zlib or numpy, if these are not such arrays.
    """
    samples: Samples = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        there = set(archive.namelist())
        if sum(member.file_size for member in archive.infolist()) > reading.MOST_TEXT_BYTES:
            raise ValueError(f"unpacked larger than {reading.MOST_TEXT_BYTES >> 20} MiB.")
        for name, dtype in _ARRAYS.items():
            if name == "replicate" and "replicate.npy" not in there:
                continue
            data = archive.read(f"{name}.npy")
            if data[:8] != b"\x93NUMPY\x01\x00":
                raise ValueError(f"{name} is not an array.")
            start = 10 + int.from_bytes(data[8:10], "little")
            shape, kind = _array_header(data[8:start])
            array = np.frombuffer(data, kind, offset=start)  # a ValueError for Python objects: nothing is unpickled
            if len(shape) != 1 or array.shape != shape or not np.can_cast(kind, dtype, "same_kind"):
                raise ValueError(f"{name} of {kind} {list(shape)}: must be a list of {np.dtype(dtype)}.")
            samples[name] = array.astype(dtype, copy=False)
    samples.setdefault("replicate", np.zeros(len(samples["ms"]), np.int64))
    if len({len(array) for array in samples.values()}) > 1:
        raise ValueError(f"arrays of different length: { {name: len(array) for name, array in samples.items()} }.")
    return samples


@lru_cache(maxsize=1024)
def _array_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, _, kind = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return shape, kind


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
        for name in (CACHE, "runs.parquet", "summary.parquet"):
            reading.require_plain(root / name, None)
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
        for name in (CACHE, "samples.parquet"):
            reading.require_plain(root / name, None)
        kept = pq.read_table(root / CACHE, page_checksum_verification=True)
        state = json.loads(kept.schema.metadata[b"moe_lab"])
        samples_as_written = state["outputs"]["samples.parquet"] == list(load.stamp(root / "samples.parquet"))
        if state["code"] != _code() or not samples_as_written:
            return {}
        samples = pq.read_table(root / "samples.parquet", columns=list(_ARRAYS), page_checksum_verification=True)
        arrays = {name: samples[name].to_numpy() for name in _ARRAYS}
        ends = np.cumsum(kept["n_samples"].to_numpy())
        result = {}
        for row, stop in zip(kept.to_pylist(), ends.tolist(), strict=True):
            found = Found(
                row["folder"], (row["result_ns"], row["result_bytes"]), (row["samples_ns"], row["samples_bytes"])
            )
            entry = Entry(*json.loads(row["entry"])) if row["entry"] is not None else None
            slices = {name: array[stop - row["n_samples"] : stop] for name, array in arrays.items()}
            result[found] = Taken(entry, slices, [(path, error) for path, error in json.loads(row["problems"])])
            if entry is not None:
                columns.check(entry.row)
    except (*UNREADABLE_BECAUSE, pa.ArrowException):
        return {}
    return result


def _cache_table(
    root: Path, inputs: str, folders: Sequence[Found], taken: Sequence[Taken], problems: Sequence[tuple[str, str]]
) -> Any:
    rows = [
        (
            *(load.printable(files.folder), *files.result, *files.samples, len(record.samples["ms"])),
            json.dumps(record.entry, ensure_ascii=False) if record.entry else None,
            json.dumps(record.problems),
        )
        for files, record in zip(folders, taken, strict=True)
    ]
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
    """Numbers with all their digits, text in quotes, what is missing empty, lists as JSON."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in table[index].to_pylist()]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(table, buffer)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
