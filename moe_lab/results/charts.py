"""What the plots of a sweep show, as numbers and words: `plots` draws it into files, `figures` for the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lab import marks
from moe_lab.records import files
from moe_lab.records.phases import AGREES, OF_THE_PASS
from moe_lab.records.store import ROUTING
from moe_lab.results import coactivation
from moe_lab.results.panels import Chart, Heat, Pairs, Panel, Place, Series, Texts
from moe_lab.results.settings import parts, sizes

LATENCY, _INTERVAL = "latency_ms.p50", ("latency_ms.ci95_low", "latency_ms.ci95_high")
TOKENS_PER_S, LOAD = "throughput.tokens_per_s", "routing.pooled.load_max_over_mean"
OUTPUT_ERROR, REFERENCE = "agreement.output_rel_error", "agreement.reference"
EXPERT_MB = "routing.pooled.expert_mb"
STORED_MB = "weight_changes.stored_mb"
BITS = "quality.bits_per_byte"
_BITS_OF_TEXT = re.compile(r"quality\.domains\.(.+)\.bits_per_byte")
_ENDS = ("_ci95_low", "_ci95_high")
_SIZES = ("batch", "seq_len")
_ENDS_OF = {LATENCY: _INTERVAL, BITS: tuple(BITS + end for end in _ENDS)}
"""What has an interval, and where that stands."""
_KEYS = ("variant", *_INTERVAL)
_PHASE, _SHARE = "phases_ms.", "phases_share."
_PHASES = (*marks.NAMES, "other")

_OVER = r"(latency|throughput|bits)_over_[\w.]+"
_NAMES = (
    "search",
    "latency",
    "load_against_latency",
    "latency_against_error",
    "bytes_against_error",
    "latency_against_bits",
    "bytes_against_bits",
    "stored_against_bits",
    "bits_by_text",
    "expert_load",
    "experts_by_text",
    "coactivation",
    "phases",
    "phase_shares",
)


def is_name(stem: str) -> bool:
    """Whether a chart has this name, which is the stem of its files."""
    return stem in _NAMES or re.fullmatch(_OVER, stem) is not None


Row = dict[str, Any]


class Charts(NamedTuple):
    """All charts that the data allow."""

    drawn: list[Chart]
    left_out: list[str]
    """A sentence for each chart that the data do not allow, and for what could not be read."""
    variants: list[str]
    """In the order of their styles: the anchors first."""
    phases: list[str]
    """In the order of their styles."""


def charts(directory: Path, runs: pd.DataFrame, summary: pd.DataFrame) -> Charts:
    """Of what `aggregate` found in a directory, and of the files beside the records for the load of the experts."""
    left_out: list[str] = []
    names = _in_order(summary)
    runs, summary = _phases_by_kind(_sorted(runs, names)), _sorted(summary, names)
    drawn = [chart for chart in _all(runs, summary, directory, left_out) if chart.panels]
    panels = [panel for chart in drawn if chart.kind == "lines" for panel in chart.panels if isinstance(panel, Panel)]
    styled = list(dict.fromkeys([*names, *(series.name for panel in panels for series in panel.series)]))
    return Charts(drawn, left_out, styled, _phases_in(runs, _PHASE, _SHARE))


def _in_order(summary: pd.DataFrame) -> list[str]:
    """The variants' names; those that are an anchor come first, the most frequent one before."""
    anchors = summary.loc[summary["is_anchor"].fillna(False).astype(bool), "variant"].dropna()
    return list(dict.fromkeys([*anchors.value_counts().index, *sorted(summary["variant"].dropna())]))


