"""What a sweep says about its variants, in sentences."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.results import numbers
from moe_lab.results.settings import describe, sizes

SAME = 0.03
"""Latencies whose ratio lies surely within 1 / 1.03 and 1.03 are the same."""

_RATIO = ("ratio_to_anchor.p50", "ratio_to_anchor.ci95_low", "ratio_to_anchor.ci95_high")

_READ = (
    *("variant", "size", "is_unstable", "status", "reason", "anchor", "is_anchor", "ratio_to_anchor.paired", *_RATIO),
    *("batch", "seq_len", "latency_ms.p50", "throughput.time_per_output_token_ms", "per_token"),
)

Kind = Literal["faster", "slower", "same", "inconclusive", "not timed together", "failed", "skipped"]
_COMPARED: tuple[Kind, ...] = ("faster", "slower", "same", "inconclusive")
_ORDER: tuple[Kind, ...] = (*_COMPARED, "not timed together", "failed", "skipped")


class Verdict(NamedTuple):
    """A sentence about one variant in one group of settings, and what it was made of."""

    group: str
    """The model, and whatever else varies apart from batch and seq_len."""
    variant: str
    kind: Kind
    where: str
    """At which sizes."""
    ratio: float | None
    """Times slower, faster or as long; a median over the cells. None where nothing is claimed."""
    low: float | None
    high: float | None
    cells: int
    unstable: int
    """Of these, how many whose latency or anchor's latency is not stable."""
    text: str


def judged(low: float, high: float) -> Kind:
    """What an interval of a ratio of latencies says; NaN (no interval) is inconclusive."""
    if low >= 1 / (1 + SAME) and high <= 1 + SAME:
        return "same"
    if low > 1:
        return "slower"
    return "faster" if high < 1 else "inconclusive"


class _Cell(NamedTuple):
    kind: Kind | None
    """None of an anchor that was timed: there is nothing to say."""
    about: str
    """The anchor; of a failed or skipped cell the reason."""
    tokens: int
    size: str
    ratio: tuple[float, float, float]
    """Median, low, high."""
    is_unstable: bool
    """Whether its latency or that of its anchor is."""


def window(row: Mapping[Any, Any]) -> int | None:
    """How many tokens a decoding step adds to each sequence; None for other passes, and where nothing was timed."""
    ms, of_token = (row.get(name, math.nan) for name in ("latency_ms.p50", "throughput.time_per_output_token_ms"))
    return None if pd.isna(ms) or pd.isna(of_token) or not of_token > 0 else max(round(float(ms) / float(of_token)), 1)


def tokens_of_a_pass(row: Mapping[Any, Any]) -> int | None:
    """batch x seq_len, of decoding batch x `window`; None where the sizes are not known."""
    of_step = window(row)
    sizes = [row["batch"], row["seq_len"] if of_step is None else of_step]
    known = [int(size) for size in sizes if not pd.isna(size)]
    return math.prod(known) if known else None


def per_token(summary: pd.DataFrame) -> list[float]:
    """By row, what turns its ratio to the anchor into one for each token: 1 but where their windows differ."""
    rows = summary[[name for name in _READ if name in summary]].to_dict("records")
    settings = list(zip(summary["setting_id"], summary["env_id"].astype(str), strict=True))
    anchors = {setting: window(row) for setting, row in zip(settings, rows, strict=True) if _true(row["is_anchor"])}
    pairs = [(anchors.get(setting), window(row)) for setting, row in zip(settings, rows, strict=True)]
    return [of_anchor / own if of_anchor and own else 1.0 for of_anchor, own in pairs]


def verdicts(summary: pd.DataFrame) -> list[Verdict]:
    """One sentence per variant and class of its cells, for each model and whatever else varies but batch and seq_len.

    The rule. A cell's ratio is its latency over the anchor's, timed in the same rounds, with its 95 % interval. A cell
    is `same` if the interval lies within 1 / 1.03 and 1.03, else `slower` or `faster` if it excludes 1, else, or with
    no interval, `inconclusive`; a ratio that was not paired is never a verdict but `not timed together`. Cells of one
    class make one sentence, whose ratio is the median over them and whose bracket is the hull of their intervals; of
    `faster` both are inverted, so that they count times faster. T are the tokens of a pass, batch x seq_len, or of
    decoding batch x window; steps of unlike windows are compared for each token. "T <= t" and "T >= t" speak of the
    sizes that were measured. Failed and skipped cells, the anchor's too, are named with their reasons. A sentence says
    of how many of its cells a latency is not stable.
    """
    sentences: list[Verdict] = []
    if summary.empty:
        return sentences
    summary = summary.assign(per_token=per_token(summary))
    anchors = summary[summary["is_anchor"].fillna(False).astype(bool) & _unstable(summary)]
    unstable_anchors = set(zip(anchors["setting_id"], anchors["env_id"].astype(str), strict=True))
    for group, group_rows in summary.groupby(describe(summary, without=("batch", "seq_len")), sort=False):
        settings = zip(group_rows["setting_id"], group_rows["env_id"].astype(str), strict=True)
        is_unstable = _unstable(group_rows) | np.array([setting in unstable_anchors for setting in settings])
        named = group_rows.assign(size=sizes(group_rows), variant=_names(group_rows), is_unstable=is_unstable)
        rows = named[[name for name in _READ if name in named]].to_dict("records")
        for variant in dict.fromkeys(row["variant"] for row in rows):
            cells = [_cell(row) for row in rows if row["variant"] == variant]
            compared = [cell for cell in cells if cell.kind in _COMPARED]
            for kind in _ORDER:
                for about in sorted({cell.about for cell in cells if cell.kind == kind}):
                    alike = [cell for cell in cells if (cell.kind, cell.about) == (kind, about)]
                    among = compared if kind in _COMPARED else cells
                    others = [cell for cell in among if cell not in alike]
                    where = _where(alike, others, everything=len(among) == len(cells))
                    sentences.append(_verdict(str(group), variant, kind, about, alike, where))
    return sentences


