"""Expert parallelism beyond the machine: what each step of a trace would send, and how long, on 8 to 1024 ranks.

The tokens, in the order in which they were computed, are cut into steps of `step_tokens`; token i of a step lies on
rank i R / step_tokens. Expert e lies on rank e R / E, rounded down. With more ranks than experts it has R / E copies,
on ranks e R / E, e R / E + 1, ..., and a rank sends to the copy of its own number modulo R / E. A token is sent once to
each rank that has one of its experts, and each of these sends one vector back. Of every step:

    load             slots of the fullest rank over the mean: the straggler
    experts          different experts of the rank that has most of them
    ranks_per_token  ranks that a token is sent to; nodes_per_token: nodes, `ranks_per_node` ranks each
    over_node_limit  share of the tokens that go to more than `node_limit` nodes, which node-limited routing
                     (DeepSeek-V3, 2412.19437, section 2.1.2) does not allow
    pair_mb          most that one rank sends to one other
    all_to_all_us    2 (alpha + max over ranks of what it sends or receives within its node over node_gb_per_s, or
                     beyond it over network_gb_per_s): dispatch and combine in Hockney's model

The ports of a rank work at the same time, and no message waits for another. A discrete-event run on 8 ranks, in which
they do, takes 4 % longer on average and 15 % at most (tests/analyses/test_ranks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.findings import Findings, Plot, columns, line, percent, times
from moe_lab.analyses.routes import STRETCHES, Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer

_AT_ONCE = 1 << 17  # tokens
_OF_A_STEP = ("fullest", "slots", "experts", "pairs", "nodes", "over", "largest_pair", "us")
"""What is kept of a step: sums, or the largest of its ranks."""

Steps = dict[int, np.ndarray]
"""By number of ranks: [len(_OF_A_STEP), S]."""


def fits(n_experts: int, n_ranks: int) -> bool:
    """Whether every rank has as many experts, or every expert as many ranks."""
    return n_experts % n_ranks == 0 or n_ranks % n_experts == 0


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Steps:
    """Every step of one layer, for each number of ranks that fits all layers."""
    tokens, E = cfg["step_tokens"], routes.layer.n_experts
    ids_TK = routes.ids_TK[routes.view.computed]
    n_steps = len(ids_TK) // tokens
    found = {}
    for n_ranks in cfg["ranks"]:
        if n_steps and all(fits(layer.n_experts, n_ranks) for layer in layers):
            at_once = max(_AT_ONCE // tokens, 1)
            parts = [
                of_steps(ids_TK[first * tokens : min(first + at_once, n_steps) * tokens], E, n_ranks, cfg)
                for first in range(0, n_steps, at_once)
            ]
            found[n_ranks] = np.concatenate(parts, axis=1)
    return found


def of_steps(ids_TK: np.ndarray, E: int, R: int, cfg: Mapping[str, Any]) -> np.ndarray:
    """`_OF_A_STEP` of whole steps, [.., S]."""
    T, per_step = len(ids_TK), cfg["step_tokens"]
    S, node = T // per_step, cfg["ranks_per_node"]
    step_T, source_T = np.arange(T) // per_step, np.arange(T) % per_step * R // per_step
    used_TK = ids_TK >= 0
    rank_TK = destinations(ids_TK, source_T, E, R)
    load_SR = np.bincount((step_T[:, None] * R + rank_TK)[used_TK], minlength=S * R).reshape(S, R)
    experts_S = _most_experts(ids_TK, used_TK, step_T, S, E, R)

    sorted_TK = np.sort(np.where(used_TK, rank_TK, -1), axis=1)
    is_first_TK = sorted_TK >= 0
    is_first_TK[:, 1:] &= sorted_TK[:, 1:] != sorted_TK[:, :-1]  # each rank of a token once
    node_TK = sorted_TK // node
    is_new_node_TK = is_first_TK.copy()
    is_new_node_TK[:, 1:] &= node_TK[:, 1:] != node_TK[:, :-1]
    nodes_T = is_new_node_TK.sum(axis=1)

    token_N, slot_N = np.nonzero(is_first_TK)
    step_N, source_N, target_N = step_T[token_N], source_T[token_N], sorted_TK[token_N, slot_N]
    leaves_N = source_N != target_N  # what stays on its rank is not sent
    step_N, source_N, target_N = step_N[leaves_N], source_N[leaves_N], target_N[leaves_N]
    beyond_N = source_N // node != target_N // node
    us_S = np.zeros(S)
    for chosen, rate in ((~beyond_N, cfg["node_gb_per_s"]), (beyond_N, cfg["network_gb_per_s"])):
        for end_N in (source_N, target_N):
            sent_SR = np.bincount((step_N * R + end_N)[chosen], minlength=S * R).reshape(S, R)
            us_S = np.maximum(us_S, sent_SR.max(axis=1) * cfg["token_bytes"] / (rate * 1e3))
    by_step = np.add.reduceat
    starts = np.arange(0, T, per_step)
    return np.stack(
        [
            load_SR.max(axis=1),
            load_SR.sum(axis=1),
            experts_S,
            by_step(is_first_TK.sum(axis=1), starts),
            by_step(nodes_T, starts),
            by_step((nodes_T > cfg["node_limit"]).astype(int), starts),
            _largest_pair(step_N, source_N * R + target_N, R * R, S),
            2 * (cfg["alpha_us"] + us_S),
        ]
    ).astype(float)


def destinations(ids_TK: np.ndarray, source_T: np.ndarray, E: int, R: int) -> np.ndarray:
    """The rank of each slot's expert, or of the copy that the token's rank sends to; of unused slots any."""
    if R <= E:
        return np.asarray(ids_TK.astype(np.int64) // (E // R))
    copies = R // E
    return np.asarray(ids_TK.astype(np.int64) * copies + (source_T % copies)[:, None])


def _most_experts(ids_TK: np.ndarray, used_TK: np.ndarray, step_T: np.ndarray, S: int, E: int, R: int) -> np.ndarray:
    used_SE = np.bincount((step_T[:, None] * E + ids_TK)[used_TK], minlength=S * E).reshape(S, E) > 0
    most_S: np.ndarray = used_SE.reshape(S, min(R, E), -1).sum(axis=2).max(axis=1)
    return most_S


def _largest_pair(step_N: np.ndarray, pair_N: np.ndarray, n_pairs: int, S: int) -> np.ndarray:
    """Tokens of the pair of ranks of each step that has most."""
    largest_S = np.zeros(S, np.int64)
    if len(pair_N):
        keys_N = np.sort(step_N * n_pairs + pair_N)
        starts = np.flatnonzero(np.concatenate([[True], keys_N[1:] != keys_N[:-1]]))
        np.maximum.at(largest_S, keys_N[starts] // n_pairs, np.diff(np.append(starts, len(keys_N))))
    return largest_S


def conclude(parts: Sequence[Steps], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    found = Findings(
        "ranks",
        "Expert parallelism on many ranks",
        f"Steps of {cfg['step_tokens']} tokens, which lie on the ranks in equal parts; {cfg['token_bytes']} bytes of a "
        f"token are sent once to each rank that has one of its experts, and as many come back. Times are a model's: "
        f"{cfg['alpha_us']:g} us, {cfg['node_gb_per_s']:g} GB/s in a node of {cfg['ranks_per_node']} ranks, "
        f"{cfg['network_gb_per_s']:g} GB/s beyond it.",
    )
    if view.n_tokens < cfg["step_tokens"]:
        found.notes.append(f"The trace has {view.n_tokens} tokens, fewer than a step; lower ranks.step_tokens.")
        return found
    if left_out := [ranks for ranks in cfg["ranks"] if ranks not in parts[0]]:
        found.notes.append(
            f"{', '.join(map(str, left_out))} ranks: neither divides the number of experts nor is a multiple of it."
        )
    if not parts[0]:
        return found
    rows = []
    for ranks in parts[0]:
        values = np.sum([part[ranks] for part in parts], axis=0)
        stretches = np.array_split(values, min(STRETCHES, values.shape[1]), axis=1)
        of = dict(zip(_OF_A_STEP, np.array([stretch.sum(axis=1) for stretch in stretches]).T, strict=True))
        steps = np.array([stretch.shape[1] for stretch in stretches]) * float(len(layers))
        us_S = np.concatenate([part[ranks][-1] for part in parts])
        rows.append(
            {
                "ranks": ranks,
                **columns("load", ratio_of_sums(of["fullest"], of["slots"] / ranks)),
                **columns("experts", ratio_of_sums(of["experts"], steps)),
                **columns("ranks_per_token", ratio_of_sums(of["pairs"], steps * cfg["step_tokens"])),
                **columns("nodes_per_token", ratio_of_sums(of["nodes"], steps * cfg["step_tokens"])),
                **columns("over_node_limit", ratio_of_sums(of["over"], steps * cfg["step_tokens"], (0.0, 1.0))),
                "pair_mb": float(of["largest_pair"].sum() / steps.sum()) * cfg["token_bytes"] / 1e6,
                **columns("all_to_all_us", ratio_of_sums(of["us"], steps)),
                "all_to_all_us_p99": float(np.quantile(us_S, 0.99)),
                "steps": values.shape[1],
            }
        )
    table = pd.DataFrame(rows)
    found.tables = {"ranks": table}
    found.sentences = _sentences(table, cfg)
    time_lines = [line(name, table, "ranks", name) for name in ("all_to_all_us", "all_to_all_us_p99")]
    load_line = line("load", table, "ranks", "load")
    found.plots = [
        Plot(
            "ranks_load", "The fullest rank of a step", "ranks", "slots, fullest over mean", [load_line], doubles=True
        ),
        Plot("ranks_time", "Dispatch and combine", "ranks", "us", time_lines, doubles=True),
    ]
    return found


def _sentences(table: pd.DataFrame, cfg: Mapping[str, Any]) -> list[str]:
    first, last = table.iloc[0], table.iloc[-1]

    def of(row: pd.Series, name: str) -> str:
        ends = [None if pd.isna(row[f"{name}_ci95_{end}"]) else row[f"{name}_ci95_{end}"] for end in ("low", "high")]
        return times(row[name], *ends)

    sentences = [f"On {first['ranks']:.0f} ranks the fullest has {of(first, 'load')} times the mean load in a step."]
    if len(table) > 1:
        sentences[0] = (
            f"From {first['ranks']:.0f} to {last['ranks']:.0f} ranks the load of the fullest rank of a step goes from "
            f"{of(first, 'load')} to {of(last, 'load')} times the mean."
        )
        sentences.append(
            f"A token is sent to {of(first, 'ranks_per_token')} ranks and then to {of(last, 'ranks_per_token')}; on "
            f"{last['ranks']:.0f} ranks {percent(last['over_node_limit'])} of the tokens need more than "
            f"{cfg['node_limit']} nodes."
        )
        slowest = table.loc[table["all_to_all_us"].idxmax()]
        sentences.append(
            f"By the model dispatch and combine take {table['all_to_all_us'].min():.3g} to "
            f"{slowest['all_to_all_us']:.3g} us, the longest on {slowest['ranks']:.0f} ranks, where one step of a "
            f"hundred takes {slowest['all_to_all_us_p99']:.3g} us or more."
        )
    return sentences
