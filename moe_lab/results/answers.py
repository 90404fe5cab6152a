"""What a sweep answers, a sentence for each question: what to take, what is fastest where, at what price, how sure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from textwrap import shorten
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from moe_lab.records.fields import PROPERTIES, names
from moe_lab.records.schema import DOES_NOT_HOLD
from moe_lab.results import alike, contest, numbers, pareto
from moe_lab.results.contest import Cell, Quality, Setting
from moe_lab.results.doubts import DOUBTFUL, unsure
from moe_lab.results.regions import Region, regions
from moe_lab.results.verdicts import Kind, judged, listed

MOST = 10
"""As many sentences as are shown at once; the others are folded."""
_MOST_TAKES = 5
"""So many sentences about what to take come before all others."""
_MOST_NAMES = 4
_ALIKE = 1.15
"""Ratios that differ by more than this factor between settings are given as a range."""

Question = Literal["search", "take", "load", "fastest", "dominated", "price", "not sure", "failed", "skipped"]


class Answer(NamedTuple):
    """A sentence to one of the questions."""

    question: Question
    text: str


class Answers(NamedTuple):
    """At most `MOST` sentences, and the others."""

    shown: list[Answer]
    folded: list[Answer]


def answers(runs: pd.DataFrame, summary: pd.DataFrame, searched: Sequence[str] = ()) -> Answers:
    """Of the tables of a sweep, in the order of the questions; `searched` are the sentences about its search.

    Two variants differ in speed if the intervals of their ratios to the anchor say so (`verdicts.judged`), and in
    quality if the intervals of their bits per byte do not overlap and they differ by more than `contest.SAME_BITS`.
    Which are not worth taking at any price says `pareto`.
    What cannot be said is left out: with one variant there is nothing to take.
    """
    settings = contest.settings(runs, summary)
    several = [setting for setting in settings if len(setting.cells) > 1]
    doubts = unsure(runs, summary, settings)
    every: dict[Question, list[str]] = {
        "search": list(searched),
        "take": [] if _loads_differ(summary) else _take(several),
        "load": alike.sentences(runs, summary),
        **({"not sure": doubts} if doubts and doubts[0].startswith(DOUBTFUL) else {}),  # before what it is about
        "fastest": _fastest(several),
        "dominated": pareto.sentences(several),
        "price": _prices(settings),
        "not sure": doubts,
        "failed": [*_lies(runs), *_not_ok(runs, "failed")],
        "skipped": _not_ok(runs, "skipped"),
    }
    # What was searched, and what to take; then the first of each other question, the second of each, ...
    in_turn = sorted(
        (question not in ("search", "take") or place >= _MOST_TAKES, place, order, question)
        for order, question in enumerate(every)
        for place in range(len(every[question]))
    )
    n_shown = Counter(question for *_, question in in_turn[:MOST])
    shown = [Answer(question, text) for question, texts in every.items() for text in texts[: n_shown[question]]]
    folded = [Answer(question, text) for question, texts in every.items() for text in texts[n_shown[question] :]]
    return Answers(shown, folded)


def _loads_differ(summary: pd.DataFrame) -> bool:
    """Whether variants differ in what comes in: a load is nothing to choose."""
    keys = ["workload", *(str(name) for name in summary if str(name).startswith("config.workload."))]
    return any(summary.groupby("setting_id")[key].nunique(dropna=False).gt(1).any() for key in keys)


# --- what to take


class _Choice(NamedTuple):
    """What one setting says about which variant to take."""

    kind: Literal["take", "price", "speed"]
    names: tuple[str, ...]
    """`take`, `speed`: any of them. `price`: the fastest."""
    better: tuple[str, ...] = ()
    """`price`: those that predict best."""


def _take(settings: Sequence[Setting]) -> list[str]:
    choices = {id(setting): _choose(setting) for setting in settings if _rivals(setting)}
    often = Counter(name for choice in choices.values() for name in choice.names)
    if len({choice.names for choice in choices.values()}) > 1:  # a tie here is broken by what is good elsewhere
        choices = {key: _usual(choice, often) for key, choice in choices.items()}

    def text(region: Region, settings: Sequence[Setting]) -> str:
        choice: _Choice = region.answer
        if choice.kind == "price":
            return _price_of(choice, settings) + region.at
        if choice.kind == "speed":
            known = all(cell.quality for setting in settings for cell in setting.cells)
            lacks = "has no interval" if known else "was not measured"
            return f"By speed alone {_either(choice.names)}{region.at}: what each does to the predictions {lacks}"
        return f"Take {_either(choice.names)}{region.at}: {_why(choice.names, settings)}"

    return _by_region(settings, lambda setting: choices.get(id(setting)), text)


def _rivals(setting: Setting) -> list[Cell]:
    """Those that can be compared in speed; where none can, those that can in quality. None if there are not two."""
    return setting.timed or (setting.cells if len(setting.cells) > 1 and contest.best(setting.cells) else [])


def _choose(setting: Setting) -> _Choice:
    """The fastest of those that predict best, if there is one; what is not causal or collapses is out."""
    able = [cell for cell in _rivals(setting) if cell.is_causal is not False] or _rivals(setting)
    sound = [cell for cell in able if cell.quality is None or not cell.quality.has_collapsed] or able
    fast, good = contest.fastest(sound), contest.best(sound)
    if len({cell.choice for cell in sound}) == 1:
        return _Choice("take", _names(fast))
    if not good:
        return _Choice("speed", _names(fast))
    if both := [cell for cell in fast if cell in good]:
        beaten = pareto.dominated(setting)
        return _Choice("take", _names([cell for cell in both if cell.variant not in beaten] or both))
    better = contest.fastest(good)
    surely = [cell for cell in fast if all(other.is_slower_than(cell) for other in better)]
    return _Choice("price", _names(surely or fast), _names(better))


def _usual(choice: _Choice, often: Counter[str]) -> _Choice:
    return choice._replace(names=(max(choice.names, key=lambda name: often[name]),), better=choice.better[:1])


def _why(chosen: Sequence[str], settings: Sequence[Setting]) -> str:
    """What speaks for the first of them, and against each of the others."""
    if len(chosen) > 1:
        known = all(setting.timed for setting in settings)
        return "no difference seen between them" if known else "as good in quality; which is faster is not known"
    anchors = {setting.anchor for setting in settings}
    cells = _cells(settings, chosen[0])
    gain = [] if anchors & {chosen[0]} or len(anchors) > 1 else [_speed(cells, *anchors), _quality(cells, settings)]
    variants = dict.fromkeys(cell.variant for setting in settings for cell in _rivals(setting))
    causes: dict[str, list[str]] = {}
    for variant in variants:
        found = Counter(_cause(setting, variant, chosen[0]) for setting in settings)
        cause = max(_CAUSES, key=lambda cause: found[cause])
        cause = "mixed" if cause == "slower" and found["nothing"] else cause
        is_said = gain and {variant} == anchors and cause not in ("collapses", "not causal")
        if variant != chosen[0] and not is_said:
            causes.setdefault(cause, []).append(variant)
    if len(causes) == 1 and len(variants) > 2 and not gain:
        return _CAUSES[next(iter(causes))][0].format("every other variant")
    against = [_CAUSES[c][len(causes[c]) > 1].format(_listed(causes[c])) for c in _CAUSES if c in causes]
    return "; ".join(filter(None, [", ".join(filter(None, gain)), *against]))


_CAUSES = {
    "collapses": ("the predictions of {} collapse", "the predictions of {} collapse"),
    "worse": ("{} predicts worse", "{} predict worse"),
    "not causal": ("{} is not causal", "{} are not causal"),
    "output": ("{} changes the output", "{} change the output"),
    "slower": ("{} is slower", "{} are slower"),
    "mixed": ("{} is slower or not surely faster", "{} are slower or not surely faster"),
    "nothing": ("{} is not surely better", "{} are not surely better"),
}
"""What speaks against a variant, of one and of several; the heaviest first."""


def _cause(setting: Setting, variant: str, chosen: str) -> str:
    cells = {cell.variant: cell for cell in _rivals(setting)}
    if variant not in cells:
        return ""
    cell, taken = cells[variant], cells[chosen]
    if cell.quality and cell.quality.has_collapsed:
        return "collapses"
    mine, theirs = cell.quality, taken.quality
    if mine and theirs and mine.kind == theirs.kind and mine.is_worse_than(theirs):
        return "output" if mine.kind == "error" else "worse"
    if cell.is_causal is False and taken.is_causal is not False:
        return "not causal"
    return "slower" if cell.is_slower_than(taken) else "nothing"


def _price_of(choice: _Choice, settings: Sequence[Setting]) -> str:
    fast, good = choice.names[0], choice.better[0]
    cells, others = _cells(settings, fast), _cells(settings, good)
    ratio = float(np.median([b.ratio[0] / a.ratio[0] for a, b in zip(cells, others, strict=True)]))
    pairs = [(a.quality, b.quality) for a, b in zip(cells, others, strict=True) if a.quality and b.quality]
    more = float(np.median([a.value - b.value for a, b in pairs]))
    if pairs[0][0].kind == "error":
        return (
            f"No choice without a price: {fast} is {numbers.ratio(ratio)}x faster than {good}, but changes the output "
            f"by {numbers.short(100 * more)} %"
        )
    return (
        f"No choice without a price: {fast} is {numbers.ratio(ratio)}x faster than {good}, which predicts better "
        f"({numbers.bits(more)(more)[1:]} fewer bits per byte){_between(fast, good, settings)}"
    )


def _between(fast: str, good: str, settings: Sequence[Setting]) -> str:
    """Who is surely faster than the one and surely predicts better than the other, with both numbers."""
    found = []
    for variant in dict.fromkeys(cell.variant for setting in settings for cell in setting.timed):
        three = [[_cells([setting], name) for name in (variant, good, fast)] for setting in settings]
        cells = [tuple(of[0] for of in cell) for cell in three if all(cell)]
        if len(cells) < len(settings) or variant in (fast, good) or any(c.is_causal is False for c, _, _ in cells):
            continue
        is_better = all(f.quality and c.quality and f.quality.is_worse_than(c.quality) for c, _, f in cells)
        gains = [g.ratio[0] / c.ratio[0] for c, g, _ in cells if g.is_slower_than(c)]
        if is_better and gains and not any(c.is_slower_than(g) for c, g, _ in cells):
            more = float(np.median([c.quality.value - g.quality.value for c, g, _ in cells if c.quality and g.quality]))
            speed = f"{numbers.ratio(float(np.median(gains)))}x faster"
            where = f" in {len(gains)} of {len(cells)} settings" if len(gains) < len(cells) else ""
            found.append(f"{variant} ({speed}{where}, {numbers.bits(more)(more)} bits per byte)")
    return f"; between them {listed(found)}" if found else ""


# --- what is fastest


def _fastest(settings: Sequence[Setting]) -> list[str]:
    def text(region: Region, settings: Sequence[Setting]) -> str:
        first, *others = region.answer
        if others:
            n_all = {len(setting.timed) for setting in settings}
            among = "" if n_all == {len(region.answer)} else " are the fastest:" if len(region.answer) > 1 else ""
            return f"{_listed(region.answer)}{among or ':'} no difference seen between them{region.at}"
        return f"{first} is the fastest{region.at}{_lead(first, settings)}"

    return _by_region(settings, lambda setting: _names(contest.fastest(setting.timed)) or None, text)


def _lead(first: str, settings: Sequence[Setting]) -> str:
    """By how much: over the anchor, or of the anchor over the next."""
    anchor = settings[0].anchor
    if not all(setting.anchor == anchor for setting in settings):
        return ""
    if first != anchor:
        return ": " + _speed(_cells(settings, first), anchor)
    nexts = [min((c for c in setting.timed if not c.is_anchor), key=lambda cell: cell.ratio[0]) for setting in settings]
    name = nexts[0].variant if len({cell.variant for cell in nexts}) == 1 else "the next"
    least, most = min(cell.ratio[0] for cell in nexts), max(cell.ratio[0] for cell in nexts)
    if most > _ALIKE * least:
        return f": {name} takes {numbers.ratio(least)}x to {numbers.ratio(most)}x as long"
    middle, low, high = _hull([cell.ratio for cell in nexts])
    return f": {name} takes {numbers.ratio(middle)}x as long {numbers.interval(low, high, numbers.ratio)}"


# --- what each costs


def _prices(settings: Sequence[Setting]) -> list[str]:
    """Of each variant but the anchor, its latency beside the anchor's and what it does to the predictions."""
    variants = dict.fromkeys(cell.variant for setting in settings for cell in setting.cells if not cell.is_anchor)
    none_is_causal = all(cell.is_causal is False for setting in settings for cell in setting.cells)
    texts = {"": "No router here is causal: none can generate text"} if none_is_causal and settings else {}
    for variant in variants:
        cells = [
            cell for setting in settings for cell in setting.cells if cell.variant == variant and not cell.is_anchor
        ]
        there = [s for s in settings if any(cell.variant == variant and not cell.is_anchor for cell in s.cells)]
        anchors = {setting.anchor for setting in there}
        beside = "the anchor" if len(anchors) > 1 else next(iter(anchors))

        def kind(setting: Setting, variant: str = variant) -> Kind | None:
            cell = _cells([setting], variant)[0]
            return judged(*cell.ratio[1:]) if cell.is_timed else None

        def speed(region: Region, inside: Sequence[Setting], variant: str = variant, beside: str = beside) -> str:
            return _speed(_cells(inside, variant), beside) + region.at

        speeds = _by_region(there, kind, speed) or [_about(cells, beside)]
        parts = [*speeds, _quality(cells, there)]
        if all(cell.is_causal is False for cell in cells) and not none_is_causal:
            parts.append("not causal: it cannot generate text")
        if any(parts):
            texts[variant] = f"{variant}: {'; '.join(filter(None, parts))}"
    if not any(cell.quality for setting in settings for cell in setting.cells) and len(variants):
        known = "; ".join(sorted({_quality_hint(setting) for setting in settings if len(setting.cells) > 1}))
        return [f"No quality was measured{': ' + known if known else ''}", *texts.values()]
    return list(texts.values())


