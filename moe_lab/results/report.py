"""`report.html`: one page that shows a sweep to other people. It holds all that it needs and loads nothing."""

from __future__ import annotations

import hashlib
import secrets
import shlex
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
from jinja2 import Template
from markupsafe import Markup

from moe_lab.records.store import LOG, PLAN, write_atomic
from moe_lab.results import contest, glossary, pareto, search, search_page
from moe_lab.results.aggregate import Aggregate
from moe_lab.results.answers import answers
from moe_lab.results.cards import BITS as BITS_COLUMNS
from moe_lab.results.cards import RANKS, cards
from moe_lab.results.charts import Charts, charts
from moe_lab.results.energy import energy
from moe_lab.results.figures import figures
from moe_lab.results.load import UNREADABLE_BECAUSE, Plan, one_line, read_plan
from moe_lab.results.numbers import bits_per_byte, error, four, interval, ratio, short
from moe_lab.results.panels import FILE_PANELS
from moe_lab.results.profiles import profiles
from moe_lab.results.settings import describe, machines
from moe_lab.results.subject import facts
from moe_lab.results.templates import environment
from moe_lab.results.verdicts import Verdict, verdicts

REPORT, PLOTLY_FILE = "report.html", "plotly.min.js"
TABLES = ("runs.csv", "runs.parquet", "summary.csv", "samples.parquet", "coactivation.parquet", "unreadable.csv")

# Columns of `runs` that stand in the table only where they differ between its rows.
_WHAT = ("model", "workload", "device", "dtype", "router", "experts", "execution", "seed")
# Heading and column of what was measured beside latency and quality, and how it is written; left out where no cell
# has it.
_MEASURED = (
    ("ms per output token", "throughput.time_per_output_token_ms", four),
    ("tokens / s", "throughput.tokens_per_s", four),
    ("peak MB", "memory.peak_mb", four),
    ("J / token", "energy.j_per_token", four),
    ("load max / mean", "routing.pooled.load_max_over_mean", four),
    ("dead experts", "routing.pooled.dead_experts", short),
    ("relative error", "check.rel_error", error),
)


class Field(NamedTuple):
    """One field of the table: what is shown, and the number to sort by where it is one."""

    text: str
    number: float | None = None


class Table(NamedTuple):
    """All cells of the sweep; a row is (status, link to its folder, fields)."""

    heads: list[str]
    parts: list[tuple[str, list[tuple[str, str, list[Field]]]]]
    """The rows of each machine, with its name where there are several: they are not sorted among each other."""


class Front(NamedTuple):
    """The variants of one setting whose predictions are known, those that predict best first."""

    title: str
    heads: list[str]
    rows: list[tuple[str, list[Field], str]]
    """(variant, what it costs, what dominates it: empty on the front)."""


def write(directory: Path, aggregate: Aggregate, plotly: str | None = None) -> Path:
    """Write `directory/report.html` from what `aggregate(directory)` returned, and return its path.

    Links to the plots and tables that are there; draw them before. `plotly` is one of `PLOTLY`, or None for what the
    sweep asked for (`sweep.plotly`): within the page, in a file beside it that it loads, or pictures of the plots in
    its place. Raises `OSError` if the page cannot be written.
    """
    runs, summary, unreadable = aggregate
    plan, plan_error = _plan(directory)
    plotly = plotly or plan.plotly
    searched, search_error = search.find(directory, runs)
    all_charts = search_page.with_chart(charts(directory, runs, summary), searched)
    drawn, too_large = _pictures(directory, all_charts) if plotly == "none" else figures(all_charts)
    package = files("moe_lab.results")
    page = _template().render(
        css=(package / "report.css").read_text(encoding="utf-8"),
        js=(package / "report.js").read_text(encoding="utf-8"),
        title=plan.name or directory.resolve().name,
        facts=facts(directory, runs, plan, sorted(summary["anchor"].dropna().unique())),
        answers=answers(runs, summary, search.sentences(searched) if searched else ()),
        search=search_page.table(searched) if searched else None,
        fronts=_fronts(runs, summary),
        terms=glossary.TERMS,
        verdicts=_by_group(summary),
        status=list(dict.fromkeys(runs["status"].astype(str))),
        figures=drawn,
        energy=energy(runs),
        profiles=profiles(directory, runs),
        routers=cards(runs),
        ranks=RANKS,
        floor="agreement.reference" in runs and runs["agreement.reference"].notna().any(),
        left_out=all_charts.left_out + too_large + ([search_error] if search_error else []),
        table=_table(runs, plan.compare),
        problems=_problems(directory, runs),
        exports=_exports(directory, runs),
        unreadable=unreadable[["path", "error"]].to_dict("records"),
        warnings=_warnings(runs),
        environments=environments(runs),
        commands=[shlex.join(words) for words in plan.commands],
        plan_error=plan_error,
        links=[name for name in TABLES if (directory / name).exists()],
        plots=[
            (chart.title, chart.name, min(FILE_PANELS, len(chart.panels)), len(chart.panels))
            for chart in all_charts.drawn
            if (directory / "plots" / f"{chart.name}.png").exists()
        ],
        plotly=plotly,
        plotly_file=PLOTLY_FILE,
        plotly_source=_library().decode() if plotly == "inline" else "",
        nonce=(nonce := secrets.token_hex(16)),
    )
    # Of the page's own content, so that the same results make the same page. No text in it can know its hash.
    page = page.replace(nonce, hashlib.sha256(page.replace(nonce, "").encode(errors="replace")).hexdigest()[:32])
    path = directory / REPORT
    if plotly == "directory":
        write_atomic(directory / PLOTLY_FILE, _library())
    write_atomic(path, page.encode(errors="replace"))
    if plotly != "directory":  # one of an earlier page
        (directory / PLOTLY_FILE).unlink(missing_ok=True)
    return path


