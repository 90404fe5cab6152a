"""results/coactivation.py: pairs of experts as a table, and as shares."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import moe_lab
from moe_lab.records.trace import Trace
from moe_lab.results import coactivation, columns
from moe_lab.results.aggregate import aggregate
from tests import tiny

PAIRS_LEE = np.array([[[3, 2, 0], [2, 4, 1], [0, 1, 1]], [[0, 0, 0], [0, 2, 2], [0, 2, 2]]])


def cell(root: Path, name: str, **arrays: np.ndarray) -> coactivation.Cell:
    """A cell's folder with these arrays."""
    (root / name).mkdir()
    np.savez(root / name / "routing.npz", **arrays)
    return coactivation.Cell(name, name * 3)


def test_the_table_has_every_pair_once(tmp_path: Path) -> None:
    """With the index of the layer in the model; pairs that nobody used are left out."""
    cells = [cell(tmp_path, "a", layer=np.array([1, 4]), coactivation_LEE=PAIRS_LEE), coactivation.Cell("missing", "m")]
    content, known = coactivation.table(tmp_path, cells)
    table = pq.read_table(io.BytesIO(content))
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [
        ("aaa", 1, 0, 0, 3, "a"),
        ("aaa", 1, 0, 1, 2, "a"),
        ("aaa", 1, 1, 1, 4, "a"),
        ("aaa", 1, 1, 2, 1, "a"),
        ("aaa", 1, 2, 2, 1, "a"),
        ("aaa", 4, 1, 1, 2, "a"),
        ("aaa", 4, 1, 2, 2, "a"),
        ("aaa", 4, 2, 2, 2, "a"),
    ]
    assert not any(cell.problem for cell in known) and table.column_names == list(columns.COACTIVATION)


@pytest.mark.parametrize(
    ("layer", "pairs"),
    [
        pytest.param([0], np.zeros((1, 3, 4), int), id="not square"),
        pytest.param([0, 1], PAIRS_LEE[:1], id="a layer short"),
        pytest.param([0, 1], PAIRS_LEE.astype(float), id="floats"),
        pytest.param([0], np.array(3), id="a number"),
        pytest.param([], np.zeros((0, 3, 3), int), id="no layers"),
        pytest.param(["a", "b"], PAIRS_LEE, id="layers of text"),
        pytest.param([[0, 1], [2, 3]], PAIRS_LEE, id="a table of layers"),
        pytest.param([0.5, 1.5], PAIRS_LEE, id="broken layers"),
    ],
)
def test_a_damaged_array_is_named_and_stops_nothing(tmp_path: Path, layer: list[Any], pairs: np.ndarray) -> None:
    """The other cells are there."""
    cells = [
        cell(tmp_path, "bad", layer=np.array(layer), coactivation_LEE=pairs),
        cell(tmp_path, "good", layer=np.array([0, 1]), coactivation_LEE=PAIRS_LEE),
        cell(tmp_path, "older", layer=np.array([0])),
    ]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "routing.npz").write_bytes(b"PK\x03\x04 cut off")
    content, known = coactivation.table(tmp_path, [*cells, coactivation.Cell("cut", "c")])
    table = pq.read_table(io.BytesIO(content))
    assert set(table["directory"].to_pylist()) == {"good"}
    assert [cell.folder for cell in known if cell.problem] == ["bad", "cut"]


def test_what_is_known_is_taken_from_the_earlier_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of any size; the bytes are those of a new table, and files are not opened."""
    arrays = {"layer": np.array([0, 1]), "coactivation_LEE": PAIRS_LEE}
    cells = [cell(tmp_path, name, **arrays) for name in "abcde"] + [coactivation.Cell("missing", "m")]
    (tmp_path / "c" / "routing.npz").write_bytes(b"PK\x03\x04 cut off")
    for size in (1, 9, 10**6):
        monkeypatch.setattr(coactivation, "_BATCH", size)
        first = coactivation.table(tmp_path, cells)
        (tmp_path / "earlier").write_bytes(first.content)
        earlier = coactivation.Earlier(tmp_path / "earlier")
        assert coactivation.table(tmp_path / "nowhere", first.cells, earlier) == first
        fewer = [known for known in first.cells if known.folder != "b"]
        again = coactivation.table(tmp_path, [*fewer, *cells[1:2]], earlier)
        new = coactivation.table(tmp_path, [known._replace(rows=None, problem=None) for known in [*fewer, cells[1]]])
        assert again == new and again.cells[1].problem is not None
    damaged = first.cells[0]._replace(rows=coactivation.Rows(0, 20, 30))
    with pytest.raises(ValueError, match="rows are missing"):
        coactivation.table(tmp_path, [damaged], earlier)


def test_a_damaged_file_leaves_every_table(tmp_path: Path) -> None:
    """It is listed as unreadable, until it is mended."""
    for name in ("one", "two"):
        moe_lab.run(tiny.moe_layer(f"seed={len(name)}", f"batch={2 if name == 'one' else 1}"), tmp_path / name)
    whole = (tmp_path / "one" / "routing.npz").read_bytes()
    (tmp_path / "one" / "routing.npz").write_bytes(whole[:200])
    found = aggregate(tmp_path)
    assert len(found.runs) == 2 and found.unreadable["path"].tolist() == ["one/routing.npz"]
    assert set(pq.read_table(tmp_path / "coactivation.parquet")["directory"].to_pylist()) == {"two"}
    (tmp_path / "one" / "routing.npz").write_bytes(whole)
    assert aggregate(tmp_path).unreadable.empty
    assert set(pq.read_table(tmp_path / "coactivation.parquet")["directory"].to_pylist()) == {"one", "two"}


def test_shares_are_of_the_rows_own_tokens() -> None:
    """Not symmetric; an expert with itself says nothing, one without tokens shares none."""
    share_EE = coactivation.given(np.array([[4, 1, 0], [1, 2, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(share_EE, [[np.nan, 0.25, 0], [0.5, np.nan, 0], [0, 0, np.nan]])


def test_the_pairs_of_a_run_are_those_of_its_routes(tmp_path: Path) -> None:
    """Counted again from the recorded ids, through the files that a user reads."""
    moe_lab.run(tiny.decoder_moe("measure.record_routing=true"), tmp_path / "cell")
    assert aggregate(tmp_path).unreadable.empty
    with Trace(tmp_path / "cell" / "routes.trace") as trace:
        ids_LTK = [trace.ids(layer) for layer in range(len(trace.layers))]
    found = {
        (row["layer"], row["expert"], row["other"]): row["tokens"]
        for row in pq.read_table(tmp_path / "coactivation.parquet").to_pylist()
    }
    counted: dict[tuple[int, int, int], int] = {}
    for layer, ids_TK in enumerate(ids_LTK):
        for ids in ids_TK.tolist():
            for one in ids:
                for other in ids:
                    if one <= other:
                        counted[layer, one, other] = counted.get((layer, one, other), 0) + 1
    assert found == counted
