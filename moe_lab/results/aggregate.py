"""The tables of a sweep's folder, as docs/results-format.md describes them.

Reading is incremental (`kept`): only records whose files have changed are read again. What a change cannot touch is
taken from the tables made before. With nothing changed, nothing is written.
"""

from __future__ import annotations

import gc
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from moe_lab.records import files as reading
from moe_lab.records.store import PLAN, RESULT, ROUTING, SAMPLES, write_atomic
from moe_lab.results import coactivation, columns, kept, load
from moe_lab.results.arrays import Arrays
from moe_lab.results.kept import CACHE, Kept, Samples, Taken
from moe_lab.results.load import UNREADABLE_BECAUSE, Found
from moe_lab.results.spreadsheet import FORMULA, guarded
from moe_lab.results.summary import summarized

OUTPUTS = (
    "runs.parquet",
    "runs.csv",
    "summary.parquet",
    "summary.csv",
    "samples.parquet",
    "coactivation.parquet",
    "unreadable.csv",
)
_ARRAYS = {"replicate": np.int64, "round": np.int64, "order": np.int64, "ms": np.float64, "stamp_s": np.float64}


class Aggregate(NamedTuple):
    """The tables as pandas. `runs["directory"]` is relative to the sweep's folder."""

    runs: pd.DataFrame
    summary: pd.DataFrame
    unreadable: pd.DataFrame


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
    inputs = kept.digest([folders, problems, plan])
    if (before := _unchanged(root, inputs)) is not None:
        return before

    old = kept.read(root)
    try:
        return _update(root, old, folders, plan, inputs, problems)
    except kept.DamagedError:
        return _update(root, kept.NOTHING, folders, plan, inputs, problems)


def _update(
    root: Path, old: Kept, folders: Sequence[Found], plan: load.Plan, inputs: str, found: Sequence[tuple[str, str]]
) -> Aggregate:
    """Write the tables, with what is `old` of them, and return them; `found` are the problems so far."""
    taken = [old.taken.get(record) or _take(root, record) for record in folders]
    known = _known(old, taken)
    cell_ids = iter(known["cell_id"].to_pylist())
    ids = [next(cell_ids) if record.is_row else None for record in taken]
    state: dict[str, Any] = {
        "inputs": inputs,
        "named": kept.digest([plan.compare, *(record.content for record in taken if record.is_row)]),
        "samples": kept.digest([(files.folder, files.samples, id_) for files, id_ in zip(folders, ids, strict=True)]),
        "pairs": kept.digest([(files.folder, files.routing, id_) for files, id_ in zip(folders, ids, strict=True)]),
    }
    pairs = _pairs(root, folders, taken, ids, old if old.is_same("pairs", state) else None)
    problems = [*found, *(problem for record in taken for problem in record.problems)]
    problems += [
        (_path(files, ROUTING), record.pairs_problem)
        for files, record in zip(folders, taken, strict=True)
        if record.pairs_problem is not None
    ]
    runs = _runs(root, known, [record for record in taken if record.is_row], plan, old.is_same("named", state))
    contents = [record.configured() for record in taken if record.is_row] if plan.anchor is not None else []
    summary = summarized(runs, contents, plan)
    unreadable = _unreadable(problems)
    contents_of: dict[str, Callable[[], bytes]] = {
        "runs.parquet": partial(_parquet, runs),
        "runs.csv": partial(_csv, runs),
        "summary.parquet": partial(_parquet, summary),
        "summary.csv": partial(_csv, summary),
        "unreadable.csv": partial(_csv, unreadable),
    }
    if not old.is_same("samples", state):
        contents_of["samples.parquet"] = partial(_parquet, _samples_table(root, old, taken, folders, ids))
    if pairs is not None:
        contents_of["coactivation.parquet"] = lambda: pairs
    with ThreadPoolExecutor(2) as pool:  # Arrow encodes outside of the interpreter's lock
        encoded = [pool.submit(content) for content in contents_of.values()]
        for name, content in zip(contents_of, encoded, strict=True):
            _write(root / name, content.result())
    state["outputs"] = {name: load.stamp(root / name) for name in OUTPUTS}
    state["unreadable"] = problems
    _write(root / CACHE, _parquet(kept.table(folders, taken, known, state)))
    return Aggregate(*map(columns.frame, (runs, summary, unreadable)))


