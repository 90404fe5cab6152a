"""Which made-up load is like a trace: a power law and a Dirichlet distribution fitted to it, and how good they are.

The tokens, in the order in which they were computed, are cut into steps of `step_tokens`; `workloads/fits.py` fits:

    zipf_exponent    of a power law. `workload.load=zipf workload.zipf_exponent=a` makes this load
    zipf_distance    half of the sum of the absolute differences of fitted and true shares: slots in the wrong place
    concentration    of a Dirichlet distribution; the smaller, the more the steps differ

`workload.load=fitted workload.fit=power_law` or `dirichlet` makes these loads in a run. What a kernel sees of them, the
mean over steps of the fullest expert's slots over the mean:

    fullest          of the trace; fullest_zipf, fullest_dirichlet: of the two fits, the second of as many drawn steps

A fit that gives another `fullest` than the trace gives another latency; `workload.load=replay` has the trace's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Line, Plot, columns, percent, times
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer
from moe_lab.workloads.fits import concentration, drawn_counts, step_counts, zipf_exponent, zipf_shares


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> np.ndarray:
    """Slots of each step and expert [S, E]."""
    return step_counts(routes.ids_TK[routes.view.computed], routes.layer.n_experts, cfg["step_tokens"])


def fullest(counts_SE: np.ndarray) -> np.ndarray:
    """The fullest expert's slots over the mean, of each step."""
    return np.asarray(counts_SE.max(axis=1) / counts_SE.mean(axis=1))


def conclude(parts: Sequence[np.ndarray], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    found = Findings(
        "load_fit",
        "Made-up loads like this one",
        "A power law and a Dirichlet distribution, fitted to the experts' shares in steps of "
        f"{cfg['step_tokens']} tokens.",
    )
    if len(parts[0]) < 2:
        found.notes.append(f"The trace has {view.n_tokens} tokens, fewer than two steps; lower load_fit.step_tokens.")
        return found
    rows, rng = [], np.random.default_rng(0)
    for layer, counts_SE in zip(layers, parts, strict=True):
        counts_SE = counts_SE[counts_SE.sum(axis=1) > 0]
        counts_E = counts_SE.sum(axis=0)
        exponent, A = zipf_exponent(counts_E), concentration(counts_SE)
        fitted_E, m_E = zipf_shares(layer.n_experts, exponent), counts_E / counts_E.sum()
        slots = round(float(counts_SE.sum(axis=1).mean()))
        drawn = fullest(drawn_counts(counts_SE, slots, len(counts_SE), rng))
        ones = np.ones(len(counts_SE))
        rows.append(
            {
                "layer": layer.layer,
                "zipf_exponent": exponent,
                "zipf_distance": float(np.abs(np.sort(m_E)[::-1] - fitted_E).sum() / 2),
                "concentration": A,
                **columns("fullest", ratio_of_sums(fullest(counts_SE), ones)),
                "fullest_zipf": float(fitted_E[0] * layer.n_experts),
                "fullest_dirichlet": float(drawn.mean()) if A is not None else None,
                "steps": len(counts_SE),
            }
        )
    table = pd.DataFrame(rows)
    found.tables = {"load_fit": table}
    found.sentences = _sentences(table)
    x = table["layer"].to_numpy(float)
    names = {"fullest": "the trace", "fullest_zipf": "power law", "fullest_dirichlet": "Dirichlet"}
    lines = [Line(shown, x, table[name].to_numpy(float)) for name, shown in names.items() if table[name].notna().any()]
    found.plots = [Plot("load_fit", "The fullest expert of a step", "layer", "slots, fullest over mean", lines)]
    return found


def _sentences(table: pd.DataFrame) -> list[str]:
    low, high = table["zipf_exponent"].min(), table["zipf_exponent"].max()
    sentences = [
        f"A power law with an exponent of {low:.2f} to {high:.2f}, {table['zipf_exponent'].median():.2f} in the middle "
        f"layer, is most like the load (workload.load=zipf workload.zipf_exponent=...); it puts "
        f"{percent(table['zipf_distance'].mean())} of the slots in the wrong place."
    ]
    fits = [f"{times(table['fullest_zipf'].mean())} by the power law"]
    if table["fullest_dirichlet"].notna().all():
        fits.append(f"{times(table['fullest_dirichlet'].mean())} by the Dirichlet distribution")
    sentences.append(
        f"The fullest expert of a step has {times(table['fullest'].mean())} times the mean in the trace, "
        f"{' and '.join(fits)}."
    )
    return sentences