def _about(cells: Sequence[Cell], anchor: str) -> str:
    """A ratio that nothing is concluded from."""
    known = [cell.ratio[0] for cell in cells if not math.isnan(cell.ratio[0])]
    return f"about {numbers.ratio(float(np.median(known)))}x as long as {anchor}, without an interval" if known else ""


def _quality_hint(setting: Setting) -> str:
    if len({cell.choice for cell in setting.cells}) == 1:
        return "the variants compute the same router"
    return "set measure.reference_router, or use a checkpoint with workload=text"


def _speed(cells: Sequence[Cell], anchor: str) -> str:
    """Of cells of one variant: `1.39x slower than native [1.37, 1.41]`, a median and the hull of the intervals."""
    known = [cell.ratio for cell in cells if cell.is_timed]
    if not known:
        return ""
    kinds = {judged(low, high) for _, low, high in known}
    least, most = min(ratio for ratio, _, _ in known), max(ratio for ratio, _, _ in known)
    if kinds in ({"faster"}, {"slower"}) and most > _ALIKE * least:
        ends = (1 / most, 1 / least) if kinds == {"faster"} else (least, most)
        return f"{numbers.ratio(ends[0])}x to {numbers.ratio(ends[1])}x {next(iter(kinds))} than {anchor}"
    middle, low, high = _hull(known)
    bracket = numbers.interval(low, high, numbers.ratio)
    if kinds == {"same"}:
        return f"as fast as {anchor} {bracket}"
    if kinds == {"faster"}:
        return f"{numbers.ratio(1 / middle)}x faster than {anchor} {numbers.interval(1 / high, 1 / low, numbers.ratio)}"
    if kinds == {"slower"}:
        return f"{numbers.ratio(middle)}x slower than {anchor} {bracket}"
    return f"no difference in speed from {anchor} seen {bracket}"


