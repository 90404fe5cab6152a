"""A trace: which experts each token chose in each layer, in one file that is written as it is recorded.

A trace is a ZIP archive of NumPy arrays, so `numpy.load` reads it as an `.npz`, and `unzip -l` lists it. Tokens are cut
into pieces, 0, 1, ..., in the order in which they were computed. Each array of a layer holds one piece, so a layer, or
a stretch of tokens, is read without the rest. Of a piece of T tokens:

    PIECE/token/sequence         int32 [T]     the sequence (request, window of text) it belongs to, from 0
    PIECE/token/position         int32 [T]     its place in that sequence, from 0; rising in the order of the file
    PIECE/token/phase            uint8 [T]     index into `PHASES`
    PIECE/token/token            int32 [T]     its id in the vocabulary, -1 if unknown
    PIECE/token/domain           int16 [T]     index into the manifest's `domains`, -1 if unknown
    PIECE/token/log_p            float32 [T, 2 + n]  natural logarithms of the largest probability of the next token, of
                                 the probability of the token that follows, and of the latter by each of n other routes
                                 (runs/counterfactual.py); only in a trace that has them (token_columns)
    PIECE/token/predicted        int32 [T]     the likeliest next token by the model, -1 if unknown; likewise
    PIECE/layer/LAYER/expert_ids int16 [T, K]  different in each row; -1 is an unused slot
    PIECE/layer/LAYER/weights    float32 [T, K]  of these slots, 0 where unused; only in a trace that has them
    PIECE/layer/LAYER/margin     float32 [T]   p_(k) - p_(k+1) of the softmax of the logits; likewise
    PIECE/layer/LAYER/logits     float32 [T, E]  the router's; likewise
    PIECE/layer/LAYER/ahead, pre_attention  int16 [T, min(2 K, E)]: experts that the router would choose before its
                                 input is there (runs/guesses.py), best first; -1: not known; likewise

`manifest.json` comes last: an archive without one was not finished. It has

    format, version      "moe-lab trace", 1
    layers               [{layer, n_experts, top_k, bytes_per_expert}]: index in the model; top_k is the width K of its
                         rows; bytes of one expert's weights, null if unknown
    columns              which of weights, margin, logits, ahead, pre_attention there are
    token_columns        {name: width} of log_p and predicted, those that there are; older traces have instead
                         counterfactual_routes, n of log_p or 0, or neither
    pieces               tokens of each
    domains              names of the texts
    source               model, router, tokenizer, texts, ...: where it comes from, names and hashes
    missing              a sentence for everything that the recording could not say
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from moe_lab.records import files

SUFFIX, FORMAT, VERSION = ".trace", "moe-lab trace", 1
PHASES = ("unknown", "prefill", "decode")
COLUMNS = ("weights", "margin", "logits", "ahead", "pre_attention")
GUESSES = ("ahead", "pre_attention")
"""Those of the columns that are expert ids, too."""
MOST_EXPERTS, MOST_K, MOST_ROUTES = 1 << 14, 1 << 10, 1 << 10
PIECE = 1 << 16
"""Tokens of a piece as it is written: of eight experts a token, 1 MB a layer."""
_MOST_PIECE = 1 << 22  # tokens of one that is read
_MANIFEST = "manifest.json"


class TokenColumn(NamedTuple):
    """What only some traces have of a token: an array [T], or of a width of 2 or more [T, width]."""

    dtype: str
    widths: range  # those that there may be
    least: float = -math.inf


TOKEN_COLUMNS = {
    "log_p": TokenColumn("<f4", range(3, 3 + MOST_ROUTES)),
    "predicted": TokenColumn("<i4", range(1, 2), -1),
}
_TOKEN_DTYPES = {"sequence": "<i4", "position": "<i4", "phase": "|u1", "token": "<i4", "domain": "<i2"}
_DAMAGED = (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, NotImplementedError, struct.error)
_EARLY = (1980, 1, 1, 0, 0, 0)  # the time stamp of every member: equal traces are equal files


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a trace."""

    layer: int
    """Its index in the model."""
    n_experts: int
    top_k: int
    """The width of its rows; tokens may use fewer."""
    bytes_per_expert: int | None = None


