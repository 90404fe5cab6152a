"""Which made-up load is like a trace: a power law and a Dirichlet distribution fitted to it, and how good they are.

The tokens, in the order in which they were computed, are cut into steps of `step_tokens`. Of a layer, with c_r the
slots of its expert of rank r (by load) in all steps, N their sum, n the slots of a step, s_e the share of expert e in
one:

    zipf_exponent    a of the shares r^-a / sum r^-a, of the largest likelihood: sum_r c_r ln r / N equals the mean of
                     ln r under these shares (Clauset et al. 2009, 0706.1062, here of a bounded range).
                     `workload.load=zipf workload.zipf_exponent=a` makes this load
    zipf_distance    half of the sum of the absolute differences of fitted and true shares: slots in the wrong place
    concentration    A of s ~ Dirichlet(A m), m the mean shares, by moments of the Dirichlet-multinomial: with
                     rho = sum_e var(s_e) / sum_e m_e (1 - m_e), A = n (1 - rho) / (n rho - 1). The smaller, the more
                     the steps differ; none if they differ less than draws by chance would

and what a kernel sees of it, the mean over steps of the fullest expert's slots over the mean:

    fullest          of the trace; fullest_zipf, fullest_dirichlet: of the two fits, the second of as many drawn steps

A fit that gives another `fullest` than the trace gives another latency; `workload.load=replay` has the trace's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Line, Plot, columns, percent, times
from moe_lab.analyses.placement import step_counts
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer

_MOST_EXPONENT = 20.0  # above, one expert has all


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> np.ndarray:
    """Slots of each step and expert [S, E]."""
    return step_counts(routes.ids_TK[routes.view.computed], routes.layer.n_experts, cfg["step_tokens"])


def zipf_exponent(counts_E: np.ndarray) -> float:
    """The exponent of the largest likelihood, by bisection; 0 for even counts."""
    ranks_E = np.log(np.arange(1, len(counts_E) + 1))
    wanted = float((np.sort(counts_E)[::-1] * ranks_E).sum() / counts_E.sum())
    low, high = 0.0, _MOST_EXPONENT
    for _ in range(60):
        middle = (low + high) / 2
        shares_E = zipf_shares(len(counts_E), middle)
        low, high = (middle, high) if float((shares_E * ranks_E).sum()) > wanted else (low, middle)
    return low


def zipf_shares(n_experts: int, exponent: float) -> np.ndarray:
    """r^-exponent, r = 1 .. E, of which the sum is 1."""
    shares_E = np.arange(1, n_experts + 1, dtype=float) ** -exponent
    return np.asarray(shares_E / shares_E.sum())


def concentration(counts_SE: np.ndarray) -> float | None:
    """A of the Dirichlet-multinomial; None if the steps differ less than by chance."""
    n = float(counts_SE.sum(axis=1).mean())
    shares_SE = counts_SE / counts_SE.sum(axis=1, keepdims=True)
    m_E = shares_SE.mean(axis=0)
    rho = float(shares_SE.var(axis=0, ddof=1).sum() / (m_E * (1 - m_E)).sum())
    return n * (1 - rho) / (n * rho - 1) if n * rho > 1 and rho < 1 else None


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
        drawn_SE = rng.dirichlet(np.maximum(A * m_E, 1e-6), len(counts_SE)) if A is not None else m_E[None]
        drawn = fullest(rng.multinomial(slots, drawn_SE))
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
    names = ("fullest", "fullest_zipf", "fullest_dirichlet")
    lines = [Line(name, x, table[name].to_numpy(float)) for name in names if table[name].notna().any()]
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