def _quality(cells: Sequence[Cell], settings: Sequence[Setting]) -> str:
    """Of cells of one variant: what it does to the predictions, or to the output."""
    known = [cell.quality for cell in cells if cell.quality is not None]
    if not known or len({quality.kind for quality in known}) > 1:
        return ""
    middle, low, high = _hull([(quality.value, quality.low, quality.high) for quality in known])
    if known[0].kind == "error":
        if all(quality.is_rounding for quality in known):
            return "the same output, but for rounding"
        return f"output error {numbers.short(middle)} beside {_listed([quality.reference for quality in known])}"
    if known[0].kind == "bits":
        beside = [cell.quality.value for s in settings for cell in s.cells if cell.is_anchor and cell.quality]
        text = f"{middle:.2f} bits per byte {numbers.interval(low, high, '{:.2f}'.format)}".rstrip()
        return f"{text}, the anchor {np.median(beside):.2f}" if beside else text
    text = _more_bits(known, low, high)
    if not all(setting.is_beside_native for setting in settings):
        text += " over the checkpoint's own router"
    if all(quality.has_collapsed for quality in known):
        return f"{text}: its predictions collapse"
    if any(quality.has_collapsed for quality in known):
        return f"{text}: its predictions collapse in some settings"
    if math.isnan(low) or math.isnan(high):
        return f"{text}, without an interval"
    if low > 0 and middle > contest.SAME_BITS:
        return text
    if high < 0 and -middle > contest.SAME_BITS:
        return f"{text}: better"
    return f"{text}: {'no' if high <= contest.SAME_BITS else 'not surely'} worse in quality"


