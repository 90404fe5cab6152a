"""Does made-up input do what real input does: random ids beside text, a fitted load beside the trace it is fitted to.

Two cells are a pair if they differ in that alone. An interval is over texts where there are two or more (the seeds of a
text averaged), else over seeds: Student's t of the logarithms of the pairs' ratios, so the mean is geometric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from moe_lab.intervals import mean_interval
from moe_lab.results import numbers

_IDS, _PATH, _LOAD, _FIT, _CONSECUTIVE = (
    f"config.workload.{key}" for key in ("ids", "path", "load", "fit", "trace_consecutive")
)
"""Columns; missing where the key came later and has its default: text, power_law."""
_GINI, _MOST = "routing.worst.load_gini", "routing.worst.load_max_over_mean"
_RATIO = "ratio_to_anchor.p50"
_MODEL = ("model", "router", "experts", "dtype", "device", "execution", "env_id")
_SIZES = ("batch", "seq_len")


def sentences(runs: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What the tables of a sweep say of made-up input; none where there are no pairs."""
    return [*_random_ids(runs), *_fitted_loads(summary)]


def _random_ids(runs: pd.DataFrame) -> Iterator[str]:
    """Whether random ids overstate the imbalance of experts (DODOCO, 2605.20982), by batch."""
    if _IDS not in runs or _GINI not in runs:
        return
    ran = runs[(runs["status"] == "ok") & (runs["workload"] == "text") & runs[_GINI].notna()].fillna({_IDS: "text"})
    for _, of_model in ran.groupby(_there(ran, _MODEL, (_IDS, _PATH)), dropna=False):
        gini, most, over = [], [], ""
        for sizes, cells in of_model.groupby(list(_SIZES)):
            unit = [name for name in (_PATH, "seed") if name in cells]
            made, real = (cells[cells[_IDS] == ids].set_index(unit)[[_GINI, _MOST]] for ids in ("uniform", "text"))
            both = made.index.intersection(real.index)
            if not len(both) or (made.loc[both] * real.loc[both] == 0).any(axis=None):
                continue  # an even load has no ratio
            logs, over = np.log(made.loc[both] / real.loc[both]), _units(real.loc[both])
            beside = f"{made.loc[both, _GINI].mean():.2f} for {real.loc[both, _GINI].mean():.2f}"
            gini.append((_over(logs[_GINI]), f"({beside}) at {_size(*sizes)}"))
            most.append((_over(logs[_MOST]), f"at {_size(*sizes)}"))
        if gini:
            yield (
                f"In {of_model['model'].iloc[0]} random ids {_verb([ratio for ratio, _ in gini])} the imbalance that "
                f"text has, {over}: the Gini coefficient of the most uneven layer is {_listed(gini)} that of text; its "
                f"fullest expert has {_listed(most)} the slots"
            )


def _size(batch: int, seq_len: float) -> str:
    return f"batch {batch}, seq_len {seq_len:.0f}"


def _listed(ratios: Sequence[tuple[tuple[float, float, float], str]]) -> str:
    return ", ".join(f"{_times(ratio)} {rest}" for ratio, rest in ratios)


def _verb(factors: Sequence[tuple[float, float, float]]) -> str:
    if all(low > 1 for _, low, _ in factors):
        return "overstate"
    if all(high < 1 for *_, high in factors):
        return "understate"
    return "change" if any(low > 1 or high < 1 for _, low, high in factors) else "do not surely change"


def _fitted_loads(summary: pd.DataFrame) -> Iterator[str]:
    """Whether fits have the latency of the steps that are replayed beside them, by size."""
    if _RATIO not in summary or _LOAD not in summary:
        return
    fits = summary[(summary["status"] == "ok") & (summary[_LOAD] == "fitted") & summary[_RATIO].notna()]
    fits = fits[fits["anchor"].isin(summary.loc[summary[_LOAD] == "replay", "variant"])]
    fits = fits.assign(**{_FIT: fits[_FIT].fillna("power_law") if _FIT in fits else "power_law"})
    for _, of_model in fits.groupby(_there(fits, _MODEL, (_FIT, _CONSECUTIVE)), dropna=False):
        parts, over = [], ""
        for fit, cells in of_model.groupby(_FIT):
            ratios = []
            for sizes, of_size in cells.groupby(list(_SIZES)):
                logs = np.log(of_size.set_index("seed")[[_RATIO]])
                ratios.append((_over(logs[_RATIO]), f"at {_size(*sizes)}"))
                over = _units(logs)
            parts.append(f"{fit} {_listed(ratios)}")
        yield (
            f"In {of_model['model'].iloc[0]} a load that is fitted to the trace takes, in units of the time of the "
            f"trace's own steps, {over}: {'; '.join(parts)}"
        )


def _there(frame: pd.DataFrame, names: Sequence[str], without: Sequence[str]) -> list[str]:
    """The columns that tell settings apart, sizes and seeds aside."""
    configured = [str(name) for name in frame if str(name).startswith("config.") and name not in without]
    return [*(name for name in names if name in frame), *configured]


def _units(logs: pd.DataFrame) -> str:
    texts = logs.index.get_level_values(_PATH).nunique() if _PATH in logs.index.names else 1
    n, kind = (texts, "text") if texts > 1 else (len(logs), "seed")
    return f"over {n} {kind}{'s' if n > 1 else ''}"


def _over(logs: pd.Series) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and its interval; NaN without one."""
    if _PATH in logs.index.names and logs.index.get_level_values(_PATH).nunique() > 1:
        logs = logs.groupby(level=_PATH).mean()
    values = logs.to_numpy(float)
    low, high = mean_interval(values) if len(values) > 1 else (np.nan, np.nan)
    return float(np.exp(values.mean())), low, high


def _times(ratio: tuple[float, float, float]) -> str:
    return f"{numbers.ratio(ratio[0])}x {numbers.interval(ratio[1], ratio[2], numbers.ratio)}".rstrip()
