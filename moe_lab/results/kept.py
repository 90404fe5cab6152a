"""What an aggregation keeps of each record for the next one, in `.aggregate.parquet`.

A row for each record's folder: time stamps and sizes of its files, the columns of its row in the tables, and where its
samples and pairs of experts are in theirs. Its metadata say which code made it and what the tables were made from. It
is ignored where it does not fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.records import files
from moe_lab.records.identity import PACKAGE
from moe_lab.results import columns, load
from moe_lab.results.coactivation import Rows
from moe_lab.results.load import UNREADABLE_BECAUSE, Found

CACHE = ".aggregate.parquet"
_FILES = ("result", "samples", "routing")
_SCHEMA = pa.schema(
    [
        (".folder", pa.string()),
        *((f".{file}_{what}", pa.int64()) for file in _FILES for what in ("ns", "bytes")),
        (".is_row", pa.bool_()),
        *((f".{name}", pa.int64()) for name in ("n_samples", "pairs_batch", "pairs_first", "n_pairs")),
        *((f".{name}", pa.string()) for name in ("problems", "pairs_problem", "others", "content")),
        *columns.KNOWN.items(),
    ]
)
_OWN = [name for name in _SCHEMA.names if name.startswith(".")]

Samples = dict[str, "np.ndarray[Any, Any]"]

as_json = json.JSONEncoder(ensure_ascii=False).encode


class DamagedError(Exception):
    """A table made before is not what was written."""


class Taken(NamedTuple):
    """What was taken from a record's folder: now, or by an earlier aggregation."""

    problems: list[tuple[str, str]]
    """(path, what is wrong)."""
    row: tuple[Any, ...] | None = None
    """Taken now: the values of `columns.KNOWN`; None if the record cannot be read."""
    place: int | None = None
    """Taken before: the row of `Kept.known`."""
    others: str = "{}"
    """JSON of the columns that only some records have."""
    content: str | None = None
    """JSON of `identity.content` of its configuration; None where it has none (it failed before it was composed)."""
    parsed: Mapping[str, Any] | None = None
    """The same, of a record taken now."""
    samples: Samples | None = None
    first_sample: int | None = None
    """Taken before: the first row in the earlier table of samples."""
    n_samples: int = 0
    pairs: Rows | None = None
    pairs_problem: str | None = None

    def configured(self) -> Mapping[str, Any] | None:
        """`content`, parsed."""
        if self.parsed is not None or self.content is None:
            return self.parsed
        found: dict[str, Any] = json.loads(self.content)
        return found

    @property
    def is_row(self) -> bool:
        """Whether the record could be read."""
        return self.row is not None or self.place is not None


class Kept(NamedTuple):
    """What an earlier aggregation took, and from what it made its tables."""

    taken: Mapping[Found, Taken]
    known: Any
    """A row for each record that could be read, with the columns `columns.KNOWN`."""
    state: Mapping[str, Any]

    def is_same(self, name: str, state: Mapping[str, Any]) -> bool:
        """Whether what is called so would be made from the same things as before."""
        return bool(self.state.get(name) == state[name])

    def samples(self, root: Path, names: list[str]) -> Samples:
        """The columns of the earlier table of samples; of none, if nothing was kept."""
        if not self.taken:
            return {}
        table = earlier(root / "samples.parquet", names)
        return {name: table[name].to_numpy() for name in names}


NOTHING = Kept({}, pa.schema(columns.KNOWN.items()).empty_table(), {})


def earlier(path: Path, names: list[str] | None = None) -> Any:
    """Columns of a table made before. Raises `DamagedError`."""
    try:
        files.require_plain(path, None)
        return columns.as_written(pq.read_table(path, columns=names, page_checksum_verification=True))
    except (*UNREADABLE_BECAUSE, pa.ArrowException) as error:
        raise DamagedError(path) from error


def digest(value: Any) -> str:
    """Hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@cache
def _code() -> str:
    """Hash of what decides how a record becomes a row."""
    hashed = hashlib.sha256()
    for path in sorted(file for part in ("records", "results") for file in (PACKAGE / part).glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def state_of(schema: Any) -> dict[str, Any]:
    """What a cache says of itself. Raises `ValueError` if other code made it."""
    state: dict[str, Any] = json.loads(schema.metadata[b"moe_lab"])
    if state["code"] != _code():
        raise ValueError("made by other code")
    return state


def read(root: Path) -> Kept:
    """What the earlier aggregation of a folder kept; `NOTHING` if it is outdated or broken."""
    try:
        files.require_plain(root / CACHE, None)
        table = pq.read_table(root / CACHE, page_checksum_verification=True)
        state = state_of(table.schema)
        if not table.schema.equals(_SCHEMA) or state["n_records"] != table.num_rows:
            return NOTHING
        for name in ("runs.parquet", "samples.parquet", "coactivation.parquet"):
            if state["outputs"][name] != list(load.stamp(root / name)):
                return NOTHING
        n_samples = table[".n_samples"].to_numpy()
        firsts = (np.cumsum(n_samples) - n_samples).tolist()
        taken, place = {}, 0
        for first, own in zip(firsts, zip(*(table[name].to_pylist() for name in _OWN), strict=True), strict=True):
            folder, *stamps, is_row, n, batch, pair, n_pairs, problems, pairs_problem, others, content = own
            taken[Found(folder, *zip(stamps[::2], stamps[1::2], strict=True))] = Taken(
                problems=[(path, error) for path, error in json.loads(problems)] if problems != "[]" else [],
                place=place if is_row else None,
                others=others,
                content=content,
                first_sample=first,
                n_samples=n,
                pairs=Rows(batch, pair, n_pairs) if is_row else None,
                pairs_problem=pairs_problem,
            )
            place += is_row
        known = table.filter(table[".is_row"]).select(list(columns.KNOWN))
        return Kept(taken, columns.as_written(known), state)
    except (*UNREADABLE_BECAUSE, pa.ArrowException):
        return NOTHING


def table(folders: Sequence[Found], taken: Sequence[Taken], known: Any, state: Mapping[str, Any]) -> Any:
    """What is to be kept, as a table."""
    rows = []
    for found, record in zip(folders, taken, strict=True):
        stamps = (*found.result, *found.samples, *found.routing)
        pairs = record.pairs or Rows(0, 0, 0)
        texts = (as_json(record.problems), record.pairs_problem, record.others, record.content)
        rows.append((load.printable(found.folder), *stamps, record.is_row, record.n_samples, *pairs, *texts))
    arrays = [pa.array([row[index] for row in rows], _SCHEMA.field(name).type) for index, name in enumerate(_OWN)]
    place, places = 0, []
    for record in taken:
        places.append(place if record.is_row else None)
        place += record.is_row
    spread = known.take(pa.array(places, pa.int64()))
    metadata = {"moe_lab": json.dumps({**state, "code": _code(), "n_records": len(taken)})}
    return pa.table([*arrays, *spread.columns], schema=_SCHEMA.with_metadata(metadata))