def _more_bits(known: Sequence[Quality], low: float, high: float) -> str:
    """A median and the hull of the intervals; a range where settings surely differ."""
    least, most = (pick(known, key=lambda quality: quality.value) for pick in (min, max))
    if most.is_worse_than(least):
        write = numbers.bits(least.value)
        return f"{write(least.value)} to {write(most.value)} bits per byte"
    middle = float(np.median([quality.value for quality in known]))
    write = numbers.bits(middle)
    return f"{write(middle)} bits per byte {numbers.interval(low, high, write)}".rstrip()


# --- what failed


def _not_ok(runs: pd.DataFrame, status: str) -> list[str]:
    """How many cells failed, or were skipped, and why."""
    found = runs.loc[runs["status"] == status, "reason"].fillna("no reason recorded").astype(str)
    reasons = Counter(shorten(reason, 90, placeholder=" ...") for reason in found)
    said = [f"{reason} ({n})" if len(reasons) > 1 else reason for reason, n in reasons.most_common(_MOST_NAMES)]
    said += [f"{len(reasons) - len(said)} more reasons (below)"] if len(reasons) > len(said) else []
    cells = "cells" if len(runs) > 1 else "cell"
    return [f"{len(found):,} of {len(runs):,} {cells} {status}: {', '.join(said)}"] if said else []