def _template() -> Template:
    templates = environment("moe_lab.results")
    # The keys of a setting, the model first; without spaces the data of the plots is a tenth smaller.
    templates.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    templates.filters |= {"mark": glossary.mark, "term": glossary.term, "ident": glossary.ident}
    templates.filters["unbroken"] = _whole_numbers
    return templates.get_template("report.html.jinja")


def _library() -> bytes:
    return (files("plotly") / "package_data" / PLOTLY_FILE).read_bytes()


def _pictures(directory: Path, found: Charts) -> tuple[list[dict[str, str]], list[str]]:
    """For each chart its picture within the page, and a sentence for those that lack one and for panels left out."""
    pictures, left_out = [], []
    for chart in found.drawn:
        file = directory / "plots" / f"{chart.name}.png"
        if not file.exists():
            left_out.append(f"{chart.title}: plots/{chart.name}.png not found; run moe-lab report.")
            continue
        source = "data:image/png;base64," + b64encode(file.read_bytes()).decode()
        pictures.append({"name": chart.name, "title": chart.title, "picture": source})
        if len(chart.panels) > FILE_PANELS:
            left_out.append(f"{chart.title}: the first {FILE_PANELS} of {len(chart.panels)} panels are shown.")
    return pictures, left_out


def _plan(directory: Path) -> tuple[Plan, str | None]:
    """The content of `plan.json`, and the error if it cannot be read."""
    try:
        return read_plan(directory), None if (directory / PLAN).exists() else f"{PLAN} not found"
    except UNREADABLE_BECAUSE as error:
        return Plan(), f"{PLAN} cannot be read: {one_line(error)}"


def _by_group(summary: pd.DataFrame) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts(summary):
        groups.setdefault(verdict.group, []).append(verdict)
    return groups


def _fronts(runs: pd.DataFrame, summary: pd.DataFrame) -> list[Front]:
    """Of each setting in which routers that compute different things predicted a text."""
    titles = dict(zip(summary["directory"], describe(summary), strict=True))
    by_folder = {row["directory"]: row for row in runs.to_dict("records")}
    latency = {row["directory"]: row for row in summary.to_dict("records")}
    found = []
    for setting in contest.settings(runs, summary):
        known = [(cell.quality.value, cell) for cell in setting.cells if cell.quality and cell.quality.kind != "error"]
        if len({cell.choice for _, cell in known}) < 2:
            continue
        beaten = pareto.dominated(setting)
        fields: dict[str, list[Field]] = {head: [] for head in _COSTS}
        cells = [cell for _, cell in sorted(known, key=lambda pair: pair[0])]
        for cell in cells:
            row = {**by_folder[cell.directory], **latency[cell.directory]}
            for head, field in _COSTS.items():
                fields[head].append(field(row))
        heads = [head for head, column in fields.items() if any(field.text for field in column)]
        columns = zip(*(fields[head] for head in heads), strict=True)
        reasons = [f"by {at.by}: {at.why}" if (at := beaten.get(cell.variant)) else "" for cell in cells]
        rows = list(zip([cell.variant for cell in cells], map(list, columns), reasons, strict=True))
        found.append(Front(titles[cells[0].directory], heads, rows))
    return found