class Tokens(NamedTuple):
    """Everything that is known of tokens beside their experts, [T] each; see the head of this file."""

    sequence: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    token: np.ndarray
    domain: np.ndarray

    @property
    def n(self) -> int:
        return len(self.sequence)


def tokens_of(
    sequence: np.ndarray,
    position: np.ndarray,
    phase: str = "unknown",
    token: np.ndarray | None = None,
    domain: np.ndarray | int = -1,
) -> Tokens:
    """`Tokens` in their dtypes; what is not given is unknown."""
    n = len(sequence)
    given = {
        "sequence": sequence,
        "position": position,
        "phase": np.full(n, PHASES.index(phase)),
        "token": np.full(n, -1) if token is None else token,
        "domain": np.broadcast_to(domain, n),
    }
    return Tokens(**{name: np.asarray(values).astype(_TOKEN_DTYPES[name]) for name, values in given.items()})


def require_routes(ids_TK: np.ndarray, n_experts: int, where: str) -> None:
    """Raise `ValueError` for an id outside [-1, n_experts), or one that a token has twice."""
    if ids_TK.size and (int(ids_TK.min()) < -1 or int(ids_TK.max()) >= n_experts):
        bad = int(ids_TK.max()) if int(ids_TK.max()) >= n_experts else int(ids_TK.min())
        raise ValueError(f"{where}: expert {bad} is outside 0 to {n_experts - 1}")
    sorted_TK = np.sort(ids_TK, axis=1)
    twice_T = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any(axis=1)
    if twice_T.any():
        raise ValueError(f"{where}: token {int(twice_T.argmax())} has an expert twice")


