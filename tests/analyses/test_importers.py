"""analyses/importers.py: a file of each format, built as its writer builds it, and what is wrong with others."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_lab.analyses.importers import FORMATS, Asked, convert
from moe_lab.records.trace import PHASES, Layer, Trace

E, K, T, L = 6, 2, 11, 3


def ids_of(n: int = T, layers: int = L, seed: int = 0) -> np.ndarray:
    """Routes [n, layers, K] that use every expert."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.broadcast_to(np.arange(E), (n, layers, E)), axis=2)[:, :, :K]


def vllm(folder: Path, ids_TLK: np.ndarray) -> list[Path]:
    """As `numpy.save(path, output.outputs[0].routed_experts)`, which is int16 or int32."""
    np.save(folder / "request.npy", ids_TLK.astype(np.int16))
    return [folder / "request.npy"]


def sglang(folder: Path, ids_TLK: np.ndarray, **changes: Any) -> list[Path]:
    """As `_DetailAccumulator.dump`: a prefill of two requests, then decoding steps of both; physical ids."""
    to_physical_E, n = np.random.default_rng(1).permutation(E), len(ids_TLK)
    to_logical_LP = np.tile(np.argsort(to_physical_E), (ids_TLK.shape[1], 1))
    wide_LTK = np.full((ids_TLK.shape[1], n, 8), -1)
    wide_LTK[:, :, : ids_TLK.shape[2]] = np.where(ids_TLK < E, to_physical_E[np.minimum(ids_TLK, E - 1)], 99).transpose(
        1, 0, 2
    )
    lengths, records, done = [3, n - 3 - 4], [], 0
    for number, rows in enumerate([n - 4, 2, 2]):
        positions = [0, 1, 2, *range(lengths[1])] if not number else [2 + number, lengths[1] - 1 + number]
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": list(range(100 + done, 100 + done + rows)),
                "positions": positions,
                "extend_seq_lens": None if number else lengths,
                "forward_mode": 2 if number else 1,
                "topk_ids_of_layer": torch.tensor(wide_LTK[:, done : done + rows], dtype=torch.int32),
                "misc_objects": [],
                "global_physical_count": torch.zeros(ids_TLK.shape[1], E, dtype=torch.int32),
                **changes,
            }
        )
        done += rows
    content = {"records": records, "last_physical_to_logical_map": torch.tensor(to_logical_LP)}
    torch.save(content, folder / "expert_distribution_recorder_1.5_0.pt")
    return [folder / "expert_distribution_recorder_1.5_0.pt"]


def llama_cpp(folder: Path, ids_TLK: np.ndarray, batches: Sequence[int] = (4, 1, 6), header: str = "layer,expert\n"):
    """A row for each used expert, batch by batch and in each layer by layer; two files joined have two headers."""
    text, done = header, 0
    for n in batches:
        for layer in range(ids_TLK.shape[1]):
            text += "".join(f"{layer},{expert}\n" for expert in ids_TLK[done : done + n, layer].reshape(-1))
        done += n
    (folder / "moe_trace.csv").write_text(text + header)
    return [folder / "moe_trace.csv"]