def _table(runs: pd.DataFrame, compare: Sequence[str]) -> Table:
    """By machine and setting, in each the anchor first; what is compared stands in the variant's name."""
    runs = runs.assign(machine=machines(runs))
    followers = ~runs["cell_id"].isin(runs["ratio_to_anchor.anchor"])
    beside = runs.assign(setting=describe(runs), other=followers, unknown=runs["machine"] == "")
    # One machine after the other, the rows without one last.
    order = ["unknown", "machine", "model", "batch", "seq_len", "setting", "other", "variant"]
    runs = runs.loc[beside.sort_values(order, kind="stable").index]
    config = [str(name) for name in runs if str(name).startswith("config.")]
    others = [name for name in (*_WHAT, *config) if name.removeprefix("config.").split(".")[0] not in compare]
    differ = [name for name in others if runs[name].astype(str).nunique() > 1]
    columns = [(name, name) for name in ("status", "variant", "batch", "seq_len")]
    columns += [(name.removesuffix(".name").rsplit(".", 1)[-1], name) for name in differ]
    fields = {head: [_field(value) for value in runs[name].astype(object)] for head, name in columns}
    rows = runs[[str(name) for name in runs if str(name).startswith(_OF_FIRST)]].to_dict("records")
    fields |= {head: [field(row) for row in rows] for head, field in _FIRST.items()}
    fields |= {
        head: [_field(value, write) for value in runs[name].astype(object)]
        for head, name, write in _MEASURED
        if name in runs
    }
    kept = [head for head, column in fields.items() if any(field.text for field in column)]
    fields["cell"] = [Field(str(cell_id)) for cell_id in runs["cell_id"]]
    links = [_link(folder, "") for folder in runs["directory"]]
    heads = [*kept, "cell"]
    cells = [list(row) for row in zip(*(fields[head] for head in heads), strict=True)]
    parts: dict[str, list[tuple[str, str, list[Field]]]] = {}
    for machine, row in zip(runs["machine"], zip(runs["status"].astype(str), links, cells, strict=True), strict=True):
        parts.setdefault(machine, []).append(row)
    if len(parts) > 1 and "" in parts:
        parts["reached no device"] = parts.pop("")
    return Table(heads, list(parts.items()))


def _with_interval(name: str, row: Mapping[Any, Any]) -> Field:
    """`1.234 [1.210, 1.250]`; with a ~ in front if the latency is not stable, and a word if there is no interval."""
    value, low, high = (row[f"{name}.{end}"] for end in ("p50", "ci95_low", "ci95_high"))
    if pd.isna(value):
        return Field("")
    sign = "~" if row.get(f"{name}.stable") is False else ""
    write = ratio if name == "ratio_to_anchor" else short
    bracket = "no interval" if pd.isna(low) or pd.isna(high) else interval(low, high, write)
    return Field(_unbroken(f"{sign}{write(value)}", bracket), float(f"{value:.7g}"))


def _bits(row: Mapping[Any, Any]) -> Field:
    values = [row.get(name) for name in BITS_COLUMNS]
    value, *rest = (None if each is None or pd.isna(each) else float(each) for each in values)
    bits, _, bracket = bits_per_byte(value, *rest).partition(" [")
    return Field(_unbroken(bits, f"[{bracket}" if bracket else ""), value)


def _unbroken(value: str, bracket: str) -> str:
    """A line may break between a value and its interval, and nowhere else."""
    return f"{value} {bracket}".rstrip().replace(", ", ",\u00a0").replace("no interval", "no\u00a0interval")


def _whole_numbers(text: str) -> Markup:
    """A line may break between the words of a field of a card, but neither in a number nor in an interval."""
    words = text.replace(", ", ",\u00a0").split(" ")
    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in words)


def _plain(name: str, write: Callable[[float], str] = four) -> Callable[[Mapping[Any, Any]], Field]:
    return lambda row: _field(row[name], write) if name in row else Field("")


