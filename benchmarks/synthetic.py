"""Writes folders of records like those of a sweep, without running anything; for tests and benchmarks.

The numbers follow a simple rule with noise: latency grows with the tokens, and sinkhorn and the loop are slower. Some
cells failed, some were skipped, some have warnings.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import moe_lab
from moe_lab import marks
from moe_lab.measure.statistics import median_interval, summarize
from moe_lab.records import fields, identity, variants
from moe_lab.records.schema import Check, Ratio, Record
from moe_lab.records.store import RESULT
from moe_lab.sweep.plan import plain

LAYERS = {"decoder_moe": 4, "moe_layer": 1}
VARIANTS = (("torch", "grouped"), ("torch", "loop"), ("sinkhorn", "grouped"), ("sinkhorn", "loop"))
"""Router and experts; the first is the anchor."""
SLOWDOWN = {"torch": 1.0, "sinkhorn": 1.4, "grouped": 1.0, "loop": 1.7}
N_EXPERTS, TOP_K, ROUNDS = 8, 2, 10
SIZES = {
    "decoder_moe": ["vocab_size=97", "d_model=32", "n_heads=4", "n_layers=2", "mlp_hidden_dim=24", "top_k=2"],
    "moe_layer": ["shape.d_model=32", "shape.mlp_hidden_dim=24"],
}
SHORT = ["device=cpu", "measure.max_time_s=0.02", "measure.warmup_s=0", "measure.roofline=false"]
PHASES = (*marks.NAMES, "other")
ENVIRONMENT = {
    "moe_lab": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "hydra": "1.3.8",
    "numpy": "2.4.6",
    "cuda": None,
    "driver": None,
    "device": "cpu",
    "device_name": "Synthetic CPU",
    "device_memory_mb": None,
    "compute_capability": None,
    "cpu": "Synthetic CPU",
    "cpus": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "host_memory_mb": 16000.5,
    "system": "Linux 6.1",
    "git_sha": "0" * 40,
    "git_dirty": False,
}


def sweep(directory: Path, n_cells: int, *, seed: int = 0, samples: int = 50) -> list[Path]:
    """Write `n_cells` cells over two models, batch, seq_len and four variants, and `plan.json`. Returns their folders.

    The sizes are powers of two, up to ten of each; beyond that `seed` varies. Each cell that is ok has `samples` timing
    samples in ten rounds. About 1 cell in 37 failed and 1 in 41 was skipped.
    """
    rng = np.random.default_rng(seed)
    side = min(10, math.ceil(math.sqrt(n_cells / (len(LAYERS) * len(VARIANTS)))))
    grid = itertools.product(range(n_cells), range(side), range(side), LAYERS, VARIANTS)
    configs = [
        {**_config(model, *variant), "batch": 2**b, "seq_len": 8 * 2**s, "seed": number}
        for number, b, s, model, variant in itertools.islice(grid, n_cells)
    ]
    contents = [identity.content(config) for config in configs]
    ids = [identity.digest(content) for content in contents]
    folders, cells = [], []
    for at, (config, label) in enumerate(zip(configs, variants.labels(contents), strict=True)):
        anchor = at - at % len(VARIANTS)
        record = Record(status="ok", cell_id=ids[at], code_id="c" * 12, config=config, started=_started(at))
        record.interleaved_with = [other for other in ids[anchor : anchor + len(VARIANTS)] if other != ids[at]]
        record.overrides = [f"router={config['router']['name']}", f"batch={config['batch']}"]
        record.status, record.reason = _status(at)
        folder = directory / (
            f"{config['model']['name']}-{config['router']['name']}-{config['experts']['name']}"
            f"-b{config['batch']}-s{config['seq_len']}-cpu-fp32-eager-{ids[at]}"
        )
        folder.mkdir(parents=True)
        if record.status == "ok":
            anchor_id = ids[anchor] if at != anchor and _status(anchor)[0] == "ok" else None
            _measured(record, folder, anchor_id, rng, samples)
        (folder / RESULT).write_text(json.dumps(record.to_dict(), indent=2))
        folders.append(folder)
        cells.append(
            {
                "cell_id": ids[at],
                "directory": folder.name,
                "status": "skipped" if record.status == "skipped" else "done",
                "reason": record.reason,
                "variant": label,
                "setting_id": variants.setting_id(contents[at]),
            }
        )
    plan = {
        "schema": 1,
        "name": "synthetic",
        "commands": [["moe-lab", "-m", "router=torch,sinkhorn", "experts=grouped,loop", "name=it's a sweep"]],
        "compare": list(variants.COMPARE),
        "anchor": None,
        "cells": cells,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(plan, indent=2))
    return folders


@cache
def _config(model: str, router: str, experts: str) -> dict[str, Any]:
    size = "model.n_experts" if model == "decoder_moe" else "model.shape.n_experts"
    sizes = [f"model.{text}" for text in SIZES[model]]
    options = [f"model={model}", f"router={router}", f"experts={experts}", f"{size}={N_EXPERTS}"]
    return plain(moe_lab.compose([*options, *sizes, *SHORT]))


def _status(at: int) -> tuple[Any, str | None]:
    if at % 37 == 5:
        return "failed", "out_of_memory" if at % 2 else "mismatch: layers"
    return ("skipped", "unavailable: no CUDA device here") if at % 41 == 7 else ("ok", None)


def _started(at: int) -> str:
    return f"2026-01-{1 + at // 86400 % 28:02}T{at // 3600 % 24:02}:{at // 60 % 60:02}:{at % 60:02}+00:00"


def _measured(record: Record, folder: Path, anchor_id: str | None, rng: np.random.Generator, samples: int) -> None:
    """What a run that is ok has, in the record and beside it."""
    config = record.config
    model, router, experts = (config[key]["name"] for key in ("model", "router", "experts"))
    tokens, layers = config["batch"] * config["seq_len"], LAYERS[model]
    slowdown = SLOWDOWN[router] * (SLOWDOWN[experts] if tokens > 64 else 1.0)
    ms = layers * (0.05 + 4e-4 * tokens) * slowdown * np.exp(0.02 * rng.standard_normal(samples))
    record.latency_ms = summarize(ms, config["measure"]["target_ci"])
    p50 = record.latency_ms.p50
    record.throughput = {"tokens_per_s": tokens / (p50 / 1e3), "time_per_token_us": p50 * 1e3 / tokens}
    if anchor_id is not None:
        ratios = np.sort(slowdown * np.exp(0.01 * rng.standard_normal(ROUNDS)))
        low, high = median_interval(ratios) or (None, None)
        ratio = Ratio(anchor=anchor_id, p50=float(np.median(ratios)), ci95_low=low, ci95_high=high, rounds=ROUNDS)
        record.ratio_to_anchor = ratio
    shares = rng.dirichlet(np.ones(len(PHASES)))
    phases = {name: float(share * p50) for name, share in zip(PHASES, shares, strict=True)}
    if model == "moe_layer":
        phases["attention"] = None  # type: ignore[assignment]
    if experts == "loop":  # one kernel over three phases
        joined = sum(phases[name] for name in ("dispatch", "experts", "combine"))
        phases |= {"dispatch": None, "experts": None, "combine": None, "dispatch+experts+combine": joined}  # type: ignore
    total = sum(value for value in phases.values() if value is not None)
    record.phases_ms = {"execution": "eager", **phases, "sum_ms": total, "launch_gap_ms": None}
    record.memory = {"peak_mb": 400 + 0.01 * tokens, "parameters_mb": 1.5}
    error = float(abs(rng.standard_normal()) * 1e-6)
    record.check = Check(
        passed=True,
        rel_error=error,
        max_abs_error=4 * error,
        expert_rel_error=error,
        token_rel_error=error,
        near_ties=0,
        free_rel_error=error,
        changed_sets=0,
        reference="fp32, torch, one expert at a time",
    )
    record.implementation = {"router": router, "experts": experts, "add_rms_norm": "torch"}
    record.environment, record.env_id = ENVIRONMENT, identity.env_id(ENVIRONMENT)
    record.elapsed_s = 1.5
    if not record.latency_ms.stable:
        record.warnings = [
            "latency is not stable: the 95 % interval of the median is wider than measure.target_ci=0.02"
        ]

    record.router = dict.fromkeys(fields.names(fields.PROPERTIES), False) | {
        "static_k": True,
        "graph_safe": True,
        "causal": router == "torch",
    }
    record.check.static_k = "verified"
    record.check.causal = "verified" if router == "torch" else None
    skew = 0.3 if router == "sinkhorn" else 1.0
    share_LE = rng.dirichlet(np.ones(N_EXPERTS) / skew, size=layers)
    counts_LE = rng.multinomial(tokens * TOP_K, share_LE)
    metrics = [_metrics(counts_E) for counts_E in counts_LE]
    pooled = _metrics(counts_LE.sum(0))
    record.routing = {
        "pooled": pooled,
        "worst": {**pooled, "load_max_over_mean": max(one["load_max_over_mean"] for one in metrics)},
        "layers": [{"layer": layer, **one} for layer, one in enumerate(metrics)],
    }
    if router == "sinkhorn":
        record.agreement = _agreement(error=0.2 + 0.1 * float(rng.random()))
    pairs_LEE = rng.integers(0, tokens + 1, (layers, N_EXPERTS, N_EXPERTS))
    pairs_LEE = np.minimum(pairs_LEE, pairs_LEE.transpose(0, 2, 1))
    pairs_LEE[:, np.arange(N_EXPERTS), np.arange(N_EXPERTS)] = counts_LE
    _write_arrays(
        folder / "routing.npz",
        layer=np.arange(layers),
        counts_LE=counts_LE,
        mean_score_LE=share_LE.astype(np.float32),
        coactivation_LEE=pairs_LEE,
    )
    _write_arrays(
        folder / "samples.npz",
        ms=ms,
        round=np.arange(samples) * ROUNDS // samples,
        order=np.zeros(samples, int),
        replicate=np.zeros(samples, int),
        stamp_s=np.cumsum(ms) / 1e3,
    )


def _agreement(error: float) -> dict[str, Any]:
    """With router=torch; the floor is what rounding in fp32 leaves."""

    def of(jaccard: float, error: float) -> dict[str, Any]:
        layer = {"jaccard": jaccard, "same_experts": jaccard, "same_first_choice": jaccard}
        pooled = {**layer, "combine_l1": error, "rel_error": error}
        worst = {**pooled, "jaccard": jaccard * 0.9}
        return {"output_rel_error": error, "pooled": pooled, "worst": worst, "layers": [{"layer": 0, **pooled}]}

    return {"reference": "torch", "seconds": 0.1, **of(0.7, error), "floor": of(1.0, 3e-7)}


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """As `store.write_arrays`, but without its flush to the disk: thousands of these would take minutes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.write_bytes(buffer.getvalue())


def _metrics(counts_E: np.ndarray) -> dict[str, float]:
    """All routing metrics; those of the load are computed, the others made up."""
    mean, E = float(counts_E.mean()), len(counts_E)
    share = counts_E[counts_E > 0] / counts_E.sum()
    entropy = -float((share * np.log(share)).sum())
    return {
        **dict.fromkeys(fields.names(fields.METRICS), 0.5),
        "load_max_over_mean": float(counts_E.max()) / mean,
        "load_min_over_mean": float(counts_E.min()) / mean,
        "load_cv": float(counts_E.std()) / mean,
        "load_entropy": entropy / math.log(E),
        "effective_experts": math.exp(entropy),
        "dead_experts": E - len(share),
        "unique_experts": len(share),
        "uniform_unique_experts": 7.5,
        "expert_mb": 0.5 * len(share),
    }
