"""Other programs' recordings of routes, converted to traces: `moe-lab import FORMAT FILE`.

Each format is read by one function, whose docstring says which source it follows. What a recording does not say is
listed in the trace (`missing`); what cannot be right, as an id out of range, is one line that names the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_lab.errors import nearest
from moe_lab.records import files, inputs
from moe_lab.records.trace import PIECE, Layer, Tokens, TraceWriter, tokens_of

_NO_TEXTS = "domains and tokens: the format has none"
_NO_SEQUENCES = "sequences, positions and phases: the format has none; all tokens are taken as one sequence"
_NO_WEIGHTS = "weights and margins: the format has none"


class Block(NamedTuple):
    """Some tokens, with their ids [T, K] layer by layer, and what else there is."""

    tokens: Tokens
    ids: list[np.ndarray]
    of_tokens: Mapping[str, np.ndarray] = {}
    more: Mapping[str, list[np.ndarray]] = {}


class Recording(NamedTuple):
    """What a file holds: its layers, its tokens in order, and sentences on what it does not say."""

    layers: list[Layer]
    blocks: Iterator[Block]
    missing: list[str]
    columns: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    token_columns: Mapping[str, int] = {}


class Asked(NamedTuple):
    """What a person said beside the files, where the format does not have it."""

    top_k: int | None = None
    n_experts: int | None = None


def convert(kind: str, paths: Sequence[Path], out: Path, asked: Asked) -> list[str]:
    """Write the trace `out` from the files of one recording; returns what is missing.

    Raises:
        ValueError: an unknown format, or a file that is damaged or not of it: one line that names the file.
    """
    if kind not in FORMATS:
        raise ValueError(f"{kind}: unknown format; choose one of {', '.join(FORMATS)}.{nearest(kind, FORMATS)}")
    shown = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    try:
        for path in paths:
            files.require_plain(path, None)
        source = {
            "written_by": f"moe-lab {version('moe-lab')}",
            "imported_from": kind,
            "files": {path.name: inputs.file_id(path) for path in paths},
        }
        recording = FORMATS[kind](paths, asked)
        layers, missing = recording.layers, recording.missing
        columns, beside = recording.columns, recording.token_columns
        with TraceWriter(out, layers, columns, recording.domains, source, missing, token_columns=beside) as writer:
            for block in recording.blocks:
                writer.add(block.tokens, block.ids, block.of_tokens, **block.more)
    except OSError as error:
        raise ValueError(f"{error.filename or shown}: {error.strerror or error}; give a file of {kind}.") from error
    except (ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        text = str(error).strip().splitlines()
        raise ValueError(
            f"{shown}: not a recording of {kind} ({text[0] if text else type(error).__name__})."
        ) from error
    return missing


def _n_experts(largest: int, asked: Asked, missing: list[str]) -> int:
    if asked.n_experts is not None:
        return asked.n_experts
    missing.append(f"number of experts: the format has none; {largest + 1} is the largest id and one (--n-experts)")
    return largest + 1


# ---- vLLM


def vllm(paths: Sequence[Path], asked: Asked) -> Recording:
    """`routed_experts` of vLLM: a `.npy` of integers [tokens, layers, k], one file for each request.

    Source: `CompletionOutput.routed_experts` of `LLM(enable_return_routed_experts=True)`, an array that is saved with
    `numpy.save`; the server sends the same `.npy` in base64 (vllm-project/vllm, pull request 28284). A request of P
    prompt tokens and G generated ones has P + G - 1 rows. Dense layers are slices of zeros, and left out here.
    """
    arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape:
            raise ValueError(f"{path.name} is not an array of integers [tokens, layers, k]")
        if array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(f"{path.name} is {list(array.shape)}, and the first file {list(arrays[0].shape)}")
    _, n_layers, k = arrays[0].shape
    _require_k(asked, k)
    chunks = [array[a : a + PIECE] for array in arrays for a in range(0, len(array), PIECE)]
    largest_L = np.max([chunk.max(axis=(0, 2)) for chunk in chunks], axis=0)
    missing = [_NO_TEXTS, _NO_WEIGHTS, "phases: the array does not say where the prompt ends"]
    dense = [index for index in range(n_layers) if k > 1 and largest_L[index] == 0]
    if dense:
        missing.append(f"layers {', '.join(map(str, dense))}: all their ids are 0, so they are taken as dense")
    kept = [index for index in range(n_layers) if index not in dense]
    if not kept:
        raise ValueError("all ids are 0")
    E = _n_experts(int(largest_L.max()), asked, missing)

    def blocks() -> Iterator[Block]:
        for sequence, array in enumerate(arrays):
            for first in range(0, len(array), PIECE):
                part = np.asarray(array[first : first + PIECE])
                tokens = tokens_of(np.full(len(part), sequence), first + np.arange(len(part)))
                yield Block(tokens, [part[:, index].astype(np.int64) for index in kept])

    return Recording([Layer(index, E, k) for index in kept], blocks(), missing)


def _require_k(asked: Asked, k: int) -> None:
    if asked.top_k not in (None, k):
        raise ValueError(f"it has {k} experts for a token, not --top-k {asked.top_k}")


# ---- SGLang


def sglang(paths: Sequence[Path], asked: Asked) -> Recording:
    """The `.pt` of SGLang's expert distribution recorder in the mode per_token, one file for each rank.

    Source: `_DetailAccumulator.dump` in python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang: {records:
    [{forward_pass_id, input_ids, positions, extend_seq_lens, forward_mode, topk_ids_of_layer [layers, tokens, 8],
    ...}], last_physical_to_logical_map [layers, physical experts]}. Ids are physical, -1 where a slot is unused. The
    file is a pickle: it is read with `weights_only`, which refuses everything but tensors and plain data. Requests are
    not recorded, so a token that is decoded goes on with the sequence of the same place in the pass before, if its
    position is the next.
    """
    import torch  # the one format that needs it

    contents = []
    for path in paths:
        try:
            contents.append(torch.load(path, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"{path.name} has more than tensors and plain data, so it is not loaded") from error
    for path, content in zip(paths, contents, strict=True):
        if isinstance(content, dict) and "logical_count" in content:
            raise ValueError(f"{path.name} has counts and no routes; record with mode per_token")
        if not isinstance(content, dict) or not isinstance(content.get("records"), list) or not content["records"]:
            raise ValueError(f"{path.name} has no records")
    to_logical_LP = np.asarray(contents[0]["last_physical_to_logical_map"])
    passes = [_sglang_pass(record) for content in contents for record in content["records"]]
    if len({ids_LTK.shape[::2] for ids_LTK, *_ in passes}) > 1:
        raise ValueError("its records have different numbers of layers")
    used_LK = np.any([(ids_LTK >= 0).any(axis=1) for ids_LTK, *_ in passes], axis=0)
    if to_logical_LP.ndim != 2 or len(to_logical_LP) != len(used_LK):
        raise ValueError(f"it maps the experts of {len(to_logical_LP)} layers, and has routes of {len(used_LK)}")
    if not used_LK.any() or not to_logical_LP.size:
        raise ValueError("it has no routes, or maps no experts")
    kept, k = [int(index) for index in np.flatnonzero(used_LK.any(axis=1))], int(used_LK.any(axis=0).sum())
    _require_k(asked, k)
    missing = [_NO_WEIGHTS, "domains: the format has none", "requests: guessed from places and positions"]
    if len(kept) < len(used_LK):
        missing.append(f"{len(used_LK) - len(kept)} of {len(used_LK)} layers: they have no routes, so they are dense")
    E = asked.n_experts or int(to_logical_LP.max()) + 1

    def blocks() -> Iterator[Block]:
        n_sequences, before = 0, np.empty((0, 2), np.int64)
        for ids_LTK, position, token, lengths in passes:
            if ids_LTK[:, :, k:].max(initial=-1) >= 0:
                raise ValueError(f"a token has more than {k} experts")
            if ids_LTK.max(initial=-1) >= to_logical_LP.shape[1]:
                raise ValueError(f"expert {ids_LTK.max()} is outside its map of {to_logical_LP.shape[1]} experts")
            if lengths is None:
                sequence, n_sequences = _continued(position, before, n_sequences)
                before = np.stack([sequence, position], axis=1)
            else:
                sequence = n_sequences + np.arange(len(lengths)).repeat(lengths)
                n_sequences += len(lengths)
                ends = np.cumsum(lengths) - 1
                before = np.stack([sequence[ends], position[ends]], axis=1)
            phase = "decode" if lengths is None else "prefill"
            ids = [_logical(ids_LTK[index, :, :k], to_logical_LP[index]) for index in kept]
            yield Block(tokens_of(sequence, position, phase, token), ids)

    return Recording([Layer(index, E, k) for index in kept], blocks(), missing)


def _logical(ids_TK: np.ndarray, to_logical_P: np.ndarray) -> np.ndarray:
    return np.where(ids_TK >= 0, to_logical_P[np.maximum(ids_TK, 0)], -1)


def _sglang_pass(record: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(physical ids [L, T, K], positions, token ids, lengths of the sequences of a prefill or None)."""
    if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
        raise ValueError("a record has no topk_ids_of_layer; record with mode per_token")
    ids_LTK = np.asarray(record["topk_ids_of_layer"])
    token, position = (np.asarray(record[name], dtype=np.int64) for name in ("input_ids", "positions"))
    lengths = record.get("extend_seq_lens")
    n = len(token)
    if ids_LTK.ndim != 3 or ids_LTK.shape[1] != n or position.shape != (n,):
        raise ValueError(
            f"a record of {n} tokens has routes {list(ids_LTK.shape)} and positions {list(position.shape)}"
        )
    lengths_B = None if lengths is None else np.asarray(lengths, dtype=np.int64)
    if lengths_B is not None and (lengths_B.ndim != 1 or (lengths_B < 1).any() or int(lengths_B.sum()) != n):
        raise ValueError(f"a record of {n} tokens has sequences of {int(lengths_B.sum())}")
    return ids_LTK, position, token, lengths_B