def bench_moe(folder: Path, ids_TLK: np.ndarray, **changes: Any) -> list[Path]:
    """The routing pattern of each layer on two ranks, from what each half of the tokens sends."""
    paths = []
    for layer in range(ids_TLK.shape[1]):
        halves = np.split(ids_TLK[:, layer] // (E // 2), [5])
        pattern = {
            "ep_size": 2,
            "experts_per_rank": E // 2,
            "slot_dispatch_matrix": [np.bincount(half.reshape(-1), minlength=2).tolist() for half in halves],
            "expert_histogram": np.bincount(ids_TLK[:, layer].reshape(-1), minlength=E).reshape(2, -1).tolist(),
        }
        paths.append(folder / f"{layer}.json")
        paths[-1].write_text(json.dumps(pattern | changes))
    return paths


def parquet(folder: Path, ids_TLK: np.ndarray, **columns: Any) -> list[Path]:
    """Token by token, of each its layers."""
    n, layers = ids_TLK.shape[:2]
    table = {
        "layer": np.tile(np.arange(layers), n),
        "expert_ids": pa.array(ids_TLK.reshape(n * layers, -1).tolist(), pa.list_(pa.int64())),
        "sequence": np.arange(n).repeat(layers) // 4,
        "position": np.arange(n).repeat(layers) % 4,
        "domain": pa.array([None if token < 2 else f"d{token % 2}" for token in range(n) for _ in range(layers)]),
        "phase": pa.array(["decode"] * n * layers),
        "weights": pa.array(np.full((n * layers, ids_TLK.shape[2]), 0.5).tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table | columns), folder / "t.parquet")
    return [folder / "t.parquet"]


WRITERS: dict[str, Callable[..., list[Path]]] = {
    write.__name__: write for write in (vllm, sglang, llama_cpp, bench_moe, parquet)
}
ASKED = {"llama_cpp": Asked(top_k=K), "bench_moe": Asked(top_k=K)}


def imported(kind: str, paths: list[Path], folder: Path, asked: Asked | None = None) -> tuple[Trace, list[str]]:
    missing = convert(kind, paths, folder / "x.trace", asked or ASKED.get(kind, Asked()))
    return Trace(folder / "x.trace"), missing


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in WRITERS if kind != "bench_moe"])
def test_each_format_gives_the_routes_that_were_written(kind: str, tmp_path: Path) -> None:
    """Of every layer and token; what it does not say is listed."""
    ids_TLK = ids_of()
    trace, missing = imported(kind, WRITERS[kind](tmp_path, ids_TLK), tmp_path)
    with trace:
        assert trace.layers == tuple(Layer(layer, E, K) for layer in range(L))
        for index in range(L):
            assert np.array_equal(trace.ids(index), ids_TLK[:, index])
        assert trace.source["imported_from"] == kind and list(trace.missing) == missing
        assert bool(missing) and ("weights" in trace.columns) == (kind == "parquet")


def test_a_pattern_of_bench_moe_gives_its_load(tmp_path: Path) -> None:
    """The tokens are made up, each with different experts; the counts are those of the file."""
    ids_TLK = ids_of()
    trace, missing = imported("bench_moe", bench_moe(tmp_path, ids_TLK), tmp_path)
    with trace:
        for index in range(L):
            assert np.array_equal(np.bincount(trace.ids(index).reshape(-1)), np.bincount(ids_TLK[:, index].reshape(-1)))
    assert "made up" in missing[0]


def test_sglang_says_which_token_is_of_which_sequence(tmp_path: Path) -> None:
    """Prefill by its lengths; a step goes on with the sequence of its place."""
    trace, missing = imported("sglang", sglang(tmp_path, ids_of()), tmp_path)
    with trace:
        tokens = trace.tokens()
    assert tokens.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1]
    assert tokens.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 5]
    assert [PHASES[phase] for phase in tokens.phase] == ["prefill"] * 7 + ["decode"] * 4
    assert tokens.token.tolist() == list(range(100, 111))
    assert any("guessed" in text for text in missing)


def test_parquet_has_domains_phases_and_weights(tmp_path: Path) -> None:
    """A null domain is unknown; fewer experts for a token are unused slots."""
    paths = parquet(tmp_path, ids_of())
    trace, _ = imported("parquet", paths, tmp_path)
    with trace:
        tokens = trace.tokens()
        assert trace.domains == ("d0", "d1") and tokens.domain.tolist() == [-1, -1, *([0, 1] * 5)][:T]
        assert set(tokens.phase.tolist()) == {PHASES.index("decode")}
        assert np.allclose(next(trace.pieces_of(0, "weights")), 0.5)
    rows = [[0], [1, 2], [3, 4]] * T
    weights = [[1.0] * len(row) for row in rows]
    paths = parquet(tmp_path, ids_of(), expert_ids=pa.array(rows), weights=pa.array(weights, pa.list_(pa.float32())))
    trace, _ = imported("parquet", paths, tmp_path)
    with trace:
        assert trace.ids(0).tolist() == [[0, -1]] * T and trace.ids(1).tolist() == [[1, 2]] * T


