"""Which experts are used together: `coactivation.parquet`, a row per layer and pair of experts of every cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_lab.records.store import ROUTING
from moe_lab.results import columns
from moe_lab.results.load import one_line, printable

_ARRAY = "coactivation_LEE"


def read(path: Path) -> tuple[list[int], np.ndarray] | None:
    """(layers, tokens that use both experts [L, E, E]) of a `routing.npz`; None where it has no such counts.

    Raises whatever zipfile, zlib and numpy have for a file that was damaged, `FileNotFoundError` if there is none, and
    `ValueError` for an array of another shape.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if _ARRAY not in arrays:
            return None
        layers, counts_LEE = arrays["layer"].tolist(), arrays[_ARRAY]
    L, E = len(layers), counts_LEE.shape[-1] if counts_LEE.ndim else 0
    if counts_LEE.dtype.kind not in "iu" or counts_LEE.shape != (L, E, E):
        raise ValueError(f"{_ARRAY} of {counts_LEE.dtype} {list(counts_LEE.shape)}: no counts by layer and pair")
    return layers, counts_LEE


def given(counts_EE: np.ndarray) -> np.ndarray:
    """Of the tokens that use the row's expert, the share that use the column's too; NaN for an expert with itself.

    The co-activation of OLMoE (2409.02060, section 5.2), over all pairs. A row without tokens is 0.
    """
    own_E1 = np.maximum(counts_EE.diagonal(), 1)[:, None]
    share_EE: np.ndarray = counts_EE / own_E1
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


def table(root: Path, cells: Sequence[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    """The `pyarrow.Table` of (folder, cell_id) `cells`, and (path, what is wrong) of the files that cannot be read.

    Pairs with expert <= other that some token used; an expert with itself has the tokens that used it.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("layer", "expert", "other", "tokens")}
    lengths, problems = [], []
    for folder, _ in cells:
        found = None
        try:
            found = read(root / folder / ROUTING)
        except FileNotFoundError:
            pass  # a model without experts, or a cell that failed before
        except Exception as error:  # zipfile, zlib and numpy have many, and none of them may stop the others
            problems.append((printable(Path(folder, ROUTING)), one_line(error)))
        if found is None:
            lengths.append(0)
            continue
        layers, counts_LEE = found
        at_L, expert, other = np.nonzero(np.triu(counts_LEE))
        lengths.append(len(at_L))
        values = (np.array(layers)[at_L], expert, other, counts_LEE[at_L, expert, other])
        for name, value in zip(parts, values, strict=True):
            parts[name].append(value.astype(np.int64))
    nothing = np.empty(0, np.int64)
    arrays = {name: pa.array(np.concatenate([nothing, *of_cells])) for name, of_cells in parts.items()}
    of_cell = pa.array(np.repeat(np.arange(len(cells), dtype=np.int32), lengths))
    for at, name in enumerate(("directory", "cell_id")):
        texts = pa.array([printable(cell[at]) for cell in cells], pa.string())
        arrays[name] = pa.DictionaryArray.from_arrays(of_cell, texts).cast(pa.string())
    return pa.table({name: arrays[name] for name in columns.COACTIVATION}), problems
