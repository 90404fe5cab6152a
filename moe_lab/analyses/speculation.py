"""What speculative decoding gains: measured times of verification steps, joined with the experts that they load.

`results` is the folder of a sweep over `workload.window` and `batch` (experiment=speculation). With T(B, g) the median
time of a step that takes g tokens of each of B sequences, U(B, g) the experts that it loads in a layer, a the chance
that a drafted token is accepted, and d the time of drafting one:

    target_efficiency   T(B, 1) / T(B, g)  (MoESD, 2505.19645); of cells timed in the same rounds the median of the
                        rounds' ratios, with its interval
    accepted            (1 - a^g) / (1 - a): tokens that a step gives, g - 1 drafted ones and the model's own
                        (Leviathan et al., 2211.17192); g for a = 1
    speed_up            accepted T(B, 1) / (T(B, g) + (g - 1) d)
    experts_measured    U(B, g) of the runs, mean over layers and steps
    experts_predicted   U(B, g) of the trace (unique_experts.py)
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
from moe_lab.intervals import Estimate
from moe_lab.records import store
from moe_lab.records.schema import Ratio, Record
from moe_lab.records.trace import Layer

Cells = list[dict[str, Any]]


def cells(folder: str) -> Cells:
    """The verification steps that were timed: batch, window, ms, target efficiency, experts of a layer.

    Raises:
        ValueError: there are none below `folder`, or two for one batch and window.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for file in sorted(Path(folder).rglob(store.RESULT)):
        record = store.read_record(file.parent)
        workload = record.config.get("workload") or {}
        if record.status != "ok" or workload.get("phase") != "decode" or record.latency_ms is None:
            continue
        key = int(record.config["batch"]), int(workload.get("window", 1))
        if key in found:
            raise ValueError(
                f"speculation.results={folder}: two results for batch={key[0]}, workload.window={key[1]}; give the "
                "folder of a sweep over these two alone (experiment=speculation)."
            )
        found[key] = {"batch": key[0], "window": key[1], **_measured(record)}
    if not found:
        raise ValueError(
            f"speculation.results={folder}: has no results of steps of decoding; give the folder of a sweep "
            "(experiment=speculation)."
        )
    return [_with_efficiency(found[key], found.get((key[0], 1))) for key in sorted(found)]


def _measured(record: Record) -> dict[str, Any]:
    assert record.latency_ms is not None
    layers = (record.routing or {}).get("layers") or []
    return {
        "cell_id": record.cell_id,
        "ms": record.latency_ms.p50,
        "experts_measured": float(np.mean([layer["unique_experts"] for layer in layers])) if layers else np.nan,
        "ratio": record.ratio_to_anchor,
    }


def _with_efficiency(cell: dict[str, Any], one: dict[str, Any] | None) -> dict[str, Any]:
    """`cell` with its target efficiency, NaN without a step of one token to compare with."""
    ratio: Ratio | None = cell["ratio"]
    efficiency = Estimate(None, None, None)
    if one is not None and ratio is not None and ratio.anchor == one["cell_id"] != cell["cell_id"]:
        low, high = (None if end is None else 1 / end for end in (ratio.ci95_high, ratio.ci95_low))
        efficiency = Estimate(1 / ratio.p50, low, high)
    elif one is not None:
        efficiency = Estimate(one["ms"] / cell["ms"], None, None)
    shown = {key: value for key, value in cell.items() if key not in ("cell_id", "ratio")}
    return {**shown, **columns("target_efficiency", efficiency)}


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
    for cell in cfg["cells"]:
        B, g = cell["batch"], cell["window"]
        row = {**cell, "experts_predicted": predicted.get((B, g), np.nan)}
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
    lines = [
        line(f"batch {B}, acceptance {acceptance:g}", of_batch, "window", f"speed_up_{acceptance:g}")
        for B, of_batch in table.astype({f"speed_up_{a:g}": float for a in cfg["acceptance"]}).groupby("batch")
        for acceptance in cfg["acceptance"]
    ]
    found.plots = [Plot("speculation", "Speed-up of speculative decoding", "tokens of a step", "speed-up", lines, True)]
    return found


def _sentences(table: pd.DataFrame, cfg: Mapping[str, Any]) -> list[str]:
    """Of the smallest batch and the largest: the window that gains most, and what its steps load."""
    sentences, acceptance = [], cfg["acceptance"][len(cfg["acceptance"]) // 2]
    name = f"speed_up_{acceptance:g}"
    for B in sorted({table["batch"].min(), table["batch"].max()}):
        of_batch = table[(table["batch"] == B) & table[name].notna()]
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
    return sentences