def test_columns_that_a_trace_does_not_have_are_said(tmp_path: Path) -> None:
    """Another program's own."""
    trace, missing = imported("parquet", parquet(tmp_path, ids_of(), latency=np.zeros(T * L)), tmp_path)
    trace.close()
    assert "latency: columns of the table that a trace does not have" in missing


def test_dense_layers_are_left_out(tmp_path: Path) -> None:
    """vLLM gives zeros for them, SGLang nothing."""
    ids_TLK = ids_of()
    ids_TLK[:, 0] = 0
    trace, missing = imported("vllm", vllm(tmp_path, ids_TLK), tmp_path)
    with trace:
        assert [layer.layer for layer in trace.layers] == [1, 2] and any("layers 0" in text for text in missing)
    ids_LTK = torch.full((2, 3, 8), -1, dtype=torch.int32)
    ids_LTK[1, :, 0] = 5
    record = {"input_ids": [1, 2, 3], "positions": [0, 1, 2], "extend_seq_lens": [3], "topk_ids_of_layer": ids_LTK}
    content = {"records": [record], "last_physical_to_logical_map": torch.arange(E).expand(2, E)}
    torch.save(content, tmp_path / "a.pt")
    trace, missing = imported("sglang", [tmp_path / "a.pt"], tmp_path)
    with trace:
        assert trace.layers == (Layer(1, E, 1),) and any("1 of 2 layers" in text for text in missing)


def _out_of_range(ids_TLK: np.ndarray) -> np.ndarray:
    ids_TLK[3, 1, 0] = 99
    return ids_TLK


def _twice(ids_TLK: np.ndarray) -> np.ndarray:
    ids_TLK[3, 1] = 2
    return ids_TLK


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in WRITERS if kind != "bench_moe"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_out_of_range, "99", id="out-of-range"),
        pytest.param(_twice, "has an expert twice", id="twice"),
    ],
)
def test_routes_that_cannot_be_are_one_line(
    kind: str, change: Callable[[np.ndarray], np.ndarray], message: str, tmp_path: Path
) -> None:
    """Where the number of experts is known: the format says so, or the person."""
    paths = WRITERS[kind](tmp_path, change(ids_of()))
    with pytest.raises(ValueError, match=message) as error:
        convert(kind, paths, tmp_path / "x.trace", ASKED.get(kind, Asked())._replace(n_experts=E))
    assert paths[0].name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "x.trace").exists()


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in WRITERS])
def test_a_truncated_file_is_one_line(kind: str, tmp_path: Path) -> None:
    """Cut in the middle, empty, another file, a folder, or not there."""
    paths = WRITERS[kind](tmp_path, ids_of())
    whole = paths[0].read_bytes()
    for content in (whole[: len(whole) // 2 + 1], b"", b"\x80\x04nonsense,\n{"):
        paths[0].write_bytes(content)
        with pytest.raises(ValueError, match=rf"{paths[0].name}.*not a recording of {kind}") as error:
            convert(kind, paths, tmp_path / "x.trace", ASKED.get(kind, Asked()))
        assert "\n" not in str(error.value)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"a plain file|No such file"):
            convert(kind, [path], tmp_path / "x.trace", ASKED.get(kind, Asked()))
    assert not (tmp_path / "x.trace").exists()


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        pytest.param("vllm", Asked(top_k=3), "2 experts for a token, not --top-k 3", id="vllm"),
        pytest.param("sglang", Asked(top_k=3), "2 experts for a token, not --top-k 3", id="sglang"),
        pytest.param("parquet", Asked(top_k=1), "2 experts for a token, not --top-k 1", id="parquet"),
        pytest.param("llama_cpp", Asked(top_k=3), "layer 0 has 22 rows, not a multiple of --top-k 3", id="llama_cpp"),
        pytest.param("llama_cpp", Asked(), "give --top-k", id="llama_cpp-without"),
        pytest.param("llama_cpp", Asked(top_k=11), "has an expert twice", id="llama_cpp-too-many"),
        pytest.param("bench_moe", Asked(top_k=4), "not a multiple of --top-k 4", id="bench_moe"),
        pytest.param("bench_moe", Asked(), "give --top-k", id="bench_moe-without"),
        pytest.param("bench_moe", Asked(2, 5), "6 experts, not --n-experts 5", id="bench_moe-experts"),
        pytest.param("nothing", Asked(), "unknown format; choose one of vllm", id="format"),
    ],
)
def test_a_wrong_k_is_said(kind: str, asked: Asked, message: str, tmp_path: Path) -> None:
    """Beside what the file has."""
    paths = WRITERS.get(kind, vllm)(tmp_path, ids_of())
    with pytest.raises(ValueError, match=message):
        convert(kind, paths, tmp_path / "x.trace", asked)