def _sorted(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """By model, the largest sizes first: they show most. What was not composed has no variant and nothing to draw."""
    known = frame[frame["variant"].isin(names)]
    place = known["variant"].map({name: index for index, name in enumerate(names)})
    return known.assign(_place=place).sort_values(
        ["model", "batch", "seq_len", "_place"], ascending=[True, False, False, True], kind="stable"
    )


def _all(runs: pd.DataFrame, summary: pd.DataFrame, directory: Path, left_out: list[str]) -> Iterator[Chart]:
    if summary[LATENCY].notna().any():
        yield from _over_what_varies(summary, left_out)
        yield _load_against_latency(summary, left_out)
    else:
        left_out.append("Latency and throughput: no cell was timed.")
    yield from _against_error(summary, left_out)
    has_texts = BITS in runs and runs[BITS].notna().any()
    if has_texts:
        yield from _against_bits(summary, left_out)
        yield from _stored_against_bits(runs)
        yield _bits_by_text(runs, left_out)
    else:
        left_out.append("Bits per byte, and experts by text: no cell used texts (workload=text, measure.quality).")
    yield _expert_load(runs, directory, left_out)
    if has_texts:
        yield _experts_by_text(runs, directory, left_out)
    yield _coactivation(runs, directory, left_out)
    yield from _where_time_goes(runs, left_out)


class _Setting(NamedTuple):
    place: Place
    rows: list[Row]

    @property
    def title(self) -> str:
        return ", ".join(self.place.values())


def _settings(frame: pd.DataFrame, *columns: str) -> list[_Setting]:
    """What these columns hold, by setting. Rows that lack one are out."""
    if not set(columns) <= set(frame):
        return []
    known = frame[frame[list(columns)].notna().all(axis=1)]
    rows = known[[*_KEYS, *columns]].assign(size=sizes(known)).to_dict("records")
    return _of_settings(frame, known.index, rows)


def _of_settings(
    frame: pd.DataFrame, known: pd.Index, rows: Sequence[Row], without: tuple[str, ...] = ()
) -> list[_Setting]:
    """Of those of the frame that are known. What differs between all is said, so a chart of one batch names it too."""
    places = dict(zip(frame.index, parts(frame, without), strict=True))
    found: dict[tuple[str, ...], _Setting] = {}
    for index, row in zip(known, rows, strict=True):
        place = places[index]
        found.setdefault(tuple(place.values()), _Setting(place, [])).rows.append(row)
    return list(found.values())


def _by(names: Iterable[str], rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for name, row in zip(names, rows, strict=True):
        grouped.setdefault(name, []).append(row)
    return grouped


def _series(rows: Sequence[Row], at: str, value: str) -> list[Series]:
    """One per variant, in the order of what they lie at."""
    series = []
    for name, members in _by((row["variant"] for row in rows), rows).items():
        members = sorted(members, key=lambda row: row[at])
        low, high = ([_known(row.get(end)) for row in members] for end in _ENDS_OF.get(value, ("", "")))
        values = [float(row[value]) for row in members]
        series.append(Series(name, [row[at] for row in members], values, low, high, [row["size"] for row in members]))
    return series


def _panel(setting: _Setting, at: str, value: str) -> Panel:
    return Panel(setting.title, _series(setting.rows, at, value), setting.place)


def _over_what_varies(summary: pd.DataFrame, left_out: list[str]) -> Iterator[Chart]:
    """Over each size, and each number of the configuration, that varies; with none of them a dot per variant.

    Throughput, and bits per byte where they depend on it, are drawn over the one with the most values.
    """
    panels = {}
    for column in (*_SIZES, *_numbers(summary)):
        name, found = _name(column, summary), _over(summary, column, LATENCY)
        if found:
            panels[column] = found
            yield Chart(f"latency_over_{name}", "lines", f"Latency over {name}", name, "latency (ms)", found, True)
        else:
            left_out.append(
                f"Latency over {name}: no variant was timed at two values of it with all other settings equal."
            )
    if not panels:
        left_out.append("Throughput: with one size per setting it shows the same as the latency.")
        dots = [_panel(each, "variant", LATENCY) for each in _settings(summary, LATENCY)]
        yield Chart("latency", "dots", "Latency", "latency (ms)", "", dots, True)
        return
    over = max(
        panels, key=lambda column: len({at for panel in panels[column] for one in panel.series for at in one.at})
    )
    name = _name(over, summary)
    per_s = _over(summary, over, TOKENS_PER_S)
    yield Chart(f"throughput_over_{name}", "lines", f"Throughput over {name}", name, "tokens / s", per_s)
    if BITS in summary and over not in _SIZES:
        bits = _over(summary, over, BITS)
        yield Chart(f"bits_over_{name}", "lines", f"Bits per byte over {name}", name, "bits per byte", bits, True)


def _numbers(summary: pd.DataFrame) -> list[str]:
    """The columns of numbers of the configuration; their names, which go into names of files, are checked."""
    return [
        str(name)
        for name in summary
        if re.fullmatch(r"config(\.\w+)+", str(name))
        and pd.api.types.is_numeric_dtype(summary[name])
        and not pd.api.types.is_bool_dtype(summary[name])
    ]


def _name(column: str, summary: pd.DataFrame) -> str:
    """The last word of a key, or all of it where another number ends in the same."""
    last = _last(column)
    alone = sum(_last(other) == last for other in (*_SIZES, *_numbers(summary))) < 2
    return last if alone else column.removeprefix("config.")


def _last(column: str) -> str:
    return column.rsplit(".", 1)[-1]


def _over(summary: pd.DataFrame, key: str, value: str) -> list[Panel]:
    """A panel per setting in which a variant has two values of `key`.

    Variants that differ in the key alone are one line; one that does not have the key is a level line.
    """
    known = summary[summary[value].notna()].astype({key: object})
    known = known.assign(variant=[_without(name, _last(key)) for name in known["variant"]]) if "." in key else known
    columns = [name for name in dict.fromkeys((*_KEYS, *_ENDS_OF.get(value, ()), key, value)) if name in known]
    rows = known[columns].assign(size=sizes(known)).to_dict("records")
    panels = []
    for each in _of_settings(summary, known.index, rows, without=(key,)):
        there = [row for row in each.rows if not pd.isna(row[key])]
        series = _series(there, key, value)
        if not any(len(set(one.at)) > 1 for one in series):
            continue
        ends = min(row[key] for row in there), max(row[key] for row in there)
        level = [{**row, key: end} for row in each.rows if pd.isna(row[key]) for end in ends]
        panels.append(Panel(each.title, series + _series(level, key, value), each.place))
    return panels


def _without(variant: str, key: str) -> str:
    """`sinkhorn(iters=5, temperature=0.5)` is `sinkhorn(iters=5)` without the temperature."""
    cut = re.sub(rf"(?<![\w.]){re.escape(key)}=[^,()]*(, )?", "", variant)
    return cut.replace(", )", ")").replace("()", "")


def _load_against_latency(summary: pd.DataFrame, left_out: list[str]) -> Chart:
    settings = _settings(summary, LOAD, LATENCY)
    if not settings:
        left_out.append("Load balance against latency: no cell recorded its routing (measure.routing).")
    panels = [_panel(each, LOAD, LATENCY) for each in settings]
    label = "load of the busiest expert / mean load"
    return Chart("load_against_latency", "points", "Load balance against latency", label, "latency (ms)", panels, True)


def _against_error(summary: pd.DataFrame, left_out: list[str]) -> Iterator[Chart]:
    """What another router costs and what it changes, by setting: the Pareto plots."""
    label = "relative error of the output compared with the reference router"
    for name, column, title, axis in (
        ("latency_against_error", LATENCY, "Latency against output error", "latency (ms)"),
        ("bytes_against_error", EXPERT_MB, "Bytes of experts against output error", "weights of experts in use (MB)"),
    ):
        panels = [
            Panel(f"{each.title}, against {reference}", _series(of_reference, OUTPUT_ERROR, column), each.place)
            for each in _settings(summary, OUTPUT_ERROR, column, REFERENCE)
            for reference, of_reference in _by((row[REFERENCE] for row in each.rows), each.rows).items()
        ]
        if not panels:
            left_out.append(f"{title}: no cell has both (measure.reference_router, measure.routing).")
        yield Chart(name, "front", title, label, axis, panels, column == LATENCY)


def _against_bits(summary: pd.DataFrame, left_out: list[str]) -> Iterator[Chart]:
    """What another router costs and what it does to the predictions, by setting."""
    for name, column, title, axis in (
        ("latency_against_bits", LATENCY, "Latency against bits per byte", "latency (ms)"),
        ("bytes_against_bits", EXPERT_MB, "Bytes of experts against bits per byte", "weights of experts in use (MB)"),
    ):
        panels = [_panel(each, BITS, column) for each in _settings(summary, BITS, column)]
        if not panels:
            left_out.append(f"{title}: no cell has both (measure.quality, measure.routing).")
        yield Chart(name, "front", title, "bits per byte", axis, panels, column == LATENCY)


def _stored_against_bits(runs: pd.DataFrame) -> Iterator[Chart]:
    """What models with changed weights take in their formats, and what they do to the predictions."""
    if STORED_MB not in runs or runs[STORED_MB].isna().all():
        return  # no question of this sweep
    known = runs.assign(**{STORED_MB: runs[STORED_MB].fillna(runs["memory.parameters_mb"])})
    known = known[known[[BITS, STORED_MB]].notna().all(axis=1)]
    rows = known[["variant", BITS, STORED_MB]].assign(size=sizes(known)).to_dict("records")
    panels = [_panel(each, BITS, STORED_MB) for each in _of_settings(runs, known.index, rows)]
    label = "parameters (MB, computed)"
    yield Chart("stored_against_bits", "front", "Parameters against bits per byte", "bits per byte", label, panels)


def _bits_by_text(runs: pd.DataFrame, left_out: list[str]) -> Chart:
    """A row for each text, in it a value of every variant; of several records of a cell the first."""
    texts = {match[1]: match[0] for name in runs if (match := _BITS_OF_TEXT.fullmatch(str(name)))}
    panels = []
    for each in _by_setting_and_text(runs, texts):
        series = []
        for variant, (row, *_) in _by((row["variant"] for row in each.rows), each.rows).items():
            there = {text: column for text, column in texts.items() if not pd.isna(row[column])}
            low, high = ([_known(row.get(column + end)) for column in there.values()] for end in _ENDS)
            value = [float(row[column]) for column in there.values()]
            series.append(Series(variant, list(there), value, low, high, [row["size"]] * len(there)))
        panels.append(Panel(each.title, series, each.place))
    if not panels:
        left_out.append("Bits per byte by text: every text is shorter than one window (seq_len tokens).")
    return Chart("bits_by_text", "dots", "Bits per byte by text", "bits per byte", "", panels, True)


def _by_setting_and_text(runs: pd.DataFrame, texts: dict[str, str]) -> list[_Setting]:
    """The numbers of texts, by setting, of the rows that have one."""
    columns = [name + end for name in texts.values() for end in ("", *_ENDS) if name + end in runs]
    known = runs[runs[list(texts.values())].notna().any(axis=1)]
    rows = known[["variant", *columns]].assign(size=sizes(known)).to_dict("records")
    return _of_settings(runs, known.index, rows)


def _known(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _expert_load(runs: pd.DataFrame, root: Path, left_out: list[str]) -> Chart:
    """Cells of a setting that have equal counts share a panel: who computes the experts does not change their load."""
    panels: list[Heat] = []
    unreadable: list[str] = []
    for setting, arrays in _arrays(runs, root, _counts, unreadable):
        panels += [Heat(setting.title, *array)._replace(place=setting.place) for array in arrays]
    if unreadable:
        left_out.append(f"Expert load: routing.npz cannot be read in {', '.join(unreadable)}.")
    if not panels:
        left_out.append("Expert load: no cell recorded its routing (measure.routing).")
    return Chart("expert_load", "heat", "Expert load (slots / mean of the layer)", "expert", "layer", panels)


def _experts_by_text(runs: pd.DataFrame, root: Path, left_out: list[str]) -> Chart:
    """As `_expert_load`; a file that is damaged as a whole is said there too."""
    unreadable: list[str] = []
    found = _arrays(runs, root, _texts, unreadable)
    panels = [
        Texts(setting.title, *array)._replace(place=setting.place) for setting, arrays in found for array in arrays
    ]
    if unreadable:
        left_out.append(f"Experts by text: routing.npz cannot be read in {', '.join(unreadable)}.")
    elif not panels:
        left_out.append("Experts by text: no cell recorded which experts its texts use.")
    title = "Experts by text (slots / mean of the layer and text)"
    return Chart("experts_by_text", "texts", title, "expert", "", panels)


def _coactivation(runs: pd.DataFrame, root: Path, left_out: list[str]) -> Chart:
    """As `_expert_load`; what cannot be read is said there."""
    found = _arrays(runs, root, coactivation.read, [])
    panels = [
        Pairs(setting.title, *array)._replace(place=setting.place) for setting, arrays in found for array in arrays
    ]
    panels = [panel for panel in panels if panel.counts_LEE.shape[1] > 1]
    if not panels:
        left_out.append("Co-activation: no cell recorded which experts are used together (measure.routing).")
    title = "Co-activation (share of an expert's tokens that also use the other expert)"
    return Chart("coactivation", "pairs", title, "other expert", "expert", panels)


def _arrays(
    runs: pd.DataFrame, root: Path, read: Callable[[Path], tuple[Any, ...] | None], unreadable: list[str]
) -> Iterator[tuple[_Setting, list[tuple[Any, ...]]]]:
    """By setting what `read` finds in the `routing.npz` of cells: each different once, behind its variants."""
    for setting in _settings(runs, "directory"):
        different: list[tuple[Any, ...]] = []
        for row in setting.rows:
            try:
                arrays = read(root / row["directory"] / ROUTING)
            except FileNotFoundError:
                continue  # a model without experts, or a cell that failed before
            except Exception as error:  # whatever zipfile, zlib and numpy raise for a file that was damaged
                unreadable.append(f"{row['directory']} ({error})")
                continue
            if arrays is None:
                continue
            same = [other for other in different if all(map(np.array_equal, other[1:], arrays))]
            if same:
                same[0][0].append(row["variant"])
            else:
                different.append(([row["variant"]], *arrays))
        yield setting, different


def _counts(path: Path) -> tuple[list[int], np.ndarray]:
    files.require_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        layers, counts_LE = arrays["layer"].tolist(), arrays["counts_LE"]
    if counts_LE.dtype.kind not in "iu" or counts_LE.ndim != 2 or len(layers) != len(counts_LE) or not counts_LE.size:
        raise ValueError("not counts by layer and expert")
    return layers, counts_LE


def _texts(path: Path) -> tuple[list[int], np.ndarray, list[str]] | None:
    """Layers, counts and the texts' names; None where the run had no texts."""
    files.require_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        if "domain_counts_LGE" not in arrays:
            return None
        layers, counts_LGE, texts = arrays["layer"].tolist(), arrays["domain_counts_LGE"], arrays["domain"].tolist()
    whole = counts_LGE.dtype.kind in "iu" and counts_LGE.ndim == 3 and counts_LGE.size
    if not whole or counts_LGE.shape[:2] != (len(layers), len(texts)):
        raise ValueError("not counts by layer, text and expert")
    return layers, counts_LGE, texts


def _phases_by_kind(runs: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds only where the pass that measured the phases agrees with the latency; elsewhere shares of it.

    Older records have milliseconds alone, whatever the latency.
    """
    total = f"{_PHASE}sum_ms"
    if total not in runs:
        return runs
    agrees = (runs[total] / runs[LATENCY] - 1).abs() <= AGREES
    columns: dict[str, pd.Series] = {}
    for name in [str(name) for name in runs if str(name).startswith(_PHASE)]:
        if (phase := name.removeprefix(_PHASE)) not in OF_THE_PASS:
            share = runs[name] / runs[total]
            known = runs[_SHARE + phase].fillna(share) if _SHARE + phase in runs else share
            columns |= {name: runs[name].where(agrees), _SHARE + phase: known.where(~agrees)}
    return runs.assign(**columns)


def _phases_in(runs: pd.DataFrame, *prefixes: str) -> list[str]:
    """The phases that took time somewhere; a joined name stands where its first phase would."""

    def order(phase: str) -> tuple[int, str]:
        first = phase.split("+")[0]
        return (_PHASES.index(first) if first in _PHASES else len(_PHASES), phase)

    taken = {
        phase
        for prefix in prefixes
        for phase in (str(name).removeprefix(prefix) for name in runs if str(name).startswith(prefix))
        if phase not in OF_THE_PASS and (runs[prefix + phase] > 0).any()
    }
    return sorted(taken, key=order)


def _where_time_goes(runs: pd.DataFrame, left_out: list[str]) -> Iterator[Chart]:
    """Milliseconds of the cells whose phases agree with the latency, and shares of the others."""
    title = "Where the time goes"
    shares = f"{title}, as shares: the pass that measured this took more than {AGREES:.0%} longer or shorter"
    replays = _of_a_replay(runs)
    runs = runs.assign(variant=runs["variant"] + replays.map({True: " (replay)", False: ""}))
    whose = "a pass (replay: the kernels of the graph)" if replays.any() else "an eager pass"
    charts = [
        Chart("phases", "stack", title, f"ms of {whose}", "", _stacks(runs, _PHASE)),
        Chart("phase_shares", "stack", shares, f"share of {whose}", "", _stacks(runs, _SHARE)),
    ]
    if not any(chart.panels for chart in charts):
        left_out.append(f"{title}: no cell measured its phases (measure.phases).")
    yield from charts


def _of_a_replay(runs: pd.DataFrame) -> pd.Series:
    """Whether the phases are those of a CUDA graph's own kernels; else of an eager pass."""
    name = f"{_PHASE}execution"
    return runs[name].eq("cuda_graph").fillna(False).astype(bool) if name in runs else pd.Series(False, runs.index)


def _stacks(runs: pd.DataFrame, prefix: str) -> list[Panel]:
    phases = _phases_in(runs, prefix)
    columns = [prefix + phase for phase in phases]
    if not columns:
        return []
    some = runs[columns].notna().any(axis=1)
    settings = _settings(
        runs.assign(**{name: runs[name].mask(some, runs[name].fillna(0.0)) for name in columns}), *columns
    )
    panels = []
    for each in settings:
        bars, nothing = [row["variant"] for row in each.rows], [None] * len(each.rows)
        size = [row["size"] for row in each.rows]
        stacked = [(phase, [float(row[prefix + phase]) for row in each.rows]) for phase in phases]
        series = [Series(name, bars, part, nothing, nothing, size) for name, part in stacked if any(part)]
        panels.append(Panel(each.title, series, each.place))
    return panels