def _names(rows: pd.DataFrame) -> pd.Series:
    """The variant; of what failed before it was composed, its directory."""
    return rows["variant"].where(rows["variant"].notna(), rows["directory"]).astype(str)


def _unstable(rows: pd.DataFrame) -> pd.Series:
    """Whether each latency is known not to be stable."""
    return rows["latency_ms.stable"].eq(False).fillna(False).astype(bool)


def _true(value: Any) -> bool:
    return not pd.isna(value) and bool(value)


def _cell(row: Mapping[Any, Any]) -> _Cell:
    """Which class a row of the summary belongs to."""
    tokens = tokens_of_a_pass(row) or 1
    ratio = tuple(float(row[key]) * row["per_token"] if not pd.isna(row[key]) else np.nan for key in _RATIO)
    _, low, high = ratio
    kind: Kind | None
    if row["status"] != "ok":
        kind = "skipped" if row["status"] == "skipped" else "failed"
    elif _true(row["is_anchor"]):
        kind = None
    elif not _true(row["ratio_to_anchor.paired"]):
        kind = "not timed together"
    else:
        kind = judged(low, high)
    about = row["anchor" if row["status"] == "ok" else "reason"]
    return _Cell(
        kind, "" if pd.isna(about) else str(about), tokens, row["size"], (ratio[0], low, high), row["is_unstable"]
    )


def _where(cells: Collection[_Cell], others: Collection[_Cell], everything: bool) -> str:
    """Where these cells are among all that were judged (`everything`: all that there are).

    By the tokens of a pass; cells with as many tokens as one of another class are named by batch and seq_len.
    """
    if not all(cell.size for cell in cells):
        return ""  # it failed before its size was known
    theirs = {cell.tokens for cell in others}
    mine = sorted({cell.tokens for cell in cells} - theirs)
    unclear = sorted((cell.tokens, cell.size) for cell in cells if cell.tokens in theirs)
    if not others and len(mine) > 1:
        return " at every size" if everything else " at every size timed together"
    parts = []
    if len(mine) > 1 and mine[-1] < min(theirs):
        parts.append(f"T <= {mine[-1]}")
    elif len(mine) > 1 and mine[0] > max(theirs):
        parts.append(f"T >= {mine[0]}")
    elif mine:
        parts.append("T = " + listed([str(tokens) for tokens in mine]))
    if unclear:
        parts.append(listed([size for _, size in unclear]))
    return " at " + " and at ".join(parts)


def every(n: int, one: str, several: str) -> str:
    """All of `n` things: `the one trial`, `both trials`, `all 3 trials`."""
    return {1: f"the one {one}", 2: f"both {several}"}.get(n, f"all {n:,} {several}")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`; each word once."""
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _verdict(group: str, variant: str, kind: Kind, about: str, cells: Sequence[_Cell], where: str) -> Verdict:
    middle: float | None = None
    low: float | None = None
    high: float | None = None
    if kind in ("faster", "slower", "same"):
        ratios = np.array([cell.ratio for cell in cells])
        if kind == "faster":
            ratios = 1 / ratios[:, [0, 2, 1]]
        middle, low, high = (float(v) for v in (np.median(ratios[:, 0]), ratios[:, 1].min(), ratios[:, 2].max()))
        bracket = numbers.interval(low, high, numbers.ratio)
    if kind == "same":
        text = f"{variant} takes as long as {about} (within {SAME:.0%}){where}, {bracket}"
    elif kind in ("faster", "slower"):
        assert middle is not None
        text = f"{variant} is {numbers.ratio(middle)}x {kind} than {about}{where}, {bracket}"
    elif kind == "inconclusive":
        text = f"{variant} against {about}: inconclusive{where}"
    elif kind == "not timed together":
        text = f"{variant} and {about} were not timed together{where}: no verdict"
    else:
        text = f"{variant} {'was skipped' if kind == 'skipped' else 'failed'}{where}" + (f": {about}" if about else "")
    unstable = sum(cell.is_unstable for cell in cells) if kind in _COMPARED else 0
    if unstable:
        of = "its latency or the anchor's is" if len(cells) == 1 else f"{unstable} of {len(cells)} latencies are"
        text += f"; {of} not stable"
    return Verdict(group, variant, kind, where.strip(), middle, low, high, len(cells), unstable, text)