def test_a_layer_that_is_cut_off_is_said(tmp_path: Path) -> None:
    """The last layer of a CSV, a row of a table."""
    (path,) = llama_cpp(tmp_path, ids_of(), header="")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(ValueError, match="layer 2 has 10 tokens, and another 11"):
        convert("llama_cpp", [path], tmp_path / "x.trace", Asked(top_k=K))
    (path,) = parquet(tmp_path, ids_of())
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(ValueError, match="layer 0 has 10 tokens, and another 11"):
        convert("parquet", [path], tmp_path / "x.trace", Asked())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"sequence": np.arange(T * L)}, "the rows of layer 1 are other tokens", id="other-tokens"),
        pytest.param({"layer": pa.array([0.5] * T * L)}, "layer must be integers", id="layer"),
        pytest.param({"position": np.full(T * L, -1)}, "position is negative", id="negative"),
        pytest.param({"phase": pa.array(["x"] * T * L)}, "must be one of unknown, prefill, decode", id="phase"),
        pytest.param({"expert_ids": np.arange(T * L)}, "expert_ids must be lists", id="no-lists"),
        pytest.param({"weights": pa.array([[0.5]] * T * L)}, "other numbers of weights", id="weights"),
        pytest.param({"margin": pa.array([1] * T * L)}, "margin must be floats, without nulls", id="margin"),
        pytest.param({"margin": pa.array([None] * T * L, pa.float32())}, "margin must be floats", id="margin-null"),
        pytest.param({"logits": pa.array([[0.5]] * (T * L - 1) + [[]])}, "of 0 and of 1 values", id="logits"),
        pytest.param({"logits": pa.array([[0.5]] * T * L)}, "is outside 0 to 0", id="logits-of-fewer-experts"),
        pytest.param({"logits": pa.array([[1]] * T * L)}, "logits must be lists of floats", id="logits-integers"),
        pytest.param({"ahead": pa.array([[0, 1, 2, 3, 4]] * T * L)}, "5 ahead, more than 4", id="ahead"),
        pytest.param({"ahead": pa.array([[2, 2]] * T * L)}, "ahead: token 0 has an expert twice", id="ahead-twice"),
        pytest.param({"ahead": pa.array([[0.5]] * T * L)}, "ahead must be lists of integers", id="ahead-floats"),
        pytest.param({"log_p": pa.array([[-0.5] * 2] * T * L)}, "log_p has 2 values in a row", id="log_p"),
        pytest.param({"predicted": np.full(T * L, -2)}, "predicted: -2 is below -1", id="predicted"),
        pytest.param({"predicted": np.arange(T * L)}, "are other tokens .*predicted", id="predicted-of-layers"),
    ],
)
def test_a_table_that_is_not_one_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Which column, and what it must be."""
    with pytest.raises(ValueError, match=message):
        convert("parquet", parquet(tmp_path, ids_of(), **changes), tmp_path / "x.trace", Asked())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"positions": [0]}, "has routes .* positions", id="positions"),
        pytest.param({"extend_seq_lens": [1]}, "a record of 7 tokens has sequences of 1", id="lengths"),
        pytest.param({"topk_ids_of_layer": None}, "not a recording of sglang", id="no-routes"),
    ],
)
def test_a_record_of_sglang_that_contradicts_itself_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Its own numbers do not fit."""
    with pytest.raises(ValueError, match=message):
        convert("sglang", sglang(tmp_path, ids_of(), **changes), tmp_path / "x.trace", Asked())


