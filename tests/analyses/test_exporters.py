"""analyses/exporters.py and analyses/parquet.py: what is written is what the importers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.analyses import exporters, parquet
from moe_lab.analyses.importers import Asked, convert
from moe_lab.records.trace import COLUMNS, GUESSES, Layer, Trace, TraceWriter, tokens_of
from tests.records.test_trace import E, K, routes, written


def arrays_of(trace: Trace, index: int, name: str) -> np.ndarray:
    return np.concatenate(list(trace.pieces_of(index, name)))


def require_same(trace: Trace, again: Trace, top_k: int) -> None:
    """All columns are equal; in the second trace used slots are at the front, and rows `top_k` wide."""
    assert [layer.layer for layer in again.layers] == [layer.layer for layer in trace.layers]
    for name in ("sequence", "position", "phase", "token"):
        assert np.array_equal(getattr(again.tokens(), name), getattr(trace.tokens(), name))
    names, names_again = np.array([*trace.domains, ""]), np.array([*again.domains, ""])
    assert np.array_equal(names[trace.tokens().domain], names_again[again.tokens().domain])
    assert set(again.columns) == set(trace.columns) and again.token_columns == trace.token_columns
    for name in trace.token_columns:
        assert np.array_equal(again.of_tokens(name), trace.of_tokens(name))
    for index in range(len(trace.layers)):
        ids_TK = trace.ids(index)
        for name in ("expert_ids", *trace.columns):
            values, values_again = arrays_of(trace, index, name), arrays_of(again, index, name)
            if name in ("margin", "logits"):
                assert np.array_equal(values, values_again, equal_nan=True)
                continue
            fill = 0 if name == "weights" else -1
            used = (values if name in GUESSES else ids_TK) >= 0
            for row, row_again, used_K in zip(values, values_again, used, strict=True):
                wanted = row[used_K].tolist()
                assert row_again.tolist() == wanted + [fill] * (len(row_again) - len(wanted))
        assert again.ids(index).shape[1] == top_k


def there_and_back(
    folder: Path, lengths: list[int], piece: int, columns: tuple[str, ...], token_columns: dict[str, int]
) -> None:
    wanted = written(folder / "x.trace", lengths, piece, columns, token_columns)
    assert len({n for ids_TK in wanted["ids"] for n in (ids_TK >= 0).sum(axis=1)}) > 1  # else k must be that number
    with Trace(folder / "x.trace") as trace:
        assert exporters.FORMATS["parquet"](trace, folder / "x.parquet").startswith("the manifest: ")
        convert("parquet", [folder / "x.parquet"], folder / "y.trace", Asked(top_k=K + 1, n_experts=E))
        with Trace(folder / "y.trace") as again:
            require_same(trace, again, K + 1)


def test_a_table_has_all_of_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column comes back, however many pieces there are."""
    monkeypatch.setattr(parquet, "_ROWS_AT_ONCE", 4)
    there_and_back(tmp_path, [7, 4, 3], 5, COLUMNS, {"log_p": 4, "predicted": 1})


@pytest.mark.slow
@settings(deadline=None, max_examples=30, database=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) > 8),
    piece=st.integers(1, 17),
    columns=st.sets(st.sampled_from(COLUMNS)),
    token_columns=st.fixed_dictionaries({}, optional={"log_p": st.integers(3, 5), "predicted": st.just(1)}),
)
def test_a_table_has_whatever_a_trace_has(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    piece: int,
    columns: set[str],
    token_columns: dict[str, int],
) -> None:
    """Any columns, any pieces."""
    there_and_back(tmp_path_factory.mktemp("t"), lengths, piece, tuple(sorted(columns)), token_columns)


def test_logits_say_how_many_experts_a_layer_has(tmp_path: Path) -> None:
    """Layers may differ; without --n-experts. A margin may be NaN, as where all experts are used."""
    layers, rng = [Layer(0, 4, 2), Layer(1, 9, 2)], np.random.default_rng(0)
    with TraceWriter(tmp_path / "x.trace", layers, ("margin", "logits")) as writer:
        ids = [routes(rng, 5, layer.n_experts, 2) for layer in layers]
        logits = [rng.random((5, layer.n_experts)) for layer in layers]
        margin = [np.full(5, np.nan), rng.random(5)]
        writer.add(tokens_of(np.zeros(5), np.arange(5)), ids, margin=margin, logits=logits)
    with Trace(tmp_path / "x.trace") as trace:
        exporters.FORMATS["parquet"](trace, tmp_path / "x.parquet")
        convert("parquet", [tmp_path / "x.parquet"], tmp_path / "y.trace", Asked(top_k=2))
        with Trace(tmp_path / "y.trace") as again:
            assert again.layers == tuple(layers)
            require_same(trace, again, 2)
    with pytest.raises(ValueError, match="layer 0 has logits of 4 experts, not --n-experts 9"):
        convert("parquet", [tmp_path / "x.parquet"], tmp_path / "z.trace", Asked(n_experts=9))


def test_an_array_of_vllm_has_zeros_for_dense_layers(tmp_path: Path) -> None:
    """The format cannot say that a token uses fewer experts, so such a trace is refused."""
    rng = np.random.default_rng(0)
    ids = [np.abs(routes(rng, 9, 64, 1)), np.abs(routes(rng, 9, 64, 1))]
    layers, margin = [Layer(1, 64, 1), Layer(3, 64, 1)], [np.zeros(9), np.zeros(9)]
    with TraceWriter(tmp_path / "x.trace", layers, ("margin",), piece=4, token_columns={"predicted": 1}) as writer:
        writer.add(tokens_of(np.zeros(9), np.arange(9)), ids, {"predicted": np.zeros(9)}, margin=margin)
    with Trace(tmp_path / "x.trace") as trace:
        left_out = exporters.FORMATS["vllm"](trace, tmp_path / "x.npy")
    assert left_out.startswith("sequence, position, phase, token, domain, predicted, margin, and the manifest")
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (9, 4, 1) and not array[:, [0, 2]].any() and array.dtype == np.int32
    assert np.array_equal(array[:, [1, 3]], np.stack(ids, axis=1))
    written(tmp_path / "y.trace", [30])
    with Trace(tmp_path / "y.trace") as trace, pytest.raises(ValueError, match="different numbers of experts"):
        exporters.FORMATS["vllm"](trace, tmp_path / "y.npy")
    with TraceWriter(tmp_path / "z.trace", [Layer(0, 4, 2)]) as writer:
        writer.add(tokens_of(np.zeros(1), np.zeros(1)), [np.array([[2, -1]])])
    with Trace(tmp_path / "z.trace") as trace, pytest.raises(ValueError, match="fewer than 2 experts"):
        exporters.FORMATS["vllm"](trace, tmp_path / "z.npy")
    assert not (tmp_path / "z.npy").exists()