@dataclass
class TraceWriter:
    """Writes a trace piece by piece; in memory is one piece. Used as a context: an error inside leaves no file.

    Attributes:
        path: of the file; what is there is replaced when the trace is complete.
        layers: in the order of the arrays that `add` gets.
        columns: which of `COLUMNS` `add` gets.
        domains, source, missing: of the manifest. May be changed until the end.
        piece: tokens of a piece.
        token_columns: the widths of those of `TOKEN_COLUMNS` that `add` gets.
    """

    path: Path
    layers: Sequence[Layer]
    columns: Sequence[str] = ()
    domains: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    piece: int = PIECE
    token_columns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.layers and set(self.columns) <= set(COLUMNS)
        assert all(width in TOKEN_COLUMNS[name].widths for name, width in self.token_columns.items())
        for layer in self.layers:
            if not (1 <= layer.n_experts <= MOST_EXPERTS and 1 <= layer.top_k <= MOST_K):
                raise ValueError(
                    f"{self.path}: layer {layer.layer} has {layer.n_experts} experts, {layer.top_k} for a token; a "
                    f"trace has at most {MOST_EXPERTS} and {MOST_K}."
                )
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._pieces: list[int] = []
        self._waiting: list[list[dict[str, np.ndarray]]] = []  # of each part that of its tokens, then of each layer
        self._n_waiting = 0

    @property
    def n_tokens(self) -> int:
        """Added so far."""
        return sum(self._pieces) + self._n_waiting

    def __enter__(self) -> TraceWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.unlink(missing_ok=True)
        self._file = open(self._temporary, "xb")  # x follows no link
        # The lowest level is three times as fast as the usual one, and its files a tenth larger.
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError, ValueError):
                self._archive.close()
            self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def add(
        self,
        tokens: Tokens,
        ids: Sequence[np.ndarray],
        of_tokens: Mapping[str, np.ndarray] | None = None,
        /,
        **more: Sequence[np.ndarray],
    ) -> None:
        """Add tokens in order, their `token_columns`, their expert ids [T, K] layer by layer, and `columns` likewise.

        Raises:
            ValueError: an id out of range or twice in a row, or arrays of another size.
        """
        of_tokens = of_tokens or {}
        assert set(more) == set(self.columns), f"{set(more)} is not {set(self.columns)}"
        assert set(of_tokens) == set(self.token_columns), f"{set(of_tokens)} is not {set(self.token_columns)}"
        arrays: list[dict[str, np.ndarray]] = []
        for index, (layer, ids_TK) in enumerate(zip(self.layers, ids, strict=True)):
            require_routes(ids_TK, layer.n_experts, f"layer {layer.layer}")
            found = {"expert_ids": ids_TK} | {name: more[name][index] for name in self.columns}
            for name in set(self.columns) & set(GUESSES):
                require_routes(found[name], layer.n_experts, f"layer {layer.layer}: {name}")
            arrays.append({name: np.ascontiguousarray(a, dtype_of(name)) for name, a in found.items()})
            for name, array in arrays[-1].items():
                if array.shape != shape_of(name, layer, tokens.n):
                    raise ValueError(f"layer {layer.layer}: {name} is {list(array.shape)}, of {tokens.n} tokens")
        beside = {name: np.ascontiguousarray(a, TOKEN_COLUMNS[name].dtype) for name, a in of_tokens.items()}
        for name, array in beside.items():
            if array.shape != _token_shape(self.token_columns[name], tokens.n):
                raise ValueError(f"{name} is {list(array.shape)}, of {tokens.n} tokens and {self.token_columns[name]}")
            _require_least(name, array, name)
        self._waiting.append([tokens._asdict() | beside, *arrays])
        self._n_waiting += tokens.n
        while self._n_waiting >= self.piece:
            self._write(self.piece)

    def _write(self, n: int) -> None:
        """The next piece: the first n tokens that wait."""
        number, rests = len(self._pieces), []
        places = [f"{number}/token", *(f"{number}/layer/{layer.layer}" for layer in self.layers)]
        for index, place in enumerate(places):
            joined = {
                name: np.concatenate([waiting[index][name] for waiting in self._waiting])
                for name in self._waiting[0][index]
            }
            for name, values in joined.items():
                self._write_array(f"{place}/{name}", values[:n])
            rests.append({name: values[n:].copy() for name, values in joined.items()})
        self._pieces.append(n)
        self._n_waiting -= n
        self._waiting = [rests] if self._n_waiting else []

    def _write_array(self, name: str, array: np.ndarray) -> None:
        info = zipfile.ZipInfo(f"{name}.npy", _EARLY)
        info.compress_type = zipfile.ZIP_DEFLATED
        with self._archive.open(info, "w", force_zip64=array.nbytes > 1 << 30) as member:
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)

    def _finish(self) -> None:
        if self._n_waiting:
            self._write(self._n_waiting)
        if not self._pieces:
            raise ValueError(f"{self.path}: no tokens were recorded, so there is no trace to write.")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "layers": [asdict(layer) for layer in self.layers],
            "columns": list(self.columns),
            "token_columns": dict(self.token_columns),
            "pieces": self._pieces,
            "domains": list(self.domains),
            "source": dict(self.source),
            "missing": list(self.missing),
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)
        info = zipfile.ZipInfo(_MANIFEST, _EARLY)
        info.compress_type = zipfile.ZIP_DEFLATED
        self._archive.writestr(info, text)
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self.path)