def _known(old: Kept, taken: Sequence[Taken]) -> Any:
    """A row for each record that can be read, with the columns that every table has."""
    new = [record.row for record in taken if record.row is not None]
    values = zip(*new, strict=True) if new else ([] for _ in columns.KNOWN)
    arrays = (pa.array(of_all, kind) for of_all, kind in zip(values, columns.KNOWN.values(), strict=True))
    table = pa.table(dict(zip(columns.KNOWN, arrays, strict=True)))
    if not old.known.num_rows:
        return table
    places, at = [], old.known.num_rows
    for record in taken:
        if record.is_row:
            places.append(at if record.place is None else record.place)
            at += record.place is None
    return pa.concat_tables([old.known, table]).combine_chunks().take(pa.array(places, pa.int64()))


def _runs(root: Path, known: Any, taken: Sequence[Taken], plan: load.Plan, is_named: bool) -> Any:
    """The table `runs`. With the same configurations as before, what tells them apart is in the earlier table."""
    cell_ids = known["cell_id"].to_pylist()
    copies = Counter(cell_ids)
    arrays = {name: known[name] for name in known.column_names}
    arrays["n_records"] = pa.array([copies[cell_id] for cell_id in cell_ids], columns.INT)
    others: list[dict[str, Any]] = [{} if record.others == "{}" else json.loads(record.others) for record in taken]
    if is_named:
        names = pq.read_schema(root / "runs.parquet").names
        wanted = [name for name in names if name in ("variant", "setting_id") or name.startswith("config.")]
        before = columns.as_written(
            pq.read_table(root / "runs.parquet", columns=wanted, page_checksum_verification=True)
        )
        arrays |= {name: before[name] for name in wanted}
    else:
        told = load.told_apart([record.configured() for record in taken], plan)
        arrays["variant"] = pa.array([one.variant for one in told], columns.TEXT)
        arrays["setting_id"] = pa.array([one.setting_id for one in told], columns.TEXT)
        others = [{**other, **one.differing} for other, one in zip(others, told, strict=True)]
    return columns.joined(arrays, others)


def _unreadable(problems: Sequence[Sequence[str]]) -> Any:
    rows = [dict(zip(columns.UNREADABLE, problem, strict=True)) for problem in problems]
    return columns.table(rows, columns.UNREADABLE)


def _take(root: Path, files: Found) -> Taken:
    problems: list[tuple[str, str]] = []
    try:
        row, content = load.read(root, files.folder)
    except UNREADABLE_BECAUSE as error:
        return Taken(problems=[(_path(files, RESULT), load.one_line(error))])
    samples = None
    if files.samples[1] >= 0:
        try:
            samples = read_samples(reading.read_bytes(f"{root}/{files.folder}/{SAMPLES}", reading.MOST_TEXT_BYTES))
        except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
            problems.append((_path(files, SAMPLES), load.one_line(error)))
    others = {name: row[name] for name in row.keys() - columns.KNOWN.keys()}
    return Taken(
        problems=problems,
        row=tuple(map(row.get, columns.KNOWN)),
        others=kept.as_json(others) if others else "{}",
        content=None if content is None else kept.as_json(content),
        parsed=content,
        samples=samples,
        n_samples=0 if samples is None else len(samples["ms"]),
    )