def _lies(runs: pd.DataFrame) -> list[str]:
    """The routers that do not have a property that they declare."""
    return [
        f"{router} declares {key}, which does not hold"
        for key in names(PROPERTIES)
        if f"check.{key}" in runs
        for router in runs.loc[runs[f"check.{key}"] == DOES_NOT_HOLD, "router"].dropna().unique()
    ]


# --- what they share


def _by_region(
    settings: Sequence[Setting],
    answer: Callable[[Setting], Hashable],
    text: Callable[[Region, Sequence[Setting]], str],
) -> list[str]:
    """A sentence for each region of settings with the same answer, about the settings that have it; None has none."""
    found = regions([answer(setting) for setting in settings], [setting.place for setting in settings])
    regions_ = [region for region in found if region.answer is not None]
    return [text(region, [settings[index] for index in region.members]) for region in regions_]


def _names(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The anchor first."""
    return tuple(cell.variant for cell in sorted(cells, key=lambda cell: (not cell.is_anchor, cell.variant)))


def _cells(settings: Sequence[Setting], variant: str) -> list[Cell]:
    return [cell for setting in settings for cell in setting.cells if cell.variant == variant]


def _listed(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    if len(words) > _MOST_NAMES + 1:
        return f"{', '.join(words[:_MOST_NAMES])} and {len(words) - _MOST_NAMES} others"
    return listed(words)


def _either(words: Sequence[str]) -> str:
    return _listed(words).replace(" and ", " or ")


def _hull(triples: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The median, and what all intervals lie in; NaN where one has none."""
    array = np.array(triples)
    return float(np.median(array[:, 0])), float(array[:, 1].min()), float(array[:, 2].max())