class Trace:
    """A trace that is read. Used as a context, or closed with `close`.

    What is in the file is believed only as far as it was looked at: shapes, dtypes and ids of every array are checked
    when it is read, and nothing is unpickled.

    Attributes:
        path, layers, columns, token_columns, pieces, domains, source, missing: see `TraceWriter` and the head of this
            file.

    Raises:
        ValueError: it is not a trace, or damaged: one line that names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            files.require_plain(self.path, None)
            self._archive = zipfile.ZipFile(self.path)
        except _DAMAGED as error:
            raise self._damaged(error) from error
        try:
            self._members = {info.filename: info for info in self._archive.infolist()}
            self._read_manifest()
        except _DAMAGED as error:
            self.close()
            raise self._damaged(error) from error

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    @property
    def n_tokens(self) -> int:
        return sum(self.pieces)

    def tokens(self) -> Tokens:
        """All tokens, without their experts: 15 bytes each."""
        parts = [self._tokens_of(piece) for piece in range(len(self.pieces))]
        return Tokens(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def of_tokens(self, name: str) -> np.ndarray:
        """One of `token_columns` of all tokens.

        Raises:
            ValueError: damaged; see the class.
        """
        return np.concatenate([self.piece_of_tokens(name, piece) for piece in range(len(self.pieces))])

    def piece_of_tokens(self, name: str, piece: int) -> np.ndarray:
        """The same of one piece."""
        assert name in self.token_columns, f"this trace has no {name}"
        place = f"{piece}/token/{name}"
        shape = _token_shape(self.token_columns[name], self.pieces[piece])
        values = self._array(place, TOKEN_COLUMNS[name].dtype, shape)
        try:
            _require_least(name, values, place)
        except ValueError as error:
            raise self._damaged(error) from error
        return values

    def ids(self, index: int) -> np.ndarray:
        """The expert ids of one layer, by its place in `layers`: int16 [T, K]."""
        return np.concatenate(list(self.pieces_of(index, "expert_ids")))

    def pieces_of(self, index: int, name: str) -> Iterator[np.ndarray]:
        """`expert_ids` or one of `columns` of one layer, piece by piece.

        Raises:
            ValueError: damaged; see the class.
        """
        assert name in _names(self), f"this trace has no {name}"
        layer = self.layers[index]
        for piece, n in enumerate(self.pieces):
            place = f"{piece}/layer/{layer.layer}/{name}"
            values = self._array(place, dtype_of(name), shape_of(name, layer, n))
            if name in ("expert_ids", *GUESSES):
                try:
                    require_routes(values, layer.n_experts, place)
                except ValueError as error:
                    raise self._damaged(error) from error
            yield values

    def _tokens_of(self, piece: int) -> Tokens:
        n = (self.pieces[piece],)
        tokens = Tokens(*(self._array(f"{piece}/token/{name}", _TOKEN_DTYPES[name], n) for name in Tokens._fields))
        if (
            tokens.sequence.min() < 0
            or tokens.position.min() < 0
            or tokens.phase.max() >= len(PHASES)
            or tokens.domain.min() < -1
            or tokens.domain.max() >= len(self.domains)
        ):
            raise self._damaged(ValueError(f"{piece}/token: a value out of range"))
        return tokens

    def _array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """One member, which must be what the manifest says: its own header decides nothing."""
        try:
            info = self._members[f"{name}.npy"]
            n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if not n_bytes < info.file_size <= n_bytes + 4096:
                raise ValueError(f"{name} has {info.file_size} bytes, not {n_bytes}")
            with self._archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{name} has a header of version {version}")
                found, in_fortran_order, of_dtype = np.lib.format.read_array_header_1_0(member)
                if (found, in_fortran_order, of_dtype) != (shape, False, np.dtype(dtype)):
                    raise ValueError(f"{name} is {of_dtype} {list(found)}, not {np.dtype(dtype)} {list(shape)}")
                content = member.read()  # to its end, where its checksum is compared
        except _DAMAGED as error:
            raise self._damaged(error) from error
        if len(content) != n_bytes:
            raise self._damaged(ValueError(f"{name} is cut off"))
        return np.frombuffer(content, dtype).reshape(shape)

    def _read_manifest(self) -> None:
        info = self._members.get(_MANIFEST)
        if info is None:
            raise ValueError("it has no manifest.json, so the recording was not finished, or it is another archive")
        if info.file_size > files.MOST_BYTES:
            raise ValueError("its manifest.json is too large")
        manifest = files.parse_json(self._archive.read(info).decode())
        if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"its manifest.json does not say {FORMAT}, version {VERSION}")
        self.layers = tuple(_layer(entry) for entry in _list(manifest, "layers", dict))
        self.columns = tuple(_list(manifest, "columns", str))
        self.pieces = tuple(_list(manifest, "pieces", int))
        self.domains = tuple(_list(manifest, "domains", str))
        self.missing = tuple(_list(manifest, "missing", str))
        self.token_columns = _token_columns(manifest)
        source = manifest.get("source")
        self.source: dict[str, Any] = source if isinstance(source, dict) else {}
        if not self.layers or not self.pieces:
            raise ValueError("it has no layers or no tokens")
        if len({layer.layer for layer in self.layers}) != len(self.layers):
            raise ValueError("its manifest has a layer twice")
        if not set(self.columns) <= set(COLUMNS):
            raise ValueError(f"its manifest has columns other than {', '.join(COLUMNS)}")
        if not all(1 <= n <= _MOST_PIECE for n in self.pieces):
            raise ValueError(f"a piece must have 1 to {_MOST_PIECE} tokens")

    def _damaged(self, error: BaseException) -> ValueError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return ValueError(f"{self.path}: not a trace that can be read ({str(reason).rstrip('.')}); record it again.")


def _names(trace: Trace | TraceWriter) -> tuple[str, ...]:
    """What each layer has."""
    return ("expert_ids", *trace.columns)


def _token_shape(width: int, n: int) -> tuple[int, ...]:
    return (n,) if width == 1 else (n, width)


def _require_least(name: str, values: np.ndarray, where: str) -> None:
    if values.size and values.min() < TOKEN_COLUMNS[name].least:
        raise ValueError(f"{where}: {values.min()} is below {TOKEN_COLUMNS[name].least:g}")


def _token_columns(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Names and widths; older manifests have the number of other routes alone."""
    n_routes = manifest.get("counterfactual_routes", 0)
    if type(n_routes) is not int or not 0 <= n_routes <= MOST_ROUTES:
        raise ValueError(f"its manifest has counterfactual_routes other than 0 to {MOST_ROUTES}")
    found = manifest.get("token_columns", {"log_p": 2 + n_routes} if n_routes else {})
    if not isinstance(found, dict) or not found.keys() <= TOKEN_COLUMNS.keys():
        raise ValueError(f"its manifest has token_columns other than {', '.join(TOKEN_COLUMNS)}")
    for name, width in found.items():
        widths = TOKEN_COLUMNS[name].widths
        if type(width) is not int or width not in widths:
            raise ValueError(f"its manifest has a {name} of a width other than {widths[0]} to {widths[-1]}")
    return found


