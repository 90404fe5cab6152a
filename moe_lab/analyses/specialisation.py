"""What experts are for: which texts, which token ids, which experts of the layer before.

With N_D the tokens of text D, N_ED those of them that use expert E, k the experts of a token:

    share                N_ED / N_D, OLMoE's domain specialisation (2409.02060, section 5.3); lift: that over k / E,
                         which it is for experts that are chosen by chance
    vocabulary           N_xE / N_x, the share of the tokens with id x that uses expert E: OLMoE's vocabulary
                         specialisation (section 5.4), with x a token's own id (input), that of the token that follows
                         (target), or of the likeliest one by the model (predicted). The number of a layer is its mean
                         over tokens, with E the expert that x uses most in the other parts of the trace, so that a rare
                         id is not special by luck; for any id, E is the expert that the layer uses most there.
    text_information     I(expert; text) / H(text) over slots: 0, all texts load the experts alike; 1, no expert is used
                         by two texts

and how well a token's k experts are guessed (guesses.py), recall = |guess and S| / |S|: from popularity, one of these
ids (the vocabulary specialisation as a prediction), the token before, its experts in the layer before (the flow between
layers), or from its own router, asked before its input is there. Intervals are over sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Line, Plot, columns, percent
from moe_lab.analyses.guesses import IDS, KNOWN_LATER, RECORDED, guess, ids_of, uses
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import Estimate, ratio_of_sums
from moe_lab.records.trace import Layer

VOCABULARY = {"popular": "any", "token_id": "input", "target_id": "target", "predicted_id": "predicted"}
"""The guesses whose first expert is that of the vocabulary specialisation, and of which id."""
_LEAST_TOKENS = 16  # of an id that the table of ids names


class Special(NamedTuple):
    """Of one layer.

    `uses_PE`: tokens of each part that use each expert [P, E]; `right`, `used_U`: right guesses and used slots by unit
    [U]; `first`: tokens whose first guess is right, and those whose id is known, by unit [2, U]; `ids`: by guess the
    most special id of each expert.
    """

    uses_PE: np.ndarray
    right: dict[str, np.ndarray]
    used_U: np.ndarray
    first: dict[str, np.ndarray]
    ids: dict[str, list[dict[str, Any]]]


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Special:
    """Counts, and each guess that this layer allows."""
    view, ids_TK, right, first = routes.view, routes.ids_TK, {}, {}
    for name in cfg["guess"]:
        guess_TK = guess(name, routes)
        if guess_TK is not None:
            right[name] = view.by_unit(_right(ids_TK, guess_TK))
            if name in VOCABULARY:
                of_tokens = ids_of(view, name) if name in IDS else None
                known_T = np.ones(view.n_tokens, bool) if of_tokens is None else of_tokens >= 0
                right_T = known_T & (_right(ids_TK, guess_TK[:, :1]) > 0)
                first[name] = np.stack([view.by_unit(right_T), view.by_unit(known_T)])
    ids = {name: _special_ids(routes, name) for name in IDS if name in right}
    return Special(uses(routes), right, view.by_unit((ids_TK >= 0).sum(axis=1)), first, ids)


def _special_ids(routes: Routes, name: str) -> list[dict[str, Any]]:
    """Of each expert the id of the largest N_xE / N_x among those of some tokens; of two alike the smaller one."""
    of_tokens = ids_of(routes.view, name)
    assert of_tokens is not None
    known_T = of_tokens >= 0
    x_V, place_T, tokens_V = np.unique(of_tokens[known_T], return_inverse=True, return_counts=True)
    ids_TK, E, rows = routes.ids_TK[known_T], routes.layer.n_experts, []
    cells = (place_T[:, None] * E + ids_TK)[ids_TK >= 0]
    share_VE = np.bincount(cells, minlength=len(x_V) * E).reshape(-1, E) / tokens_V[:, None]
    share_VE[tokens_V < _LEAST_TOKENS] = 0
    for expert, v in enumerate(share_VE.argmax(axis=0)):
        if share_VE[v, expert]:
            rows.append({"expert": expert, "id": int(x_V[v]), "share": share_VE[v, expert], "tokens": int(tokens_V[v])})
    return rows


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
        "Which texts and which ids of the vocabulary an expert serves, and how much of a token's experts is known "
        "before its router runs: from the token's id, the token before, or its experts in the layer before, as seen on "
        "the other parts of the trace. The token that follows and the one that the model predicts are known later.",
    )
    table = pd.DataFrame([_row(layer, part) for layer, part in zip(layers, parts, strict=True)])
    found.tables = {"specialisation": table, "specialisation_texts": _shares(parts, view, layers)}
    ids = [
        {"layer": layer.layer, "of": VOCABULARY[name], **row}
        for layer, part in zip(layers, parts, strict=True)
        for name, rows in part.ids.items()
        for row in rows
    ]
    if ids:
        found.tables["specialisation_ids"] = pd.DataFrame(ids)
    pooled, special = {}, {}
    for name in cfg["guess"]:
        having = [part for part in parts if name in part.right]
        if having:
            right_U = np.sum([part.right[name] for part in having], axis=0)
            used_U = np.sum([part.used_U for part in having], axis=0)
            pooled[name] = ratio_of_sums(right_U, used_U, (0.0, 1.0))
        if having and name in VOCABULARY:
            first_U, known_U = np.sum([part.first[name] for part in having], axis=0)
            special[name] = ratio_of_sums(first_U, known_U, (0.0, 1.0))
    found.sentences = _sentences(pooled, special, table, view)
    found.plots = [_plot(table, list(pooled))]
    if {"token_id", "target_id"} & set(cfg["guess"]) and not {"token_id", "target_id"} & pooled.keys():
        found.notes.append("The trace does not say the tokens' ids, so nothing is guessed from them.")
    if "predicted_id" in cfg["guess"] and "predicted_id" not in pooled:
        found.notes.append("The trace has no column predicted; moe-lab trace --predicted records it.")
    if absent := sorted({RECORDED[name] for name in cfg["guess"] if name in RECORDED and name not in pooled}):
        found.notes.append(f"The trace has no column {', '.join(absent)}; moe-lab trace --guesses records it.")
    return found


def _row(layer: Layer, part: Special) -> dict[str, Any]:
    row = {"layer": layer.layer, "text_information": text_information(part.uses_PE)}
    for name, right_U in part.right.items():
        row |= columns(name, ratio_of_sums(right_U, part.used_U, (0.0, 1.0)))
    for name, (first_U, known_U) in part.first.items():
        row |= columns(f"vocabulary_{VOCABULARY[name]}", ratio_of_sums(first_U, known_U, (0.0, 1.0)))
    return row


def _shares(parts: Sequence[Special], view: View, layers: Sequence[Layer]) -> pd.DataFrame:
    """Share and lift of each expert, text by text."""
    tokens_P, rows = np.bincount(view.part[view.unit], minlength=len(view.parts)), []
    for layer, part in zip(layers, parts, strict=True):
        by_chance = part.used_U.sum() / view.n_tokens / layer.n_experts
        share_PE = part.uses_PE / tokens_P[:, None]
        for expert in range(layer.n_experts):
            for name, share in zip(view.parts, share_PE[:, expert], strict=True):
                cell = {"layer": layer.layer, "expert": expert, "part": name}
                rows.append({**cell, "share": share, "lift": share / by_chance})
    return pd.DataFrame(rows)


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
    return Plot("specialisation", "Experts that are guessed", "layer", "recall", lines)


def _sentences(
    pooled: Mapping[str, Estimate], special: Mapping[str, Estimate], table: pd.DataFrame, view: View
) -> list[str]:
    what = {
        "popular": "the layer's most used experts",
        "token_id": "those that its token id used elsewhere",
        "target_id": "those that the id of the token that follows used elsewhere",
        "predicted_id": "those that the id of the likeliest next token used elsewhere",
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
    early = [name for name in shares if name not in (*RECORDED, *KNOWN_LATER)]
    sentences = [
        f"Of the experts that a token uses{words}, {'; '.join(guesses)}."
        for words, names in (
            ("", early),
            (" (its own gate, asked earlier)", RECORDED),
            (" (guessed from what is not known before its router runs)", KNOWN_LATER),
        )
        if (guesses := [text for name, text in shares.items() if name in names])
    ]
    serves = {
        VOCABULARY[name]: percent(estimate.value, estimate.low, estimate.high)
        for name, estimate in special.items()
        if estimate.value is not None
    }
    if of_ids := [f"{share} ({what})" for what, share in serves.items() if what != "any"]:
        of_any = f"; the layer's most used expert serves {serves['any']} of all" if "any" in serves else ""
        sentences.append(
            f"Vocabulary specialisation: the expert that an id uses most elsewhere serves {', '.join(of_ids)} of the "
            f"tokens with that id{of_any}."
        )
    if len(view.parts) > 1 and table["text_information"].notna().any():
        most = table.loc[table["text_information"].idxmax()]
        names = ", ".join(view.parts[:6]) + (", ..." if len(view.parts) > 6 else "")
        sentences.append(
            f"The expert of one slot tells {percent(table['text_information'].mean())} of which part of the trace it "
            f"comes from ({names}), most in layer {most['layer']:.0f} ({percent(most['text_information'])})."
        )
    return sentences
