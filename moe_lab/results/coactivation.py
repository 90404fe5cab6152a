"""Which experts are used together: `coactivation.parquet`, a row per layer and pair of experts of every cell."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.records.store import ROUTING
from moe_lab.results import columns
from moe_lab.results.arrays import Arrays
from moe_lab.results.load import one_line, printable

_ARRAY = "coactivation_LEE"
_SCHEMA = pa.schema(columns.COACTIVATION.items())
_BATCH = 200_000  # rows: as many cells as have them are written together

Numbers = dict[str, "np.ndarray[Any, Any]"]
_NONE: Numbers = {name: np.empty(0, np.int64) for name in ("layer", "expert", "other", "tokens")}


def read(path: Path) -> tuple[list[int], np.ndarray] | None:
    """(layers, tokens that use both experts [L, E, E]) of a `routing.npz`; None where it has no such counts.

    Raises whatever zipfile, zlib and numpy have for a file that was damaged, `FileNotFoundError` if there is none, and
    `ValueError` for an array of another shape.
    """
    with open(path, "rb") as file:
        arrays = Arrays(file.read())
    if _ARRAY not in arrays:
        return None
    layer, counts_LEE = arrays["layer"], arrays[_ARRAY]
    layers = layer.tolist()
    whole = layer.dtype.kind in "iu" and layer.ndim == 1
    E = counts_LEE.shape[-1] if counts_LEE.ndim else 0
    if not whole or counts_LEE.dtype.kind not in "iu" or counts_LEE.shape != (len(layers), E, E) or not counts_LEE.size:
        raise ValueError(
            f"{_ARRAY} of {counts_LEE.dtype} {list(counts_LEE.shape)}: not counts by layer and pair of experts"
        )
    return layers, counts_LEE


def given(counts_EE: np.ndarray) -> np.ndarray:
    """Of the tokens that use the row's expert, the share that use the column's too; NaN for an expert with itself.

    The co-activation of OLMoE (2409.02060, section 5.2), over all pairs. A row without tokens is 0.
    """
    own_E1 = np.maximum(counts_EE.diagonal(), 1)[:, None]
    share_EE: np.ndarray = counts_EE / own_E1
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


class Rows(NamedTuple):
    """Which rows of the table are a cell's."""

    batch: int
    first: int
    n_rows: int


class Cell(NamedTuple):
    """A cell of the table: its folder, and what is known of its file, if that was read before."""

    folder: str
    cell_id: str
    rows: Rows | None = None
    problem: str | None = None


class Table(NamedTuple):
    """A parquet file, and what is now known of each cell."""

    content: bytes
    cells: list[Cell]


class Earlier:
    """The numbers of cells in a table made before, one batch in memory at a time."""

    def __init__(self, path: Path):
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        self._batch, self._numbers = -1, _NONE

    def numbers(self, rows: Rows) -> Numbers:
        """Raises an error of pyarrow, or a ValueError, where they are not there."""
        if rows.batch != self._batch:
            table = self._file.read_row_group(rows.batch, columns=list(_NONE))
            self._batch, self._numbers = rows.batch, {name: table[name].to_numpy() for name in _NONE}
        found = {name: array[rows.first : rows.first + rows.n_rows] for name, array in self._numbers.items()}
        if len(found["tokens"]) != rows.n_rows:
            raise ValueError("rows are missing")
        return found


def table(root: Path, cells: Sequence[Cell], earlier: Earlier | None = None) -> Table:
    """The table of `cells`. What is known of their rows is taken from the `earlier` one; other files are read.

    Pairs with expert <= other that some token used; an expert with itself has the tokens that used it. Cells are
    written in batches, a row group each: a model of many layers and experts has millions of pairs, and not all are in
    memory together.
    """
    content, known = io.BytesIO(), []
    with pq.ParquetWriter(content, _SCHEMA, write_page_checksum=True) as file:
        batch: list[tuple[Cell, Numbers]] = []
        n_batches, n_rows = 0, 0
        for cell in cells:
            numbers, problem = _NONE, cell.problem
            if cell.rows is None or earlier is None:
                numbers, problem = _numbers(root / cell.folder / ROUTING)
            elif cell.rows.n_rows:
                numbers = earlier.numbers(cell.rows)
            count = len(numbers["tokens"])
            known.append(cell._replace(rows=Rows(n_batches, n_rows, count), problem=problem))
            if count:
                batch.append((cell, numbers))
                n_rows += count
            if n_rows >= _BATCH:
                _write(file, batch)
                batch, n_batches, n_rows = [], n_batches + 1, 0
        if batch:
            _write(file, batch)
    return Table(content.getvalue(), known)


def _numbers(path: Path) -> tuple[Numbers, str | None]:
    """The rows of a file, and what is wrong with it."""
    try:
        counts = read(path)
    except FileNotFoundError:
        counts = None  # a model without experts, or a cell that failed before
    except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
        return _NONE, one_line(error)
    if counts is None:
        return _NONE, None
    layers, counts_LEE = counts
    at_L, expert, other = np.nonzero(np.triu(counts_LEE))
    layer, tokens = np.array(layers, np.int64)[at_L], counts_LEE[at_L, expert, other].astype(np.int64)
    return {"layer": layer, "expert": expert, "other": other, "tokens": tokens}, None


def _write(file: Any, batch: Sequence[tuple[Cell, Numbers]]) -> None:
    counts = [len(numbers["tokens"]) for _, numbers in batch]
    of_cell = pa.array(np.repeat(np.arange(len(batch), dtype=np.int32), counts))
    texts = {"cell_id": [cell.cell_id for cell, _ in batch], "directory": [printable(cell.folder) for cell, _ in batch]}
    columns_: dict[str, Any] = {name: np.concatenate([numbers[name] for _, numbers in batch]) for name in _NONE}
    for name, values in texts.items():
        columns_[name] = pa.DictionaryArray.from_arrays(of_cell, pa.array(values, pa.string())).cast(pa.string())
    file.write_table(pa.table(columns_, schema=_SCHEMA), row_group_size=sum(counts))