def dtype_of(name: str) -> str:
    """The dtype of one of `COLUMNS`, or of `expert_ids`."""
    return "<i2" if name in ("expert_ids", *GUESSES) else "<f4"


def shape_of(name: str, layer: Layer, n: int) -> tuple[int, ...]:
    """The shape that it has of n tokens."""
    if name in GUESSES:
        return n, guess_width(layer)
    return {"margin": (n,), "logits": (n, layer.n_experts)}.get(name, (n, layer.top_k))


def guess_width(layer: Layer) -> int:
    """How many experts a guess names: twice as many as a token uses."""
    return min(2 * layer.top_k, layer.n_experts)


def _list(manifest: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = manifest.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"its manifest needs a list of {kind.__name__}, {key}")
    return values


def _layer(entry: Mapping[str, Any]) -> Layer:
    number, n_experts, top_k, size = (entry.get(name) for name in Layer.__dataclass_fields__)
    if not all(type(value) is int for value in (number, n_experts, top_k)) or type(size) not in (int, type(None)):
        raise ValueError("a layer of its manifest has no sizes")
    layer = Layer(number, n_experts, top_k, size)  # type: ignore[arg-type]
    if layer.layer < 0 or not (1 <= layer.n_experts <= MOST_EXPERTS and 1 <= layer.top_k <= MOST_K):
        raise ValueError(f"its manifest has a layer of {layer.n_experts} experts, {layer.top_k} for a token")
    if size is not None and layer.bytes_per_expert <= 0:  # type: ignore[operator]
        raise ValueError("its manifest has an expert without bytes")
    return layer
