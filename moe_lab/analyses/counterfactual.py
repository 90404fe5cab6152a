"""How much better another route of the same cost would be: regret against the best of n (2605.07260).

The trace has for each token the probability p of the token that follows, by the model's own route and by each of n
others (runs/counterfactual.py: Gumbel top-k in all layers at once). In bits, with b the first m of the n:

    bits          -log2 p(own), mean over tokens
    best          -log2 max(p(own), max_b p(b)): what a router would reach that knew the next token
    regret        bits - best
    by_chance     -log2 p(first other route) - bits: what a route costs that is drawn instead of chosen

The best is chosen with the next token in hand, so it gains by luck as well, and the more the more routes there are: it
bounds what a choice among these routes could gain, and no router would gain it. `confidence` is the largest probability
that the model's own route gives to any next token. Intervals are over sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Plot, columns, line, percent, times
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import Estimate, ratio_of_sums
from moe_lab.records.trace import Layer

CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""The ends of the classes of tokens; a class has its lower end, the last both."""


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Nothing: what is compared are whole routes, through all layers."""


def conclude(parts: Sequence[None], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Findings:
    """The findings, from what the view has."""
    found = Findings(
        "counterfactual",
        "Other routes at the same cost",
        "Each token was computed again by other routes of as many experts, drawn by the router's own probabilities in "
        "all layers at once. The best of them is chosen with the next token in hand: no choice among them gains more.",
    )
    log_p = view.of_tokens.get("log_p")
    if log_p is None:
        found.notes.append("The trace has no counterfactual routes; moe-lab trace --routes records them.")
        return found
    bits_TN = -log_p[:, 1:].astype(np.float64) / np.log(2)
    n, confidence_T = bits_TN.shape[1] - 1, np.exp(log_p[:, 0])
    found.tables = {
        "counterfactual": pd.DataFrame([_row(view, bits_TN, m) for m in sorted({*cfg["routes"], n}) if m <= n]),
        "counterfactual_confidence": pd.DataFrame(_by_confidence(view, bits_TN, confidence_T)),
    }
    if left_out := [m for m in cfg["routes"] if m > n]:
        found.notes.append(f"The trace has {n} routes of each token, so there is no best of {left_out}.")
    table, classes = found.tables.values()
    found.sentences = _sentences(table, classes, _mean(view, bits_TN[:, 1] - bits_TN[:, 0]))
    lines = [line("best of so many", table, "routes", "regret")]
    found.plots = [Plot("counterfactual", "Regret of the model's own routes", "other routes", "bits a token", lines)]
    return found


def _mean(view: View, values_T: np.ndarray, chosen_T: np.ndarray | None = None) -> Estimate:
    """Over the chosen tokens, with the sequences as units."""
    weight_T = np.ones(len(values_T)) if chosen_T is None else chosen_T.astype(float)
    values_U, weight_U = view.by_unit(values_T * weight_T), view.by_unit(weight_T)
    return ratio_of_sums(values_U[weight_U > 0], weight_U[weight_U > 0])


def _row(view: View, bits_TN: np.ndarray, m: int) -> dict[str, Any]:
    best_T = bits_TN[:, : m + 1].min(axis=1)
    regret = _mean(view, bits_TN[:, 0] - best_T)
    better = _mean(view, (best_T < bits_TN[:, 0]).astype(float))
    own, best = _mean(view, bits_TN[:, 0]), _mean(view, best_T)
    return {
        "routes": m,
        **columns("bits", own),
        **columns("best", best),
        **columns("regret", regret),
        **columns("share_with_a_better_route", better),
    }


def _by_confidence(view: View, bits_TN: np.ndarray, confidence_T: np.ndarray) -> list[dict[str, Any]]:
    regret_T, rows = bits_TN[:, 0] - bits_TN.min(axis=1), []
    total = max(float(regret_T.sum()), 1e-300)
    for low, high in itertools.pairwise(CONFIDENCE):
        chosen_T = (confidence_T >= low) & ((confidence_T < high) | (high == CONFIDENCE[-1]))
        if not chosen_T.any():
            continue
        rows.append(
            {
                "confidence_from": low,
                "confidence_to": high,
                "share_of_tokens": float(chosen_T.mean()),
                **columns("bits", _mean(view, bits_TN[:, 0], chosen_T)),
                **columns("regret", _mean(view, regret_T, chosen_T)),
                "share_of_regret": float(regret_T[chosen_T].sum()) / total,
                **columns("by_chance", _mean(view, bits_TN[:, 1] - bits_TN[:, 0], chosen_T)),
            }
        )
    return rows


def _sentences(table: pd.DataFrame, classes: pd.DataFrame, by_chance: Estimate) -> list[str]:
    def interval(row: pd.Series, name: str) -> str:
        ends = [row[f"{name}_ci95_{end}"] for end in ("low", "high")]
        return times(row[name], *(None if pd.isna(end) else end for end in ends))

    last = table.iloc[-1]
    assert by_chance.value is not None
    sentences = [
        f"A router that knew the next token would need {interval(last, 'regret')} bits a token less than the model's "
        f"own, {last['bits']:.2f}, with the best of {last['routes']:.0f} other routes at the same cost; for "
        f"{percent(last['share_with_a_better_route'])} of the tokens one of them is better. A route drawn instead of "
        f"chosen needs {times(by_chance.value, by_chance.low, by_chance.high)} bits more."
    ]
    if len(classes) > 1:
        unsure, sure = classes.iloc[0], classes.iloc[-1]
        sentences.append(
            f"Where the likeliest next token has less than {percent(unsure['confidence_to'])} "
            f"({percent(unsure['share_of_tokens'])} of the tokens) the regret is {interval(unsure, 'regret')} bits, "
            f"where it has at least {percent(sure['confidence_from'])} ({percent(sure['share_of_tokens'])}) "
            f"{interval(sure, 'regret')}."
        )
    return sentences
