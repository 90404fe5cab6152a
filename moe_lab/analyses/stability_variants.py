"""What changes if the same tokens are computed otherwise: batch, dtype, kernel, execution, checkpoint.

The numbers of each variant against the first configuration (runs/stability.py has their formulas), over all tokens:

    same            sum |A_t and B_t| / sum |A_t| over layers: if the variant is the last checkpoint, OLMoE's router
                    saturation (2409.02060, section 5.1)
    changed         share of the tokens with other experts in at least one layer; by layer, in this one
    first_change    share of the tokens whose first changed layer this is (R3, 2510.11370)
    near_ties       of the tokens with a change the share whose first change is a near-tie; the others are more than
                    rounding; None where the routers choose by something else than the largest of a softmax
    argmax_changed  share of the tokens with another likeliest next token
    kl_nats         mean KL(first || variant) of the next token's distributions

Intervals are over windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Plot, columns, line, percent
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer

if TYPE_CHECKING:  # which imports torch
    from moe_lab.runs.stability import Compared

_MARGINS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The ends of classes of margins; a class has its lower end, the last both."""


def conclude(variants: Mapping[str, Compared | str], layers: Sequence[Layer], seq_len: int) -> Findings:
    """The findings; a variant that could not be compared has its reason instead of numbers.

    Args:
        variants: by their words.
        layers: the MoE layers.
        seq_len: tokens of a window.
    """
    ran = {name: of for name, of in variants.items() if not isinstance(of, str)}
    rows: list[dict[str, Any]] = [
        {"variant": name} | ({"reason": of} if isinstance(of, str) else _row(of, layers, seq_len))
        for name, of in variants.items()
    ]
    found = Findings(
        "stability",
        "What changes with the batch, the dtype, the kernel or the execution",
        "Each variant computed the same windows beside the first configuration, and was compared with it token by "
        "token. A near-tie is a change whose margin rounding explains.",
        _sentences(rows),
        {"stability": pd.DataFrame(rows)},
    )
    if ran:
        by_layer = [row for name, of in ran.items() for row in _by_layer(name, of, layers, seq_len)]
        found.tables["stability_layers"] = pd.DataFrame(by_layer)
        found.tables["stability_margins"] = pd.DataFrame(
            [row for name, of in ran.items() for row in _margins(name, of)]
        )
        of_layers = found.tables["stability_layers"]
        lines = [line(name, of_layers[of_layers["variant"] == name], "layer", "changed") for name in ran]
        found.plots = [Plot("stability", "Tokens that use other experts", "layer", "share", lines)]
    return found


def _row(of: Compared, layers: Sequence[Layer], seq_len: int) -> dict[str, Any]:
    tokens_W = np.full(len(of.kl_W), seq_len)
    any_W, first_L = of.first_LW.sum(axis=0), of.first_LW.sum(axis=1)
    return {
        **columns("same", ratio_of_sums(of.same_LW.sum(axis=0), of.used_LW.sum(axis=0), (0.0, 1.0))),
        **columns("changed", ratio_of_sums(any_W, tokens_W, (0.0, 1.0))),
        "changed_tokens": int(any_W.sum()),
        "first_changed_layer": layers[int(first_L.argmax())].layer if first_L.any() else None,
        "near_ties": of.near_W.sum() / any_W.sum() if of.near_W is not None and any_W.any() else None,
        **columns("argmax_changed", ratio_of_sums(of.argmax_W, tokens_W, (0.0, 1.0))),
        **columns("kl_nats", ratio_of_sums(of.kl_W, tokens_W, (0.0, math.inf))),
        "implementation": shown(of.implementation),
        "reason": None,
    }


def shown(implementation: Mapping[str, str]) -> str:
    """Who computed what, on a line."""
    return ", ".join(f"{what}: {by}" for what, by in implementation.items())


def _by_layer(name: str, of: Compared, layers: Sequence[Layer], seq_len: int) -> list[dict[str, Any]]:
    tokens_W = np.full(len(of.kl_W), seq_len)
    return [
        {
            "variant": name,
            "layer": layer.layer,
            **columns("same", ratio_of_sums(of.same_LW[index], of.used_LW[index], (0.0, 1.0))),
            **columns("changed", ratio_of_sums(of.changed_LW[index], tokens_W, (0.0, 1.0))),
            **columns("first_change", ratio_of_sums(of.first_LW[index], tokens_W, (0.0, 1.0))),
        }
        for index, layer in enumerate(layers)
    ]


def _margins(name: str, of: Compared) -> list[dict[str, Any]]:
    """First changes by the margin of the first configuration's choice; those without one (k = E) are in no class."""
    counts, _ = np.histogram(of.margins[~np.isnan(of.margins)], _MARGINS)
    return [
        {"variant": name, "margin_from": low, "margin_to": high, "first_changes": int(count)}
        for (low, high), count in zip(pairwise(_MARGINS), counts, strict=True)
    ]


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many change anything, the largest change first, those that change nothing, those that did not run."""
    ran = [row for row in rows if not isinstance(row["reason"], str)]
    same = [
        row for row in ran if not row["changed_tokens"] and not row["argmax_changed"] and row["kl_nats"] is not None
    ]
    changed = sorted((row for row in ran if row not in same), key=lambda row: -row["changed"])
    sentences = []
    if ran:
        most = f"; most with {changed[0]['variant']}" if len(changed) > 1 else ""
        sentences.append(f"{len(changed)} of {len(ran)} variants change routes or likeliest next tokens{most}.")
    sentences += map(_sentence, changed)
    if same:
        names, most_kl = ", ".join(row["variant"] for row in same), max(row["kl_nats"] for row in same)
        sentences.append(
            f"{names}: no token has other experts or another likeliest next token; KL at most {most_kl:.2g} nats."
        )
    return sentences + [f"{row['variant']}: not compared ({row['reason']})." for row in rows if row not in ran]


def _sentence(row: Mapping[str, Any]) -> str:
    def share(key: str) -> str:
        ends = [row[f"{key}_ci95_{end}"] for end in ("low", "high")]
        return percent(row[key], *(None if pd.isna(end) else end for end in ends))

    near = "" if row["near_ties"] is None else f" ({percent(row['near_ties'])} of the first changes are near-ties)"
    changes = "no token uses other experts"
    if row["changed_tokens"]:
        changes = (
            f"{share('changed')} of the tokens use other experts in at least one layer, most often first in layer "
            f"{row['first_changed_layer']:.0f}{near}; {share('same')} of the experts are the same"
        )
    kl = "the KL is not finite" if row["kl_nats"] is None else f"KL {row['kl_nats']:.2g} nats"
    return (
        f"{row['variant']}: {changes}; {share('argmax_changed')} of the tokens have another likeliest next token; {kl}."
    )