def _pairs(
    root: Path, folders: Sequence[Found], taken: list[Taken], ids: Sequence[str | None], same: Kept | None
) -> bytes | None:
    """The table of the pairs of experts, None if it is the `same` as before; `taken` learns of its rows."""
    at = [place for place, record in enumerate(taken) if record.is_row]
    content = None
    if same is not None:
        before = {files.folder: record for files, record in same.taken.items()}
        cells = [before[folders[place].folder] for place in at]
        known = [(cell.pairs, cell.pairs_problem) for cell in cells]
    else:
        asked = [(folders[place].folder, str(ids[place]), taken[place]) for place in at]
        made = _pairs_table(
            root, [coactivation.Cell(folder, id_, one.pairs, one.pairs_problem) for folder, id_, one in asked]
        )
        content, known = made.content, [(cell.rows, cell.problem) for cell in made.cells]
    for place, (rows, problem) in zip(at, known, strict=True):
        taken[place] = taken[place]._replace(pairs=rows, pairs_problem=problem)
    return content


def _pairs_table(root: Path, cells: Sequence[coactivation.Cell]) -> coactivation.Table:
    """With what the earlier table has; if that is damaged, without it."""
    if any(cell.rows is not None for cell in cells):
        try:
            return coactivation.table(root, cells, coactivation.Earlier(root / "coactivation.parquet"))
        except (*UNREADABLE_BECAUSE, pa.ArrowException):
            pass
    return coactivation.table(root, cells)


def _path(files: Found, name: str) -> str:
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
        if array.ndim != 1 or not _can_become(array.dtype, dtype):
            raise ValueError(f"{name} of {array.dtype} {list(array.shape)}: must be a list of {np.dtype(dtype)}.")
        samples[name] = array.astype(dtype, copy=False)
    samples.setdefault("replicate", np.zeros(len(samples["ms"]), np.int64))
    if len({len(array) for array in samples.values()}) > 1:
        raise ValueError(f"arrays of different length: { {name: len(array) for name, array in samples.items()} }.")
    return samples


@lru_cache(maxsize=64)
def _can_become(kind: np.dtype[Any], wanted: type) -> bool:
    return np.can_cast(kind, wanted, "same_kind")


def _samples_table(
    root: Path, old: Kept, taken: Sequence[Taken], folders: Sequence[Found], ids: Sequence[str | None]
) -> Any:
    before = old.samples(root, list(_ARRAYS))
    none = {name: np.empty(0, dtype) for name, dtype in _ARRAYS.items()}
    parts = []
    for record in taken:
        if record.first_sample is not None:
            rows = slice(record.first_sample, record.first_sample + record.n_samples)
            parts.append({name: before[name][rows] for name in _ARRAYS})
        else:
            parts.append(record.samples or none)
    of_cell = pa.array(np.repeat(np.arange(len(taken), dtype=np.int32), [record.n_samples for record in taken]))
    arrays = {name: pa.array(np.concatenate([none[name], *(part[name] for part in parts)])) for name in _ARRAYS}
    paths = [load.printable(files.folder) for files in folders]
    for name, values in (("cell_id", ids), ("directory", paths)):
        texts = pa.array(values, pa.string())
        arrays[name] = pa.DictionaryArray.from_arrays(of_cell, texts).cast(pa.string())
    return pa.table({name: arrays[name] for name in columns.SAMPLES})


def _unchanged(root: Path, inputs: str) -> Aggregate | None:
    """The existing tables, if they were made from these inputs by this code and have not changed since."""
    try:
        for name in (CACHE, "runs.parquet", "summary.parquet"):
            reading.require_plain(root / name, None)
        state = kept.state_of(pq.read_schema(root / CACHE))
        outputs = {name: list(load.stamp(root / name)) for name in OUTPUTS}
        if (state["inputs"], state["outputs"]) != (inputs, outputs):
            return None
        runs, summary = (pq.read_table(root / f"{name}.parquet") for name in ("runs", "summary"))
        return Aggregate(*map(columns.frame, (runs, summary, _unreadable(state["unreadable"]))))
    except (*UNREADABLE_BECAUSE, pa.ArrowException):
        return None


# ---- writing


def _parquet(table: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def _csv(table: Any) -> bytes:
    """Numbers with all their digits, text in quotes, what is missing empty, lists as JSON; no formulas."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else kept.as_json(v) for v in table[index].to_pylist()]
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
