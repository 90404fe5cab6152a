"""Traces in the formats of others: `moe-lab trace FILE --to FORMAT`.

Each function writes a file and returns a sentence on what it does not hold of the trace.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from moe_lab.analyses import parquet as table
from moe_lab.records.trace import Trace


def parquet(trace: Trace, path: Path) -> str:
    """The table that `importers.parquet` reads, with every column of the trace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        table.write(trace, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return "the manifest: numbers and sizes of experts, where the trace comes from, what it misses"


def vllm(trace: Trace, path: Path) -> str:
    """An array of int32 [tokens, layers of the model, k] as vLLM's `routed_experts`; layers without experts are zeros.

    Raises:
        ValueError: a token uses fewer experts than another, which the format cannot say.
    """
    (K, *others), n_layers = {layer.top_k for layer in trace.layers}, max(layer.layer for layer in trace.layers) + 1
    if others:
        raise ValueError(f"{trace.path}: its layers have different numbers of experts for a token; use --to parquet.")
    streams = [trace.pieces_of(index, "expert_ids") for index in range(len(trace.layers))]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            header = {"descr": "<i4", "fortran_order": False, "shape": (trace.n_tokens, n_layers, K)}
            npy.write_array_header_1_0(file, header)
            for n in trace.pieces:
                ids_TLK = np.zeros((n, n_layers, K), "<i4")
                for layer, stream in zip(trace.layers, streams, strict=True):
                    ids_TLK[:, layer.layer] = next(stream)
                if ids_TLK.min() < 0:
                    raise ValueError(f"{trace.path}: some tokens use fewer than {K} experts; use --to parquet.")
                file.write(ids_TLK.tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    names = ("sequence", "position", "phase", "token", "domain", *trace.token_columns, *trace.columns)
    return f"{', '.join(names)}, and the manifest: the format has routes only"


FORMATS: dict[str, Callable[[Trace, Path], str]] = {write.__name__: write for write in (parquet, vllm)}
