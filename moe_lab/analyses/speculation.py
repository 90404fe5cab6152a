"""What speculative decoding gains: measured times of verification steps, joined with the experts that they load.

`results` is the folder of a sweep over `workload.window` and `batch` (experiment=speculation), with the routes of the
model's own tokens, with windows of a trace replayed (workload.load=replay), or with both. Cells that differ in their
seed alone, other draws of windows, are pooled. With T(B, g) the median time of a step that takes g tokens of each of B
sequences, U(B, g) the experts that it loads in a layer, a the chance that a drafted token is accepted, and d the time
of drafting one:

    target_efficiency   T(B, 1) / T(B, g)  (MoESD, 2505.19645); of cells timed in the same rounds the median of the
                        rounds' ratios, with its interval; of several draws the geometric mean, with an interval over
                        draws
    accepted            (1 - a^g) / (1 - a): tokens that a step gives, g - 1 drafted ones and the model's own
                        (Leviathan et al., 2211.17192); g for a = 1
    speed_up            accepted T(B, 1) / (T(B, g) + (g - 1) d)
    experts_measured    U(B, g) of the runs, mean over layers and steps
    experts_predicted   U(B, g) of the trace (unique_experts.py)
    mb_measured         the least that a step reads and writes, by the runs' roofline
    mb_predicted        the same with the experts of the trace: what a step of one token moves beside its experts, and
                        U(B, g) experts of each layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses import unique_experts
from moe_lab.analyses.findings import Findings, Plot, columns, line, times
from moe_lab.analyses.routes import Routes, View
from moe_lab.analyses.unique_experts import Unique
from moe_lab.intervals import Estimate, mean_interval, typical
from moe_lab.records import store
from moe_lab.records.schema import Ratio, Record
from moe_lab.records.trace import Layer

Cells = list[dict[str, Any]]


def cells(folder: str) -> Cells:
    """The verification steps that were timed: batch, window, load, draws, ms, experts of a layer, MB, efficiency.

    Raises:
        ValueError: there are none below `folder`, or two for one batch, window, load and seed.
    """
    found: dict[tuple[int, str, int], dict[int, dict[str, Any]]] = {}
    for file in sorted(Path(folder).rglob(store.RESULT)):
        record = store.read_record(file.parent)
        workload = record.config.get("workload") or {}
        if record.status != "ok" or workload.get("phase") != "decode" or record.latency_ms is None:
            continue
        key = int(record.config["batch"]), workload.get("load", "native"), int(workload.get("window", 1))
        draws, seed = found.setdefault(key, {}), int(record.config.get("seed", 0))
        if seed in draws:
            raise ValueError(
                f"speculation.results={folder}: two results for batch={key[0]}, workload.window={key[2]}; give the "
                "folder of a sweep over these two alone (experiment=speculation)."
            )
        draws[seed] = _measured(record)
    if not found:
        raise ValueError(
            f"speculation.results={folder}: has no results of steps of decoding; give the folder of a sweep "
            "(experiment=speculation)."
        )
    return [_pooled(key, found[key], found.get((key[0], key[1], 1), {})) for key in sorted(found)]


def _measured(record: Record) -> dict[str, Any]:
    assert record.latency_ms is not None
    layers = (record.routing or {}).get("layers") or []
    return {
        "cell_id": record.cell_id,
        "ms": record.latency_ms.p50,
        "experts": float(np.mean([layer["unique_experts"] for layer in layers])) if layers else np.nan,
        "mb": record.roofline["bytes"] / 1e6 if record.roofline else np.nan,
        "ratio": record.ratio_to_anchor,
    }


def _pooled(
    key: tuple[int, str, int], draws: dict[int, dict[str, Any]], ones: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """One row of the `draws` of a step by seed; `ones`: those of the step of one token."""
    batch, load, window = key
    efficiencies = [_efficiency(draw, ones[seed]) for seed, draw in draws.items() if seed in ones]
    efficiency = efficiencies[0] if efficiencies else Estimate(None, None, None)
    if len(efficiencies) > 1:
        logs = np.log(np.array([draw.value for draw in efficiencies], float))
        efficiency = Estimate(float(np.exp(logs.mean())), *mean_interval(logs))
    return {
        "batch": batch,
        "window": window,
        "load": load,
        "draws": len(draws),
        "ms": typical([draw["ms"] for draw in draws.values()]),
        "experts_measured": float(np.mean([draw["experts"] for draw in draws.values()])),
        "mb_measured": float(np.mean([draw["mb"] for draw in draws.values()])),
        **columns("target_efficiency", efficiency),
    }


def _efficiency(draw: dict[str, Any], one: dict[str, Any]) -> Estimate:
    """Target efficiency of one draw; `one`: the step of one token of the same seed."""
    ratio: Ratio | None = draw["ratio"]
    if ratio is not None and ratio.anchor == one["cell_id"] != draw["cell_id"]:
        low, high = (None if end is None else 1 / end for end in (ratio.ci95_high, ratio.ci95_low))
        return Estimate(1 / ratio.p50, low, high)
    return Estimate(one["ms"] / draw["ms"], None, None)


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> dict[tuple[int, int], Unique]:
    """The unique experts of each (window, batch) that was timed."""
    asked = {"tokens": sorted({cell["window"] for cell in cfg["cells"]})}
    asked["batch"] = sorted({cell["batch"] for cell in cfg["cells"]})
    return unique_experts.of_layer(routes, asked, layers)


def accepted(acceptance: float, window: int) -> float:
    """Tokens that a step gives, see the head of this file."""
    return float(window) if acceptance == 1 else (1 - acceptance**window) / (1 - acceptance)


def conclude(
    parts: Sequence[dict[tuple[int, int], Unique]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    rows, predicted = [], {}
    for g, B in parts[0]:
        predicted[B, g] = float(np.mean([part[g, B].experts.sum() / part[g, B].steps.sum() for part in parts]))
    mb_per_expert = sum(layer.bytes_per_expert or np.nan for layer in layers) / 1e6
    ones = {(cell["batch"], cell["load"]): cell for cell in cfg["cells"] if cell["window"] == 1}
    for cell in cfg["cells"]:
        B, g = cell["batch"], cell["window"]
        row = {**cell, "experts_predicted": predicted.get((B, g), np.nan), "mb_predicted": np.nan}
        if one := ones.get((B, cell["load"])):
            more = row["experts_predicted"] - one["experts_measured"]
            row["mb_predicted"] = one["mb_measured"] + more * mb_per_expert
        for acceptance in cfg["acceptance"]:
            draft = (g - 1) * (cfg["draft_ms"] or 0.0) / cell["ms"]
            gain = accepted(acceptance, g) / (1 + draft)
            efficiency = [cell[f"target_efficiency{end}"] for end in ("", "_ci95_low", "_ci95_high")]
            row |= columns(f"speed_up_{acceptance:g}", Estimate(*(None if e is None else gain * e for e in efficiency)))
        rows.append(row)
    found = Findings(
        "speculation",
        "What speculative decoding gains",
        "Measured times of steps that verify several tokens of each sequence, the experts that they load, and the "
        "speed-up for a given chance that a drafted token is accepted.",
    )
    table = pd.DataFrame(rows)
    found.tables = {"speculation": table}
    found.sentences = _sentences(table, cfg)
    if not cfg["draft_ms"]:
        found.notes.append("Drafting is taken to cost nothing; speculation.draft_ms says what a drafted token takes.")
    if absent := [f"{row['window']} x {row['batch']}" for row in rows if np.isnan(row["experts_predicted"])]:
        found.notes.append(f"The trace has too few or too short sequences for tokens x batch = {', '.join(absent)}.")
    numbers = {f"speed_up_{acceptance:g}": float for acceptance in cfg["acceptance"]}
    lines = [
        line(f"batch {B}, {load}, acceptance {acceptance:g}", of_load, "window", f"speed_up_{acceptance:g}")
        for (B, load), of_load in table.astype(numbers).groupby(["batch", "load"])
        for acceptance in cfg["acceptance"]
    ]
    found.plots = [Plot("speculation", "Speed-up of speculative decoding", "tokens of a step", "speed-up", lines, True)]
    return found


def _sentences(table: pd.DataFrame, cfg: Mapping[str, Any]) -> list[str]:
    """Of the smallest batch and the largest: the window that gains most, and what its steps load; replay beside it."""
    sentences, acceptance = [], cfg["acceptance"][len(cfg["acceptance"]) // 2]
    name = f"speed_up_{acceptance:g}"
    load = "native" if (table["load"] == "native").any() else table["load"].iloc[0]
    for B in sorted({table["batch"].min(), table["batch"].max()}):
        of_batch = table[(table["batch"] == B) & (table["load"] == load) & table[name].notna()]
        if not (of_batch["window"] == 1).any() or len(of_batch) < 2:
            continue
        best = of_batch.loc[of_batch[name].astype(float).idxmax()]
        one = of_batch.set_index("window").loc[1]
        ends = [None if pd.isna(best[f"{name}_ci95_{end}"]) else best[f"{name}_ci95_{end}"] for end in ("low", "high")]
        text = f"At batch {B} and an acceptance of {acceptance:g}, steps of {best['window']:.0f} tokens are the fastest"
        text += f": {times(best[name], *ends)} times as fast as decoding"
        if best["window"] > 1:
            more = best["experts_measured"] / one["experts_measured"]
            text += (
                f"; one takes {1 / best['target_efficiency']:.2f} times as long and loads {more:.2f} times the experts"
            )
            if not pd.isna(best["experts_predicted"] + one["experts_predicted"]):
                text += f" (by the trace {best['experts_predicted'] / one['experts_predicted']:.2f})"
        sentences.append(f"{text}.")
    by_load = table.pivot(index=["batch", "window"], columns="load", values="ms")
    if {"native", "replay"} <= set(by_load) and (both := (by_load["replay"] / by_load["native"]).dropna()).size:
        sentences.append(
            f"With replayed routes a step takes {both.min():.2f} to {both.max():.2f} times as long as with the model's "
            "own."
        )
    return sentences
