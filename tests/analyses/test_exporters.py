"""analyses/exporters.py and analyses/parquet.py: what is written is what the importers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import exporters
from moe_lab.analyses.importers import Asked, convert
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.records.test_trace import E, K, routes, written


def test_a_table_has_all_of_a_trace(tmp_path: Path) -> None:
    """Unused slots and all columns but logits come back, however many pieces there are."""
    written(tmp_path / "x.trace", [7, 4, 3])
    with Trace(tmp_path / "x.trace") as trace:
        exporters.FORMATS["parquet"](trace, tmp_path / "x.parquet")
        convert("parquet", [tmp_path / "x.parquet"], tmp_path / "y.trace", Asked(top_k=K + 1, n_experts=E))
        with Trace(tmp_path / "y.trace") as again:
            assert [layer.layer for layer in again.layers] == [1, 4]
            for name in ("sequence", "position", "phase", "token"):
                assert np.array_equal(getattr(again.tokens(), name), getattr(trace.tokens(), name))
            names, names_again = np.array([*trace.domains, ""]), np.array([*again.domains, ""])
            assert np.array_equal(names[trace.tokens().domain], names_again[again.tokens().domain])
            for index, layer in enumerate(trace.layers):
                ids, ids_again = trace.ids(index), again.ids(index)
                weights, weights_again = (np.concatenate(list(t.pieces_of(index, "weights"))) for t in (trace, again))
                for token in range(trace.n_tokens):  # used slots move to the front
                    used = ids[token] >= 0
                    assert ids_again[token].tolist() == [*ids[token, used], *[-1] * (K + 1 - used.sum())]
                    assert weights_again[token][: used.sum()].tolist() == weights[token, used].tolist()
                assert layer.top_k <= K + 1


def test_an_array_of_vllm_has_zeros_for_dense_layers(tmp_path: Path) -> None:
    """The format cannot say that a token uses fewer experts, so such a trace is refused."""
    rng = np.random.default_rng(0)
    ids = [np.abs(routes(rng, 9, 64, 1)), np.abs(routes(rng, 9, 64, 1))]
    with TraceWriter(tmp_path / "x.trace", [Layer(1, 64, 1), Layer(3, 64, 1)], piece=4) as writer:
        writer.add(tokens_of(np.zeros(9), np.arange(9)), ids)
    with Trace(tmp_path / "x.trace") as trace:
        exporters.FORMATS["vllm"](trace, tmp_path / "x.npy")
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