_FIRST: dict[str, Callable[[Mapping[Any, Any]], Field]] = {
    "median ms": partial(_with_interval, "latency_ms"),
    "x anchor": partial(_with_interval, "ratio_to_anchor"),
    "bits per byte": _bits,
    "KL to native": _plain("quality.kl_to_native"),
    "top-1 agreement": _plain("quality.top1_agreement"),
    "output error": _plain("agreement.output_rel_error"),
}
"""What latency and quality were, side by side."""
_COSTS: dict[str, Callable[[Mapping[Any, Any]], Field]] = {
    "bits per byte": _bits,
    "fewest experts": _plain("routing.worst.unique_experts", short),
    "experts MB": _plain("routing.pooled.expert_mb", short),
    "median ms": partial(_with_interval, "latency_ms"),
    "x anchor": partial(_with_interval, "ratio_to_anchor"),
    "J / token": _plain("energy.j_per_token", short),
}
"""Of a front."""
_OF_FIRST = ("latency_ms.", "ratio_to_anchor.", "quality.", "agreement.output")
"""How the columns begin that these read."""


def _field(value: Any, write: Callable[[float], str] = four) -> Field:
    if isinstance(value, list) or not pd.isna(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Field(str(value))
        if isinstance(value, int):
            return Field(f"{value:,}", float(value))
        return Field(write(value), float(f"{value:.7g}"))
    return Field("")


def _link(folder: str, file: str) -> str:
    """Quoted, a name cannot be read as anything but a path below this page."""
    return quote(f"{folder}/{file}")


def _problems(directory: Path, runs: pd.DataFrame) -> list[dict[str, str]]:
    """Failures, then skips, each with what was run, why not, and where its log lies."""
    bad = runs[runs["status"] != "ok"].sort_values("status", kind="stable")
    what = describe(runs)
    return [
        {
            "status": str(row["status"]),
            "what": ", ".join(part for part in (_text(row["variant"]), what[index]) if part) or str(row["directory"]),
            "reason": _text(row["reason"]) or "no reason recorded",
            "log": _link(row["directory"], LOG) if (directory / row["directory"] / LOG).exists() else "",
        }
        for index, row in bad.iterrows()
    ]


def _exports(directory: Path, runs: pd.DataFrame) -> list[dict[str, str]]:
    """The ONNX pairs of the cells that wrote one, with what their parity says, if that still lies below the cell."""
    if "export.dir" not in runs:
        return []
    what, exports = describe(runs), []
    for index, row in runs[runs["export.dir"].notna()].iterrows():
        link = _link(row["directory"], "netron/parity.json")
        exports.append(
            {
                "what": ", ".join(part for part in (_text(row["variant"]), what[index]) if part),
                "dir": str(row["export.dir"]),
                "link": link if (directory / row["directory"] / "netron" / "parity.json").exists() else "",
                "parity": _text(row.get("export.parity.status")),
                "error": _field(row.get("export.parity.rel_error")).text,
                "nodes": f"{row['export.nodes']} in the graph, {row['export.functions']} functions",
                "size": f"{short(row['export.params_bytes'] / 1e6)} MB",
            }
        )
    return exports


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _warnings(runs: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """(cell, warning) by what stands before the colon: what follows are often its numbers."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    what = describe(runs)
    for index, row in runs[["variant", "warnings"]].iterrows():
        for text in row["warnings"] if isinstance(row["warnings"], list) else ():
            kinds.setdefault(text.split(":")[0], []).append((f"{_text(row['variant'])}, {what[index]}", text))
    copies = runs[runs["n_records"] > 1]
    for index, row in copies.iterrows():
        kinds.setdefault("cells with more than one record in this folder", []).append(
            (what[index], str(row["directory"]))
        )
    return kinds


def environments(runs: pd.DataFrame) -> dict[str, Any]:
    """A column per machine and versions; a field in which the records of one differ has all its values."""
    columns = ["code_id", *(str(name) for name in runs if str(name).startswith("environment."))]
    groups = list(runs.groupby(runs["env_id"].fillna("unknown"), sort=False))
    rows = []
    for name in columns:
        values = [", ".join(dict.fromkeys(_field(value).text for value in group[name])) for _, group in groups]
        if any(values):
            rows.append((name.removeprefix("environment."), values, len({value for value in values if value}) > 1))
    return {"heads": [(str(env_id), len(group)) for env_id, group in groups], "rows": rows}
