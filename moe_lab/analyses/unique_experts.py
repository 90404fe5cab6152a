"""How many experts a verification step loads: unique experts of g consecutive tokens of B sequences.

A window is g consecutive tokens of one sequence; a step takes one window of each of B sequences, at about the same
place in their sequences. With U the number of different experts of the g B tokens of a step, mean over layers and
steps, and p_e the share of the tokens of a layer that use expert e, k its mean number of experts:

    unique_experts    U
    independent       sum_e 1 - (1 - p_e)^(g B): tokens that choose independently, the popularity of experts kept
    uniform           E (1 - (1 - k / E)^(g B)): and with all experts alike (MoESD, 2505.19645, N(t))
    times_one_token   U(g, B) / U(1, B): how much more a step loads than a step of decoding

Intervals are over sequences (intervals.ratio_of_sums), a step counting with the sequence of its first window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Plot, columns, line, percent, times
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer

_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class Unique(NamedTuple):
    """Of one layer and one (g, B): sums by unit [U], and what chance alone would give."""

    experts: np.ndarray
    steps: np.ndarray
    independent: float
    uniform: float


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> dict[tuple[int, int], Unique]:
    """By g and B; what the trace is too small for is not there."""
    ids_TK, view, E = routes.ids_TK, routes.view, routes.layer.n_experts
    masks_TW = expert_masks(ids_TK, E)
    used_TK = ids_TK >= 0
    share_E = np.bincount(ids_TK[used_TK], minlength=E) / len(ids_TK)
    k = float(used_TK.sum()) / len(ids_TK)
    found = {}
    sequence_T = np.cumsum(view.is_first)
    for g in cfg["tokens"]:
        windows = windows_of(view, g)
        if windows is None:
            continue
        starts_N, place_N = windows
        of_window_NW = masks_TW[starts_N]
        for offset in range(1, g):
            of_window_NW = of_window_NW | masks_TW[starts_N + offset]
        for B in cfg["batch"]:
            groups_GB = groups_of(sequence_T[starts_N], place_N, B)
            if groups_GB is None:
                continue
            joined_GW = np.bitwise_or.reduce(of_window_NW[groups_GB], axis=1)
            unique_G = _BITS[joined_GW.view(np.uint8)].sum(axis=1, dtype=np.int64)
            unit_G = view.unit[starts_N[groups_GB[:, 0]]]
            found[g, B] = Unique(
                np.bincount(unit_G, weights=unique_G, minlength=view.n_units),
                np.bincount(unit_G, minlength=view.n_units),
                float((1 - (1 - share_E) ** (g * B)).sum()),
                E * (1 - (1 - k / E) ** (g * B)),
            )
    return found


def expert_masks(ids_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """The experts of each token as bits of words, uint64 [T, W]."""
    masks_TW = np.zeros((len(ids_TK), -(-n_experts // 64)), np.uint64)
    rows_T = np.arange(len(ids_TK))
    for ids_T in ids_TK.T:
        used = ids_T >= 0
        bits = np.left_shift(np.uint64(1), (ids_T[used] % 64).astype(np.uint64))
        masks_TW[rows_T[used], ids_T[used] // 64] |= bits
    return masks_TW


def windows_of(view: View, g: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(first token, place in its sequence) of every window of g tokens that do not overlap; None without one."""
    first_S = np.flatnonzero(view.is_first)
    length_S = np.diff(np.append(first_S, view.n_tokens))
    n_S = length_S // g
    if not n_S.any():
        return None
    place_N = np.arange(n_S.sum()) - np.repeat(np.cumsum(n_S) - n_S, n_S)
    return np.repeat(first_S, n_S) + place_N * g, place_N


def groups_of(sequence_N: np.ndarray, place_N: np.ndarray, B: int) -> np.ndarray | None:
    """Windows [G, B] of steps of B sequences: at about the same place in theirs, the sequences in an order by chance.

    None where there are fewer sequences than that.
    """
    if B == 1:
        return np.arange(len(place_N))[:, None]
    if len(np.unique(sequence_N)) < B:
        return None
    order_S = np.random.default_rng(0).permutation(int(sequence_N.max()) + 1)
    order_N = np.lexsort((order_S[sequence_N], place_N))
    return order_N[: len(order_N) // B * B].reshape(-1, B)


def conclude(
    parts: Sequence[dict[tuple[int, int], Unique]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    L, rows = len(layers), []
    for g, B in parts[0]:
        of_layers = [part[g, B] for part in parts]
        experts_U, steps_U = np.mean([of.experts for of in of_layers], axis=0), of_layers[0].steps
        chosen = steps_U > 0
        estimate = ratio_of_sums(experts_U[chosen], steps_U[chosen])
        sizes = [(layer.bytes_per_expert or np.nan) / 1e6 for layer in layers]
        mb = [of.experts.sum() / steps_U.sum() * size for of, size in zip(of_layers, sizes, strict=True)]
        rows.append(
            {
                "tokens": g,
                "batch": B,
                **columns("unique_experts", estimate),
                "independent": float(np.mean([of.independent for of in of_layers])),
                "uniform": float(np.mean([of.uniform for of in of_layers])),
                "mb_per_step": float(np.sum(mb)),
                "steps": int(steps_U.sum()),
                "layers": L,
            }
        )
    found = Findings(
        "unique_experts",
        "Experts of a verification step",
        "A step verifies g consecutive tokens of each of B sequences, as speculative decoding does, and loads every "
        "expert that one of them uses, in every layer.",
    )
    left_out = [(g, B) for g in cfg["tokens"] for B in cfg["batch"] if (g, B) not in parts[0]]
    if left_out:
        pairs = ", ".join(f"{g} x {B}" for g, B in left_out)
        found.notes.append(f"The trace has too few or too short sequences for tokens x batch = {pairs}.")
    if not rows:
        return found
    table = pd.DataFrame(rows)
    ones = table[table["tokens"] == 1].set_index("batch")["unique_experts"]
    table.insert(5, "times_one_token", table["unique_experts"] / table["batch"].map(ones))
    found.tables = {"unique_experts": table}
    found.sentences = _sentences(table)
    lines = [line(f"batch {B}", of_batch, "tokens", "unique_experts") for B, of_batch in table.groupby("batch")]
    alone = table[table["batch"] == table["batch"].min()]
    first = f"batch {alone['batch'].iloc[0]}"
    lines += [line(f"{first}, {kind}", alone, "tokens", kind) for kind in ("independent", "uniform")]
    found.plots = [Plot("unique_experts", "Unique experts", "tokens of a sequence", "experts of a layer", lines)]
    return found


def _sentences(table: pd.DataFrame) -> list[str]:
    sentences = []
    for B in sorted({table["batch"].min(), table["batch"].max()}):
        rows = table[table["batch"] == B].set_index("tokens")
        g = 4 if 4 in rows.index else rows.index.max()
        if g == 1 or 1 not in rows.index:
            continue
        row, one = rows.loc[g], rows.loc[1, "unique_experts"]
        ends = [row[f"unique_experts_ci95_{end}"] for end in ("low", "high")]
        low, high = (None if pd.isna(end) else end / one for end in ends)
        fewer = [percent(1 - row["unique_experts"] / row[kind]) for kind in ("independent", "uniform")]
        sentences.append(
            f"Verifying {g} tokens at batch {B} loads {times(row['times_one_token'], low, high)} times the experts of "
            f"one token; that is {fewer[0]} fewer than tokens that choose independently would load, and {fewer[1]} "
            "fewer than uniform ones."
        )
    return sentences
