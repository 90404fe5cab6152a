"""Small traces for the tests of the analyses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moe_lab.analyses.findings import Findings
from moe_lab.analyses.routes import Routes, routes_of, view_of
from moe_lab.records.trace import GUESSES, Layer, Trace, TraceWriter, tokens_of


def write(
    path: Path, sequences: list[list[list[int]]], n_experts: int, domains: list[int] | None = None, mb: int | None = 2
) -> Path:
    """One layer: the experts of each token of each sequence, as many for each; an expert has 2 MB."""
    names = [] if domains is None else [f"text {index}" for index in range(max(domains) + 1)]
    k = max(len(token) for sequence in sequences for token in sequence)
    layers = [Layer(0, n_experts, k, None if mb is None else mb * 1_000_000)]
    with TraceWriter(path, layers, domains=names) as writer:
        for index, sequence in enumerate(sequences):
            ids = np.array([[*token, *[-1] * (k - len(token))] for token in sequence])
            n, domain = len(sequence), -1 if domains is None else domains[index]
            writer.add(tokens_of(np.full(n, index), np.arange(n), "decode", domain=domain), [ids])
    return path


def random(path: Path, n_sequences: int, length: int, n_experts: int = 16, k: int = 2, layers: int = 2) -> Path:
    """Of four texts, each with experts that it likes; a token likes those of the one before."""
    rng = np.random.default_rng(0)
    liked = rng.normal(0, 1.5, (4, n_experts))
    with TraceWriter(
        path, [Layer(layer, n_experts, k, 1_000_000) for layer in range(layers)], domains=list("abcd")
    ) as writer:
        for index in range(n_sequences):
            ids = []
            for _ in range(layers):
                score_TE = rng.gumbel(size=(length, n_experts)) + liked[index % 4]
                score_TE[1:] += score_TE[:-1] / 2
                ids.append(np.argsort(-score_TE, axis=1)[:, :k])
            writer.add(tokens_of(np.full(length, index), np.arange(length), "prefill", domain=index % 4), ids)
    return path


def routes(path: Path, index: int = 0) -> Routes:
    """One layer of a trace."""
    with Trace(path) as trace:
        return routes_of(trace, index, view_of(trace))


def found(path: Path, analysis: ModuleType, cfg: dict[str, Any]) -> Findings:
    """What an analysis finds in all layers."""
    with Trace(path) as trace:
        view = view_of(trace)
        layers = [
            routes_of(trace, index, view, with_before=True, guesses=GUESSES) for index in range(len(trace.layers))
        ]
        given = [[analysis.of_layer(routes, cfg, trace.layers) for routes in layers], view, cfg, trace.layers]
        if hasattr(analysis, "of_model"):
            given.append(analysis.of_model(lambda: layers, cfg, trace.layers, 2))
        result: Findings = analysis.conclude(*given)
    return result