def _continued(position_B: np.ndarray, before: np.ndarray, n_sequences: int) -> tuple[np.ndarray, int]:
    """(sequence of each token of a decoding pass, sequences so far), from those at the same places before."""
    sequence_B = np.empty(len(position_B), np.int64)
    for place, position in enumerate(position_B):
        if place < len(before) and before[place, 1] + 1 == position:
            sequence_B[place] = before[place, 0]
        else:
            sequence_B[place], n_sequences = n_sequences, n_sequences + 1
    return sequence_B, n_sequences


# ---- llama.cpp

_CSV_HEADER, _CSV_CHUNK = b"layer,expert", 1 << 24


def llama_cpp(paths: Sequence[Path], asked: Asked) -> Recording:
    """The CSV of llama.cpp's moe-trace: a row `layer,expert` for each expert that a token uses in a layer.

    Source: examples/moe-trace of ggml-org/llama.cpp, pull request 28544, which downloads the tensors `ffn_moe_topk` of
    a batch layer by layer. The rows of a layer are its tokens in order, k rows a token; k does not stand in the file
    (--top-k). A header may stand at the start, and in the middle where files were concatenated.
    """
    if asked.top_k is None:
        raise ValueError("the rows do not say where a token ends; give --top-k, the experts that a token uses")
    K, rows, largest = asked.top_k, dict[int, int](), -1
    for layer_N, expert_N in _csv_rows(paths):
        for layer, n in zip(*np.unique(layer_N, return_counts=True), strict=True):
            rows[int(layer)] = rows.get(int(layer), 0) + int(n)
        if int(min(layer_N.min(), expert_N.min())) < 0:
            raise ValueError("a layer or an expert is negative")
        largest = max(largest, int(expert_N.max()))
    if not rows:
        raise ValueError("it has no rows")
    for layer, n in rows.items():
        if n % K:
            raise ValueError(f"layer {layer} has {n} rows, not a multiple of --top-k {K}")
    if len(set(rows.values())) > 1:
        fewest = min(rows, key=lambda layer: rows[layer])
        raise ValueError(
            f"layer {fewest} has {rows[fewest] // K} tokens, and another {max(rows.values()) // K}: it is cut off, or "
            "the layers have another --top-k"
        )
    missing = [_NO_TEXTS, _NO_WEIGHTS, _NO_SEQUENCES]
    E, layers = _n_experts(largest, asked, missing), sorted(rows)

    def blocks() -> Iterator[Block]:
        waiting = {layer: np.empty(0, np.int32) for layer in layers}
        done = 0
        for layer_N, expert_N in _csv_rows(paths):
            for layer in layers:
                waiting[layer] = np.concatenate([waiting[layer], expert_N[layer_N == layer]])
            n = min(map(len, waiting.values())) // K
            tokens = tokens_of(np.zeros(n), done + np.arange(n))
            yield Block(tokens, [waiting[layer][: n * K].reshape(n, K) for layer in layers])
            waiting = {layer: values[n * K :] for layer, values in waiting.items()}
            done += n

    return Recording([Layer(layer, E, K) for layer in layers], blocks(), missing)


