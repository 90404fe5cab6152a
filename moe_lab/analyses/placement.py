"""Placement judged on what came after it: how long a plan of experts on ranks is good for, and what copies gain.

The tokens, in the order in which they were computed, are cut into steps of `step_tokens`. At step t a plan (plans.py)
is made from the steps [t - age - window, t - age) and judged on [t, t + horizon): with l_r the slots of rank r in a
step and u_r its different experts, sums over steps and layers, as all ranks wait for the fullest:

    load          sum of max_r l_r over the sum of mean_r l_r; 1 is even
    experts       the mean of max_r u_r: what the fullest rank has to read in decoding
    recovery      (base - plan) / (base - oracle) of the sums of max_r l_r, base being the contiguous placement, oracle
                  the same plan made from the steps that it is judged on (as Megatron's load balancer is judged)

Intervals are over the points t (intervals.ratio_of_sums). measure/placement.py fits to the very load that it is judged
by; here that is the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.analyses import plans
from moe_lab.analyses.findings import Findings, Plot, columns, line, percent, times
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer
from moe_lab.workloads.fits import step_counts

PLANS = ("contiguous", "round_robin", "greedy", "eplb", "unique")
BLIND = ("contiguous", "round_robin")
"""Plans that do not look at a load, so there is nothing that they recover."""


class Setting(NamedTuple):
    """One line of the table."""

    plan: str
    ranks: int
    copies: int
    window: int
    age: int


class Judged(NamedTuple):
    """Of one layer and setting, by point in time [P]: sums over the steps of its horizon."""

    fullest: np.ndarray
    mean: np.ndarray
    experts: np.ndarray
    base: np.ndarray
    oracle: np.ndarray


def copies_of(cfg: Mapping[str, Any], layers: Sequence[Layer]) -> list[int]:
    """Those asked for, or none, an eighth and a quarter of the experts."""
    E = max(layer.n_experts for layer in layers)
    return sorted(set(cfg["copies"] if cfg["copies"] is not None else [0, E // 8, E // 4]))


def settings(cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Iterator[Setting]:
    """Those of the table; what has no effect on a plan does not vary."""
    E = min(layer.n_experts for layer in layers)
    for ranks in cfg["ranks"]:
        for plan in cfg["plan"]:
            is_blind = plan in BLIND
            for copies in copies_of(cfg, layers) if plan in plans.COPYING else [0]:
                for window in [0] if is_blind else cfg["window"]:
                    for age in [0] if is_blind else cfg["age"]:
                        if ranks <= E:
                            yield Setting(plan, ranks, copies, window, age)


def points(n_steps: int, cfg: Mapping[str, Any]) -> list[int]:
    """The first steps of what is judged: all settings are judged on the same."""
    first = max(cfg["window"]) + max(cfg["age"])
    return list(range(first, n_steps - cfg["horizon"] + 1, cfg["horizon"]))


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> dict[Setting, Judged]:
    """Every setting of one layer; nothing if the trace is too short."""
    counts_SE = step_counts(routes.ids_TK[routes.view.computed], routes.layer.n_experts, cfg["step_tokens"])
    at = points(len(counts_SE), cfg)
    judged = {}
    for (plan, ranks, copies), group in groupby(settings(cfg, layers) if at else (), lambda setting: setting[:3]):
        contiguous_ER = plans.contiguous(counts_SE.shape[1], ranks)
        base_P, oracle_P = np.empty(len(at)), np.empty(len(at))
        for point, t in enumerate(at):  # what does not depend on what was seen
            ahead_HE = counts_SE[t : t + cfg["horizon"]]
            knowing_ER = plans.make(plan, ahead_HE, ranks, copies)
            base_P[point] = plans.loads("contiguous", contiguous_ER, ahead_HE)[0].max(axis=1).sum()
            oracle_P[point] = plans.loads(plan, knowing_ER, ahead_HE)[0].max(axis=1).sum()
        for setting in group:
            rows = [_judge(setting, counts_SE, t, cfg["horizon"]) for t in at]
            fullest_P, mean_P, experts_P = np.array(rows).T
            judged[setting] = Judged(fullest_P, mean_P, experts_P, base_P, oracle_P)
    return judged


def _judge(setting: Setting, counts_SE: np.ndarray, t: int, horizon: int) -> tuple[float, float, float]:
    """Sums over the steps: slots of the fullest rank, of the mean one, most experts of a rank."""
    plan, ranks, copies, window, age = setting
    made_ER = plans.make(plan, counts_SE[t - age - window : t - age], ranks, copies)
    load_HR, unique_HR = plans.loads(plan, made_ER, counts_SE[t : t + horizon])
    return load_HR.max(axis=1).sum(), load_HR.mean(axis=1).sum(), unique_HR.max(axis=1).sum()


def conclude(
    parts: Sequence[dict[Setting, Judged]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    found = Findings(
        "placement",
        "Placement of experts on ranks",
        f"Plans are made from steps of {cfg['step_tokens']} tokens that are over, and judged on the next "
        f"{cfg['horizon']} steps.",
    )
    if not parts[0]:
        needed = (max(cfg["window"]) + max(cfg["age"]) + cfg["horizon"]) * cfg["step_tokens"]
        found.notes.append(
            f"The trace has {view.n_tokens} tokens, and window, age and horizon need {needed}; lower them or "
            "placement.step_tokens; or there are more ranks than experts."
        )
        return found
    rows = []
    for setting in parts[0]:
        fullest, mean, experts, base, oracle = (
            np.sum(values, axis=0) for values in zip(*(part[setting] for part in parts), strict=True)
        )
        steps = np.full(len(fullest), cfg["horizon"] * len(layers), float)
        recovery = ratio_of_sums(base - fullest, base - oracle) if setting.plan not in BLIND else None
        rows.append(
            {
                **setting._asdict(),
                **columns("load", ratio_of_sums(fullest, mean)),
                **columns("experts", ratio_of_sums(experts, steps)),
                "oracle_load": float(oracle.sum() / mean.sum()),
                "recovery": None if recovery is None else recovery.value,
                "recovery_ci95_low": None if recovery is None else recovery.low,
                "recovery_ci95_high": None if recovery is None else recovery.high,
                "points": len(fullest),
            }
        )
    table = pd.DataFrame(rows)
    found.tables = {"placement": table}
    found.sentences = _sentences(table)
    found.plots = [_plot(table)]
    return found


def _plot(table: pd.DataFrame) -> Plot:
    """Against copies, at the most ranks, the longest window and the newest load; lines that are flat have no copies."""
    ranks = table["ranks"].max()
    rows = table[(table["ranks"] == ranks) & (table["age"] == 0)]
    lines = []
    for plan, of_plan in rows.groupby("plan", sort=False):
        of_plan = of_plan[of_plan["window"] == of_plan["window"].max()]
        if len(of_plan) == 1 and rows["copies"].nunique() > 1:
            of_plan = pd.concat([of_plan.assign(copies=n) for n in (rows["copies"].min(), rows["copies"].max())])
        lines.append(line(str(plan), of_plan, "copies", "load"))
    return Plot("placement", f"The fullest of {ranks} ranks", "copies of experts", "slots, fullest over mean", lines)


def _sentences(table: pd.DataFrame) -> list[str]:
    ranks = table["ranks"].max()
    rows = table[table["ranks"] == ranks]
    base, made = rows[rows["plan"] == "contiguous"], rows[rows["window"] > 0]
    if base.empty or made.empty:
        return []
    newest = made[made["age"] == made["age"].min()]
    best = newest.loc[newest["load"].idxmin()]
    copies = f" with {best['copies']} copies" if best["copies"] else ""
    sentences = [
        f"On {ranks} ranks {best['plan']}{copies}, made from the {best['window']} steps before, leaves the fullest "
        f"rank {_times(best, 'load')} times the mean; contiguous placement, without a plan, leaves it "
        f"{_times(base.iloc[0], 'load')}."
    ]
    if pd.notna(best["recovery"]):
        sentences.append(
            f"That is {percent(best['recovery'], *_ends(best, 'recovery'))} of what the same plan would gain if it "
            f"knew the load to come ({times(best['oracle_load'])}), which is how balancers are usually quoted."
        )
    same = ("plan", "copies", "window")
    older = made[(made["age"] > best["age"]) & (made[list(same)] == best[list(same)]).all(axis=1)]
    if len(older):
        oldest = older.loc[older["age"].idxmax()]
        sentences.append(f"From a load that is {oldest['age']} steps old it has {_times(oldest, 'load')}.")
    return sentences


def _ends(row: pd.Series, name: str) -> list[float | None]:
    return [None if pd.isna(row[f"{name}_ci95_{end}"]) else row[f"{name}_ci95_{end}"] for end in ("low", "high")]


def _times(row: pd.Series, name: str) -> str:
    return times(row[name], *_ends(row, name))
