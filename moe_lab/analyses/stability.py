"""How many routes are others in another trace of the same tokens: of another checkpoint, dtype, kernel or batch size.

With A_t and B_t a token's experts of one layer in the two traces:

    same          sum_t |A_t and B_t| / sum_t |A_t|: OLMoE's router saturation (2409.02060, section 5.1), B the last
                  checkpoint
    changed       share of the tokens with A_t other than B_t
    first_change  share of the tokens whose first changed layer this is: later layers see other inputs (R3, 2510.11370)

and, if both traces have `predicted`, the share of the tokens whose likeliest next token is another.

Intervals are over sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Plot, columns, line, percent
from moe_lab.analyses.routes import Routes, View, routes_of, view_of
from moe_lab.intervals import Estimate, ratio_of_sums
from moe_lab.records.trace import Layer, Trace


class Compared(NamedTuple):
    """Of one layer: common and used slots by unit [U], and which tokens changed [T]."""

    same_U: np.ndarray
    used_U: np.ndarray
    changed_T: np.ndarray


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Compared:
    """One layer against the same layer of the other trace.

    Raises:
        ValueError: the other trace has other tokens, or not this layer.
    """
    view, ids_TK = routes.view, routes.ids_TK
    with Trace(cfg["against"]) as other:
        index = {layer.layer: place for place, layer in enumerate(other.layers)}.get(routes.layer.layer)
        if index is None or other.layers[index].n_experts != routes.layer.n_experts:
            raise ValueError(
                f"stability.against={cfg['against']}: has no layer {routes.layer.layer} of {routes.layer.n_experts} "
                "experts; give a trace of the same model, or of another checkpoint of it."
            )
        other_view = view_of(other, cfg["phase"])
        is_same = view.n_tokens == other_view.n_tokens and np.array_equal(view.is_first, other_view.is_first)
        if not is_same or not np.array_equal(view.token, other_view.token):
            raise ValueError(
                f"stability.against={cfg['against']}: has other tokens; record both with the same texts, seq_len, "
                "--tokens and seed."
            )
        other_TK = routes_of(other, index, other_view).ids_TK
    same_T = np.zeros(len(ids_TK), np.int64)
    for other_T in other_TK.T:
        same_T += ((ids_TK == other_T[:, None]) & (ids_TK >= 0)).any(axis=1)
    used_T, other_used_T = (ids_TK >= 0).sum(axis=1), (other_TK >= 0).sum(axis=1)
    return Compared(view.by_unit(same_T), view.by_unit(used_T), (same_T < used_T) | (same_T < other_used_T))


def conclude(parts: Sequence[Compared], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    changed_LT = np.stack([part.changed_T for part in parts])
    any_T: np.ndarray = np.logical_or.reduce(changed_LT)
    first_T = np.where(any_T, changed_LT.argmax(axis=0), -1)
    tokens_U = view.by_unit(np.ones(view.n_tokens))
    rows = [
        {
            "layer": layer.layer,
            **columns("same", ratio_of_sums(part.same_U, part.used_U, (0.0, 1.0))),
            **columns("changed", ratio_of_sums(view.by_unit(part.changed_T), tokens_U, (0.0, 1.0))),
            "first_change": float((first_T == index).mean()),
        }
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True))
    ]
    table = pd.DataFrame(rows)
    same, used = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("same_U", "used_U"))
    whole, changed = ratio_of_sums(same, used, (0.0, 1.0)), ratio_of_sums(view.by_unit(any_T), tokens_U, (0.0, 1.0))
    assert whole.value is not None and changed.value is not None
    most = table.loc[table["changed"].idxmax()]
    sentences = [
        f"{percent(whole.value, whole.low, whole.high)} of the experts are those of {cfg['against']}; "
        f"{percent(changed.value, changed.low, changed.high)} of the tokens use other experts in at least one layer."
    ]
    if any_T.any():
        sentences.append(
            f"Most change in layer {most['layer']:.0f} ({percent(most['changed'])} of the tokens); the first change is "
            f"most often in layer {table.loc[table['first_change'].idxmax(), 'layer']:.0f}."
        )
    likeliest = _predictions(view, cfg)
    if likeliest is not None and likeliest.value is not None:
        share = percent(likeliest.value, likeliest.low, likeliest.high)
        sentences.append(f"{share} of the tokens have another likeliest next token.")
    return Findings(
        "stability",
        "Routes against those of another trace",
        f"The same tokens in {cfg['against']}, layer by layer.",
        sentences,
        {"stability": table},
        [Plot("stability", "Experts that are the same", "layer", "share", [line("same", table, "layer", "same")])],
    )


def _predictions(view: View, cfg: Mapping[str, Any]) -> Estimate | None:
    """The share of the tokens with another likeliest next token, of those that have one in both traces, if any do."""
    predicted_T = view.of_tokens.get("predicted")
    with Trace(cfg["against"]) as other:
        others_T = view_of(other, cfg["phase"]).of_tokens.get("predicted")
    if predicted_T is None or others_T is None:
        return None
    known_T = (predicted_T >= 0) & (others_T >= 0)
    return ratio_of_sums(view.by_unit(known_T & (predicted_T != others_T)), view.by_unit(known_T), (0.0, 1.0))