def _csv_rows(paths: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(layers, experts) of some rows, in order."""
    import pyarrow as pa
    from pyarrow import csv

    names = ["layer", "expert"]
    options = {
        "read_options": csv.ReadOptions(column_names=names, use_threads=False),
        "convert_options": csv.ConvertOptions(column_types=dict.fromkeys(names, pa.int32()), null_values=[]),
    }
    for path in paths:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CSV_CHUNK):
                chunk += stream.readline(1 << 10)
                lines = chunk.replace(b"\r", b"").replace(_CSV_HEADER + b"\n", b"")
                if lines.strip():
                    table = csv.read_csv(pa.BufferReader(lines), **options)
                    yield table["layer"].to_numpy(), table["expert"].to_numpy()


# ---- bench_moe of TensorRT-LLM


def bench_moe(paths: Sequence[Path], asked: Asked) -> Recording:
    """A routing pattern of TensorRT-LLM's bench_moe: how many slots each expert gets. The tokens are made up.

    Source: `--routing_pattern_file` in tests/microbenchmarks/bench_moe (BENCH_MOE_USER_GUIDE.md, case H) of
    NVIDIA/TensorRT-LLM: {ep_size, experts_per_rank, slot_dispatch_matrix [source rank][target rank], expert_histogram
    [target rank][expert of the rank]}; a column of the matrix has as many slots as a row of the histogram. One file is
    one layer. The slots, sorted by expert, are dealt to the tokens in turn, so that no token has an expert twice.
    """
    if asked.top_k is None:
        raise ValueError("a pattern does not say how many experts a token uses; give --top-k")
    K, counts, sent = asked.top_k, [], []
    for path in paths:
        counts_E, source_R = _pattern(files.read_json(path), path.name)
        counts.append(counts_E)
        sent.append(source_R)
        n = int(counts_E.sum())
        if n % K or (source_R % K).any():
            raise ValueError(f"{path.name} has {n} slots, or a rank whose number is not a multiple of --top-k {K}")
        if n != int(counts[0].sum()) or len(counts_E) != len(counts[0]):
            raise ValueError(f"{path.name} has other sizes than the first file")
        if int(counts_E.max()) > n // K:
            raise ValueError(f"{path.name} gives an expert more slots than there are tokens")
    T, E = int(counts[0].sum()) // K, len(counts[0])
    if asked.n_experts not in (None, E):
        raise ValueError(f"it has {E} experts, not --n-experts {asked.n_experts}")
    missing = [
        "routes: the format has counts; which expert goes with which is made up, the load of each is true",
        "ranks: slot_dispatch_matrix is not kept",
        _NO_TEXTS,
        _NO_WEIGHTS,
        _NO_SEQUENCES,
    ]
    ids = [np.repeat(np.arange(E), counts_E).reshape(K, T).T for counts_E in counts]
    block = Block(tokens_of(np.zeros(T), np.arange(T)), ids)
    return Recording([Layer(index, E, K) for index in range(len(counts))], iter([block]), missing)


def _pattern(content: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(slots of each expert, slots that each source rank sends)."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    matrix_RR, histogram_RE = (np.asarray(content[key]) for key in ("slot_dispatch_matrix", "expert_histogram"))
    R, per_rank = content["ep_size"], content["experts_per_rank"]
    for key, array, shape in (
        ("slot_dispatch_matrix", matrix_RR, (R, R)),
        ("expert_histogram", histogram_RE, (R, per_rank)),
    ):
        if array.shape != shape or array.dtype.kind != "i" or (array < 0).any():
            raise ValueError(f"{name}: {key} must be {list(shape)} integers >= 0")
    if not np.array_equal(matrix_RR.sum(axis=0), histogram_RE.sum(axis=1)):
        raise ValueError(f"{name}: a column of slot_dispatch_matrix must have the sum of its row of expert_histogram")
    return histogram_RE.reshape(-1), matrix_RR.sum(axis=1)


# ---- Parquet


def parquet(paths: Sequence[Path], asked: Asked) -> Recording:
    """A table with a row for each token and layer: `layer` and `expert_ids`, a list of integers.

    Source: this project (`moe-lab trace FILE --to parquet`, docs/traces.md), as the plainest table that other programs
    can write. Optional columns: `sequence`, `position`, `token` (integers), `phase` and `domain` (text), `weights` (a
    list of floats, as long as the ids), and what else a trace may have (the head of records/trace.py): `margin`,
    `logits`, `ahead`, `pre_attention`; `log_p` and `predicted`, which are the same in the rows of all layers. The rows
    of every layer are the same tokens in the same order.
    """
    import pyarrow.parquet as pq

    from moe_lab.analyses.parquet import Rows, survey

    tables = [pq.ParquetFile(path) for path in paths]
    found = survey(tables)
    _require_k(asked, found.top_k) if found.is_fixed else None
    K, missing = max(asked.top_k or 1, found.top_k), list(found.missing)
    if found.n_logits:
        for layer, E in found.n_logits.items():
            if asked.n_experts not in (None, E):
                raise ValueError(f"layer {layer} has logits of {E} experts, not --n-experts {asked.n_experts}")
        layers = [Layer(layer, found.n_logits[layer], K) for layer in found.layers]
    else:
        E = _n_experts(found.largest, asked, missing)
        layers = [Layer(layer, E, K) for layer in found.layers]

    def blocks() -> Iterator[Block]:
        rows = Rows(found, layers)
        for table in tables:
            for batch in table.iter_batches(PIECE):
                rows.add(batch)
                yield Block(*rows.take())
        rows.require_empty()

    return Recording(layers, blocks(), missing, found.of_layers, found.domains, found.of_tokens)


# ---- runs of moe-lab before there were traces


def routing_npz(paths: Sequence[Path], asked: Asked) -> Recording:
    """The `routing.npz` that runs with `measure.record_routing=true` wrote before there were traces.

    Source: this project before version 0.2: `expert_ids_LTK` [layers, tokens, k], -1 where unused, and `layer`.
    """
    (path,) = paths
    files.require_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        if "expert_ids_LTK" not in arrays:
            raise ValueError("it has no expert_ids_LTK; run with measure.record_routing=true")
        ids_LTK, n_experts = arrays["expert_ids_LTK"], arrays["counts_LE"].shape[1] if "counts_LE" in arrays else None
        numbers = arrays["layer"].tolist() if "layer" in arrays else list(range(len(ids_LTK)))
    if ids_LTK.ndim != 3 or ids_LTK.dtype.kind not in "iu" or len(numbers) != len(ids_LTK) or 0 in ids_LTK.shape:
        raise ValueError("its expert_ids_LTK is not [layers, tokens, k]")
    _require_k(asked, ids_LTK.shape[2])
    missing = [_NO_TEXTS, _NO_WEIGHTS, _NO_SEQUENCES]
    E = asked.n_experts or n_experts or _n_experts(int(ids_LTK.max()), asked, missing)
    T, K = ids_LTK.shape[1:]
    block = Block(tokens_of(np.zeros(T), np.arange(T)), list(ids_LTK))
    return Recording([Layer(number, E, K) for number in numbers], iter([block]), missing)


FORMATS: dict[str, Callable[[Sequence[Path], Asked], Recording]] = {
    read.__name__: read for read in (vllm, sglang, llama_cpp, bench_moe, parquet, routing_npz)
}