def test_counts_of_sglang_are_no_routes(tmp_path: Path) -> None:
    """The mode stat."""
    torch.save({"rank": 0, "logical_count": torch.zeros(1, 2, 3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="counts and no routes; record with mode per_token"):
        convert("sglang", [tmp_path / "a.pt"], tmp_path / "x.trace", Asked())


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of code is refused, as a `.pt` and as a `.npy`."""
    monkeypatch.chdir(tmp_path)
    torch.save({"records": [_Bomb()]}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps({"records": [_Bomb()]}))
    np.save("a.npy", np.array([_Bomb()]), allow_pickle=True)
    for kind, name in (("sglang", "a.pt"), ("sglang", "b.pt"), ("vllm", "a.npy")):
        with pytest.raises(ValueError, match=f"not a recording of {kind}"):
            convert(kind, [Path(name)], tmp_path / "x.trace", Asked())
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ep_size": 3}, r"slot_dispatch_matrix must be \[3, 3\]", id="ranks"),
        pytest.param({"expert_histogram": [[22, 0, 0], [0, 0, 0]]}, "must have the sum of its row", id="sums"),
        pytest.param(
            {"expert_histogram": [[22, 0, 0], [0, 0, 0]], "slot_dispatch_matrix": [[10, 0], [12, 0]]},
            "more slots than there are tokens",
            id="one-expert",
        ),
    ],
)
def test_a_pattern_that_cannot_be_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Its sums do not fit."""
    with pytest.raises(ValueError, match=message):
        convert("bench_moe", bench_moe(tmp_path, ids_of(), **changes), tmp_path / "x.trace", Asked(top_k=K))


def test_the_routes_of_older_runs_convert(tmp_path: Path) -> None:
    """With the numbers of the layers and of the experts that the file has."""
    ids_LTK = ids_of().transpose(1, 0, 2)
    np.savez(tmp_path / "routing.npz", expert_ids_LTK=ids_LTK, layer=[1, 2, 5], counts_LE=np.zeros((L, 9)))
    trace, _ = imported("routing_npz", [tmp_path / "routing.npz"], tmp_path)
    with trace:
        assert trace.layers == tuple(Layer(layer, 9, K) for layer in (1, 2, 5))
        assert np.array_equal(np.stack([trace.ids(index) for index in range(L)]), ids_LTK)
    np.savez(tmp_path / "routing.npz", layer=[1])
    with pytest.raises(ValueError, match="it has no expert_ids_LTK"):
        imported("routing_npz", [tmp_path / "routing.npz"], tmp_path)


def test_only_sglang_needs_torch(tmp_path: Path) -> None:
    """The others are read where there is none."""
    vllm(tmp_path, ids_of())
    code = (
        "import sys; from pathlib import Path; from moe_lab.analyses.importers import Asked, convert\n"
        "convert('vllm', [Path('request.npy')], Path('x.trace'), Asked()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert set(FORMATS) == {*WRITERS, "routing_npz"}
