"""Which experts are used together: `coactivation.parquet`, a row per layer and pair of experts of every cell."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.records import files
from moe_lab.records.store import ROUTING
from moe_lab.results import columns
from moe_lab.results.load import one_line, printable

_ARRAY = "coactivation_LEE"


def read(path: Path) -> tuple[list[int], np.ndarray] | None:
    """(layers, tokens that use both experts [L, E, E]) of a `routing.npz`; None where it has no such counts.

    Raises whatever zipfile, zlib and numpy have for a file that was damaged, `FileNotFoundError` if there is none, and
    `ValueError` for an array of another shape.
    """
    files.require_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        if _ARRAY not in arrays:
            return None
        layers, counts_LEE = arrays["layer"].tolist(), arrays[_ARRAY]
        whole = arrays["layer"].dtype.kind in "iu" and arrays["layer"].ndim == 1
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


def table(root: Path, cells: Sequence[tuple[str, str]]) -> tuple[bytes, list[tuple[str, str]]]:
    """A parquet file of the (folder, cell_id) `cells`, and (path, what is wrong) of the files that cannot be read.

    Pairs with expert <= other that some token used; an expert with itself has the tokens that used it. A row group per
    cell: a model of many layers and experts has millions of pairs, and no two cells are in memory together.
    """
    schema = pa.schema(columns.COACTIVATION.items())
    content, problems = io.BytesIO(), []
    with pq.ParquetWriter(content, schema, write_page_checksum=True) as file:
        for folder, cell_id in cells:
            counts = None
            try:
                counts = read(root / folder / ROUTING)
            except FileNotFoundError:
                pass  # a model without experts, or a cell that failed before
            except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
                problems.append((printable(Path(folder, ROUTING)), one_line(error)))
            if counts is None:
                continue
            layers, counts_LEE = counts
            at_L, expert, other = np.nonzero(np.triu(counts_LEE))
            values = {
                "cell_id": pa.repeat(cell_id, len(at_L)),
                "layer": np.array(layers, np.int64)[at_L],
                "expert": expert,
                "other": other,
                "tokens": counts_LEE[at_L, expert, other].astype(np.int64),
                "directory": pa.repeat(printable(folder), len(at_L)),
            }
            file.write_table(pa.table(values, schema=schema))
    return content.getvalue(), problems
