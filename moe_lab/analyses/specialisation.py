"""What experts are for: which texts, which token ids, which experts of the layer before.

With N_D the tokens of text D, N_ED those of them that use expert E, k the experts of a token:

    share                N_ED / N_D, OLMoE's domain specialisation (2409.02060, section 5.3); lift: that over k / E,
                         which it is for experts that are chosen by chance
    text_information     I(expert; text) / H(text) over slots: 0, all texts load the experts alike; 1, no expert is used
                         by two texts

and how well a token's k experts are guessed (guesses.py), recall = |guess and S| / |S|: from popularity, the token's id
(OLMoE's vocabulary specialisation as a prediction), the token before, its experts in the layer before (the flow between
layers), or from its own router, asked before its input is there. Intervals are over sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Line, Plot, columns, percent
from moe_lab.analyses.guesses import RECORDED, guess, uses
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer


class Special(NamedTuple):
    """Of one layer: tokens of each part that use each expert [P, E], and right guesses and used slots by unit [U]."""

    uses_PE: np.ndarray
    right: dict[str, np.ndarray]
    used_U: np.ndarray


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Special:
    """Counts, and each guess that this layer allows."""
    view, ids_TK, right = routes.view, routes.ids_TK, {}
    for name in cfg["guess"]:
        guess_TK = guess(name, routes)
        if guess_TK is not None:
            right[name] = view.by_unit(_right(ids_TK, guess_TK))
    return Special(uses(routes), right, view.by_unit((ids_TK >= 0).sum(axis=1)))


def _right(ids_TK: np.ndarray, guess_TK: np.ndarray) -> np.ndarray:
    """How many of a token's experts are among the guessed ones, [T]."""
    found_TK = np.zeros(ids_TK.shape, bool)
    for guess_T in guess_TK.T:
        found_TK |= ids_TK == guess_T[:, None]
    right_T: np.ndarray = (found_TK & (ids_TK >= 0)).sum(axis=1)
    return right_T


def conclude(parts: Sequence[Special], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    found = Findings(
        "specialisation",
        "What experts are for",
        "Which texts an expert serves, and how much of a token's experts is known before its router runs: from the "
        "token's id, the token before, or its experts in the layer before, as seen on the other parts of the trace.",
    )
    tokens_P = np.bincount(view.part[view.unit], minlength=len(view.parts))
    rows = []
    for layer, part in zip(layers, parts, strict=True):
        recalls = {name: ratio_of_sums(right, part.used_U, (0.0, 1.0)) for name, right in part.right.items()}
        rows.append(
            {
                "layer": layer.layer,
                "text_information": text_information(part.uses_PE),
                **{key: value for name, recall in recalls.items() for key, value in columns(name, recall).items()},
            }
        )
    shares = []
    for layer, part in zip(layers, parts, strict=True):
        by_chance = part.used_U.sum() / view.n_tokens / layer.n_experts
        share_PE = part.uses_PE / tokens_P[:, None]
        for expert in range(layer.n_experts):
            for name, share in zip(view.parts, share_PE[:, expert], strict=True):
                cell = {"layer": layer.layer, "expert": expert, "part": name}
                shares.append({**cell, "share": share, "lift": share / by_chance})
    table = pd.DataFrame(rows)
    found.tables = {"specialisation": table, "specialisation_texts": pd.DataFrame(shares)}
    pooled = {}
    for name in cfg["guess"]:
        having = [part for part in parts if name in part.right]
        if having:
            right_U = np.sum([part.right[name] for part in having], axis=0)
            pooled[name] = ratio_of_sums(right_U, np.sum([part.used_U for part in having], axis=0), (0.0, 1.0))
    found.sentences = _sentences(pooled, table, view)
    found.plots = [_plot(table, list(pooled))]
    if "token_id" in cfg["guess"] and "token_id" not in pooled:
        found.notes.append("The trace does not say the tokens' ids, so nothing is guessed from them.")
    if absent := sorted({RECORDED[name] for name in cfg["guess"] if name in RECORDED and name not in pooled}):
        found.notes.append(f"The trace has no column {', '.join(absent)}; moe-lab trace --guesses records it.")
    return found


def text_information(uses_PE: np.ndarray) -> float | None:
    """I(expert; part) / H(part) over slots; None with one part."""
    p_PE = uses_PE / max(uses_PE.sum(), 1)
    of_both, of_part, of_expert = (
        float(-(p[p > 0] * np.log(p[p > 0])).sum()) for p in (p_PE, p_PE.sum(axis=1), p_PE.sum(axis=0))
    )
    return (of_part + of_expert - of_both) / of_part if of_part else None


def _plot(table: pd.DataFrame, names: Sequence[str]) -> Plot:
    lines = []
    for name in names:
        ends = [table[f"{name}_ci95_{end}"].to_numpy(float) for end in ("low", "high")]
        lines.append(Line(name, table["layer"].to_numpy(float), table[name].to_numpy(float), *ends))
    return Plot("specialisation", "Experts that are known before the router runs", "layer", "recall", lines)


def _sentences(pooled: Mapping[str, Any], table: pd.DataFrame, view: View) -> list[str]:
    what = {
        "popular": "the layer's most used experts",
        "token_id": "those that its token id used elsewhere",
        "previous_token": "those of the token before",
        "layer_before": "those that go with its experts in the layer before",
        "ahead": "those that its router chooses for the hidden states of the layer before",
        "ahead_2k": "twice as many of these",
        "pre_attention": "those that its router chooses for the state before attention",
        "pre_attention_2k": "twice as many of these",
    }
    shares = {
        name: f"{percent(recall.value, recall.low, recall.high)} are among {what[name]}"
        for name, recall in pooled.items()
        if recall.value is not None
    }
    sentences = [
        f"Of the experts that a token uses{words}, {'; '.join(guesses)}."
        for words, from_gate in (("", False), (" (its own gate, asked earlier)", True))
        if (guesses := [text for name, text in shares.items() if (name in RECORDED) is from_gate])
    ]
    if len(view.parts) > 1 and table["text_information"].notna().any():
        most = table.loc[table["text_information"].idxmax()]
        names = ", ".join(view.parts[:6]) + (", ..." if len(view.parts) > 6 else "")
        sentences.append(
            f"The expert of one slot tells {percent(table['text_information'].mean())} of which part of the trace it "
            f"comes from ({names}), most in layer {most['layer']:.0f} ({percent(most['text_information'])})."
        )
    return sentences
