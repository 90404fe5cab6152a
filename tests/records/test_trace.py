"""records/trace.py: what is written is what is read, piece by piece; a damaged or invented file is one line."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from moe_lab.records.trace import GUESSES, Layer, Trace, TraceWriter, require_routes, tokens_of

E, K = 7, 3


def routes(rng: np.random.Generator, n: int, n_experts: int = E, k: int = K) -> np.ndarray:
    """Ids [n, k], some slots unused."""
    ids = rng.permuted(np.tile(np.arange(n_experts, dtype=np.int16), (n, 1)), axis=1)[:, :k]
    return np.where(rng.random((n, k)) < 0.1, -1, ids).astype(np.int16)


def written(
    path: Path,
    lengths: list[int],
    piece: int = 5,
    columns: tuple[str, ...] = ("weights",),
    token_columns: dict[str, int] | None = None,
) -> dict[str, Any]:
    """A trace of two layers of other widths, added in parts of these lengths; returns everything that went in."""
    rng, layers = np.random.default_rng(0), [Layer(1, E, K, 96), Layer(4, E, K + 1)]
    parts: list[Any] = []
    widths = token_columns or {}
    with TraceWriter(path, layers, columns, ["a", "b"], {"model": "m"}, ["nothing"], piece, widths) as writer:
        for n in lengths:
            tokens = tokens_of(np.full(n, len(parts)), np.arange(n), "decode", rng.integers(0, 99, n), rng.integers(2))
            ids = [routes(rng, n), routes(rng, n, k=K + 1)]
            more = {
                name: [
                    rng.random((n,) if name == "margin" else (n, E if name == "logits" else a.shape[1])).astype("f4")
                    for a in ids
                ]
                for name in columns
                if name not in GUESSES
            }
            more |= {
                name: [routes(rng, n, k=min(2 * a.shape[1], E)) for a in ids] for name in columns if name in GUESSES
            }
            beside = {name: rng.integers(-1, 50, (n, w) if w > 1 else n).astype("f4") for name, w in widths.items()}
            writer.add(tokens, ids, beside, **more)
            parts.append((tokens, ids, beside, more))
        assert writer.n_tokens == sum(lengths)
    return {
        "tokens": [np.concatenate(values) for values in zip(*(tokens for tokens, *_ in parts), strict=True)],
        "ids": [np.concatenate([ids[i] for _, ids, *_ in parts]) for i in range(2)],
        **{name: np.concatenate([beside[name] for _, _, beside, _ in parts]) for name in widths},
        **{name: [np.concatenate([more[name][i] for *_, more in parts]) for i in range(2)] for name in columns},
    }


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(any), piece=st.integers(1, 17))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], piece: int) -> None:
    """However it was cut into parts and pieces."""
    path = tmp_path_factory.mktemp("t") / "x.trace"
    columns = ("weights", "margin", "logits", "ahead", "pre_attention")
    wanted = written(path, lengths, piece, columns, {"log_p": 4, "predicted": 1})
    with Trace(path) as trace:
        assert trace.layers == (Layer(1, E, K, 96), Layer(4, E, K + 1)) and trace.columns == columns
        assert trace.n_tokens == sum(lengths) and max(trace.pieces) <= piece
        assert (trace.domains, trace.source, trace.missing) == (("a", "b"), {"model": "m"}, ("nothing",))
        assert all(np.array_equal(*pair) for pair in zip(trace.tokens(), wanted["tokens"], strict=True))
        assert trace.token_columns == {"log_p": 4, "predicted": 1}
        for name, dtype in (("log_p", np.float32), ("predicted", np.int32)):
            assert np.array_equal(trace.of_tokens(name), wanted[name]) and trace.of_tokens(name).dtype == dtype
        for index in range(2):
            assert np.array_equal(trace.ids(index), wanted["ids"][index]) and trace.ids(index).dtype == np.int16
            for name in columns:
                assert np.array_equal(np.concatenate(list(trace.pieces_of(index, name))), wanted[name][index])


def test_a_trace_is_an_npz(tmp_path: Path) -> None:
    """NumPy reads it without us, and equal traces are equal files."""
    wanted = written(tmp_path / "x.trace", [4])
    with np.load(tmp_path / "x.trace") as arrays:
        assert np.array_equal(arrays["0/layer/4/expert_ids"], wanted["ids"][1])
    written(tmp_path / "y.trace", [4])
    assert (tmp_path / "x.trace").read_bytes() == (tmp_path / "y.trace").read_bytes()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param([[0, E]], f"expert {E} is outside 0 to {E - 1}", id="too-large"),
        pytest.param([[0, -2]], "expert -2 is outside", id="negative"),
        pytest.param([[0, 1], [3, 3]], "token 1 has an expert twice", id="twice"),
    ],
)
def test_routes_that_cannot_be_are_refused(ids: list[list[int]], message: str) -> None:
    """Unused slots may repeat."""
    require_routes(np.array([[-1, -1], [2, 0]]), E, "layer 0")
    with pytest.raises(ValueError, match=message):
        require_routes(np.array(ids), E, "layer 0")


def test_an_error_while_recording_leaves_no_file(tmp_path: Path) -> None:
    """Nor does a trace without tokens; what was there before stays."""
    written(tmp_path / "x.trace", [3])
    before = (tmp_path / "x.trace").read_bytes()
    for n, ids, message in ((1, [[9]], "layer 4: expert 9 is outside"), (2, [[1]], "expert_ids is")):
        writer = TraceWriter(tmp_path / "x.trace", [Layer(4, E, 1)])
        with pytest.raises(ValueError, match=message), writer:
            writer.add(tokens_of(np.zeros(n), np.zeros(n)), [np.array(ids)])
    with (
        pytest.raises(ValueError, match="no tokens were recorded"),
        TraceWriter(tmp_path / "x.trace", [Layer(4, E, 1)]),
    ):
        pass
    with pytest.raises(ValueError, match="a trace has at most"):
        TraceWriter(tmp_path / "x.trace", [Layer(0, 1 << 20, 1)])
    assert [path.name for path in tmp_path.iterdir()] == ["x.trace"]
    assert (tmp_path / "x.trace").read_bytes() == before


def changed(path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def manifest(**keys: Any) -> Callable[[dict[str, bytes]], Any]:
    """A change of it."""

    def change(members: dict[str, bytes]) -> None:
        members["manifest.json"] = json.dumps({**json.loads(members["manifest.json"]), **keys}).encode()

    return change


def array(name: str, values: Any, version: tuple[int, int] = (1, 0)) -> Callable[[dict[str, bytes]], Any]:
    """Another array in the place of one."""

    def change(members: dict[str, bytes]) -> None:
        import io

        buffer = io.BytesIO()
        npy.write_array(buffer, np.asarray(values), version=version)
        members[f"{name}.npy"] = buffer.getvalue()

    return change


def _blown_up(members: dict[str, bytes]) -> None:
    """A thousandth of it in the file."""
    members["0/layer/1/expert_ids.npy"] += bytes(1 << 20)


def _truncated_header(members: dict[str, bytes]) -> None:
    members["0/layer/1/expert_ids.npy"] = members["0/layer/1/expert_ids.npy"].replace(b"(5, 3)", b"(9, 9)")


def _older(**keys: Any) -> Callable[[dict[str, bytes]], Any]:
    """As before there were token_columns."""

    def change(members: dict[str, bytes]) -> None:
        manifest(**keys)(members)
        found = json.loads(members["manifest.json"])
        del found["token_columns"]
        members["manifest.json"] = json.dumps(found).encode()

    return change


IDS, AHEAD, PREDICTED = "0/layer/1/expert_ids", "0/layer/1/ahead", "0/token/predicted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda members: members.pop("manifest.json"), "no manifest.json, so the recording", id="unfinished"
        ),
        pytest.param(lambda members: members.update({"manifest.json": b"{"}), "Expecting", id="no-json"),
        pytest.param(lambda members: members.update({"manifest.json": b"[" * 500}), "Expecting|nested", id="deep"),
        pytest.param(manifest(version=2), "does not say moe-lab trace, version 1", id="version"),
        pytest.param(manifest(layers=[{"layer": 0}]), "has no sizes", id="layer-without-sizes"),
        pytest.param(manifest(layers=[{"layer": 0, "n_experts": 10**9, "top_k": 1}]), "10000000", id="huge"),
        pytest.param(manifest(layers=[]), "no layers", id="no-layers"),
        pytest.param(manifest(pieces=[5, -1]), "a piece must have 1 to", id="negative-piece"),
        pytest.param(manifest(pieces=[5, True]), "a list of int, pieces", id="no-number"),
        pytest.param(manifest(pieces=[10]), "bytes, not|not int32 .10.", id="other-length"),
        pytest.param(manifest(pieces=[5, 3, 1]), "2/token/sequence.npy", id="one-piece-more"),
        pytest.param(manifest(columns=["pickles"]), "columns other than", id="column"),
        pytest.param(_older(counterfactual_routes=True), "counterfactual_routes other than", id="routes-no-number"),
        pytest.param(_older(counterfactual_routes=4), "0/token/log_p", id="routes-that-are-not-there"),
        pytest.param(manifest(token_columns=["predicted"]), "token_columns other than", id="token-columns-no-object"),
        pytest.param(manifest(token_columns={"pickles": 1}), "token_columns other than", id="token-column"),
        pytest.param(manifest(token_columns={"predicted": 2}), "predicted of a width other than 1 to 1", id="width"),
        pytest.param(manifest(token_columns={"log_p": 2}), "log_p of a width other than 3", id="width-of-no-route"),
        pytest.param(manifest(token_columns={"predicted": True}), "predicted of a width", id="width-no-number"),
        pytest.param(manifest(token_columns={"log_p": 3}), "0/token/log_p", id="token-column-that-is-not-there"),
        pytest.param(array(PREDICTED, np.zeros(4, np.int32)), r"predicted has|int32 \[4\]", id="token-column-cut"),
        pytest.param(array(PREDICTED, np.zeros(5, np.int64)), "bytes, not|int64", id="token-column-dtype"),
        pytest.param(array(PREDICTED, np.full(5, -2, np.int32)), "predicted: -2 is below -1", id="predicted-negative"),
        pytest.param(manifest(domains=[]), "a value out of range", id="domain-out-of-range"),
        pytest.param(lambda members: members.pop(f"{IDS}.npy"), "0/layer/1/expert_ids", id="missing-layer"),
        pytest.param(array(IDS, np.full((5, K), E, np.int16)), "expert 7 is outside 0 to 6", id="id-out-of-range"),
        pytest.param(array(IDS, np.zeros((5, K), np.int16)), "has an expert twice", id="id-twice"),
        pytest.param(array(AHEAD, np.zeros((5, 2 * K), np.int16)), "ahead: token 0 has an expert twice", id="guess"),
        pytest.param(array(IDS, np.zeros((5, K), np.int64)), "bytes, not|int64", id="dtype"),
        pytest.param(array(IDS, np.zeros((K, 5), np.int16)), r"int16 \[3, 5\], not", id="shape"),
        pytest.param(array(IDS, np.zeros((5, K), ">i2")), "is >i2", id="byte-order"),
        pytest.param(array(IDS, np.asfortranarray(np.zeros((5, K), np.int16))), "expert_ids is", id="order"),
        pytest.param(array(IDS, np.zeros((5, K), np.int16), (2, 0)), "header of version", id="header"),
        pytest.param(_blown_up, "has .* bytes, not 30", id="blown-up"),
        pytest.param(_truncated_header, r"\[9, 9\], not", id="lying-header"),
        pytest.param(array("0/token/position", np.full(5, -1, np.int32)), "out of range", id="negative-position"),
    ],
)
def test_a_damaged_file_is_one_line(change: Callable[[dict[str, bytes]], Any], message: str, tmp_path: Path) -> None:
    """It names the file, whatever was changed."""
    written(tmp_path / "x.trace", [8], columns=("weights", "ahead"), token_columns={"predicted": 1})
    changed(tmp_path / "x.trace", change)

    def read() -> None:
        with Trace(tmp_path / "x.trace") as trace:
            trace.tokens(), [trace.of_tokens(name) for name in trace.token_columns]
            for index in range(len(trace.layers)):
                for name in ("expert_ids", *trace.columns):
                    list(trace.pieces_of(index, name))

    with pytest.raises(ValueError, match=message) as error:
        read()
    assert str(error.value).startswith(f"{tmp_path / 'x.trace'}: not a trace that can be read")
    assert "\n" not in str(error.value)


def test_an_older_trace_is_read(tmp_path: Path) -> None:
    """Its manifest has the number of other routes, or nothing of the kind."""
    wanted = written(tmp_path / "x.trace", [8], token_columns={"log_p": 4})
    changed(tmp_path / "x.trace", _older(counterfactual_routes=2))
    with Trace(tmp_path / "x.trace") as trace:
        assert trace.token_columns == {"log_p": 4} and np.array_equal(trace.of_tokens("log_p"), wanted["log_p"])
    for keys in ({}, {"counterfactual_routes": 0}):
        written(tmp_path / "y.trace", [8])
        changed(tmp_path / "y.trace", _older(**keys))
        with Trace(tmp_path / "y.trace") as trace:
            assert trace.token_columns == {}


def test_token_columns_of_another_size_are_refused(tmp_path: Path) -> None:
    """And of a value that cannot be."""
    for values, message in ((np.zeros((2, 3)), r"log_p is \[2, 3\], of 2 tokens and 4"), (np.zeros(3), r"is \[3\]")):
        with (
            pytest.raises(ValueError, match=message),
            TraceWriter(tmp_path / "x.trace", [Layer(0, E, 1)], token_columns={"log_p": 4}) as writer,
        ):
            writer.add(tokens_of(np.zeros(2), np.zeros(2)), [np.zeros((2, 1))], {"log_p": values})
    with (
        pytest.raises(ValueError, match="predicted: -2 is below -1"),
        TraceWriter(tmp_path / "x.trace", [Layer(0, E, 1)], token_columns={"predicted": 1}) as writer,
    ):
        writer.add(tokens_of(np.zeros(2), np.zeros(2)), [np.zeros((2, 1))], {"predicted": np.array([0, -2])})
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_seen(tmp_path: Path) -> None:
    """Each array has a checksum."""
    written(tmp_path / "x.trace", [400], piece=400)
    content = bytearray((tmp_path / "x.trace").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.trace") as archive:
        info = archive.getinfo("0/layer/1/weights.npy")
    content[info.header_offset + 200] ^= 1
    (tmp_path / "x.trace").write_bytes(content)
    with Trace(tmp_path / "x.trace") as trace, pytest.raises(ValueError, match="not a trace that can be read"):
        list(trace.pieces_of(0, "weights"))


@pytest.mark.parametrize(
    "content",
    [pytest.param(b"", id="empty"), pytest.param(b"PK\x03\x04 cut off", id="cut"), pytest.param(b"a", id="x")],
)
def test_another_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    """So are a folder and a file that is not there."""
    (tmp_path / "x.trace").write_bytes(content)
    for path in (tmp_path / "x.trace", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not a trace that can be read"):
            Trace(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An array of objects is refused before it is read."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    def change(members: dict[str, bytes]) -> None:
        name = f"{IDS}.npy"
        n = len(members[name])
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (5, 3), }"
        body = npy.magic(1, 0) + (118).to_bytes(2, "little") + header.ljust(117) + b"\n" + pickle.dumps(Bomb())
        members[name] = body.ljust(n, b"\0")[:n]

    written(tmp_path / "x.trace", [5])
    changed(tmp_path / "x.trace", change)
    with Trace(tmp_path / "x.trace") as trace, pytest.raises(ValueError, match="object"):
        trace.ids(0)
    assert not (tmp_path / "ran").exists()
