"""`report.html`: one page that shows a sweep to other people. It holds all that it needs and loads nothing."""

from __future__ import annotations

import secrets
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from moe_lab.records.schema import LAUNCH_BOUND
from moe_lab.records.store import LOG, PLAN, write_atomic
from moe_lab.results.aggregate import Aggregate
from moe_lab.results.cards import RANKS, cards
from moe_lab.results.charts import BITS, FILE_PANELS, charts
from moe_lab.results.figures import figures
from moe_lab.results.load import UNREADABLE_BECAUSE, Plan, one_line, read_plan
from moe_lab.results.numbers import four, short
from moe_lab.results.settings import describe
from moe_lab.results.verdicts import Verdict, verdicts

REPORT = "report.html"
TABLES = ("runs.csv", "runs.parquet", "summary.csv", "samples.parquet", "coactivation.parquet", "unreadable.csv")

# Heading and column of `runs`. The first stand in the table only where they differ between its rows.
_WHAT = ("workload", "device", "dtype", "router", "experts", "execution", "seed", "environment.device_name")
_MEASURED = (
    ("median ms", "latency_ms.p50"),
    ("stable", "latency_ms.stable"),
    ("ms from", "latency_ms.ci95_low"),
    ("ms to", "latency_ms.ci95_high"),
    ("x anchor", "ratio_to_anchor.p50"),
    ("x from", "ratio_to_anchor.ci95_low"),
    ("x to", "ratio_to_anchor.ci95_high"),
    ("tokens / s", "throughput.tokens_per_s"),
    ("peak MB", "memory.peak_mb"),
    ("load max / mean", "routing.pooled.load_max_over_mean"),
    ("dead experts", "routing.pooled.dead_experts"),
    ("relative error", "check.rel_error"),
)
# These only where some cell has them.
_MEASURED_SOMETIMES = (
    ("ms per output token", "throughput.time_per_output_token_ms"),
    ("bits per byte", "quality.bits_per_byte"),
    ("over native", "quality.delta_bits_per_byte"),
    ("over native from", "quality.delta_bits_per_byte_ci95_low"),
    ("over native to", "quality.delta_bits_per_byte_ci95_high"),
    ("KL to native", "quality.kl_to_native"),
    ("top-1 agreement", "quality.top1_agreement"),
)


class Field(NamedTuple):
    """One field of the table: what is shown, and the number to sort by where it is one."""

    text: str
    number: float | None = None


class Table(NamedTuple):
    """All cells of the sweep; a row is (status, link to its folder, fields)."""

    heads: list[str]
    rows: list[tuple[str, str, list[Field]]]


def write(directory: Path, aggregate: Aggregate) -> Path:
    """Write `directory/report.html` from what `aggregate(directory)` returned, and return its path.

    Links to the plots and tables that are there; draw them before. Raises `OSError` if the page cannot be written.
    """
    runs, summary, unreadable = aggregate
    all_charts = charts(directory, runs, summary)
    drawn, too_large = figures(all_charts)
    plan, plan_error = _plan(directory)
    environment = Environment(
        loader=PackageLoader("moe_lab.results", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    package = files("moe_lab.results")
    page = environment.get_template("report.html.jinja").render(
        css=(package / "report.css").read_text(encoding="utf-8"),
        js=(package / "report.js").read_text(encoding="utf-8"),
        title=plan.name or directory.resolve().name,
        compare=plan.compare,
        machines=sorted(set(runs["environment.device_name"].dropna())),
        times=_times(runs["started"]),
        launch_bound=_launch_bound(runs),
        verdicts=_by_group(summary),
        status=Counter(runs["status"].astype(str)),
        not_run=len(plan.statuses.keys() - set(runs["cell_id"])),
        figures=drawn,
        routers=cards(runs),
        ranks=RANKS,
        texts=BITS in runs and runs[BITS].notna().any(),
        floor="agreement.reference" in runs and runs["agreement.reference"].notna().any(),
        left_out=all_charts.left_out + too_large,
        table=_table(runs, plan.compare),
        problems=_problems(directory, runs),
        exports=_exports(directory, runs),
        unreadable=unreadable[["path", "error"]].to_dict("records"),
        warnings=_warnings(runs),
        environments=_environments(runs),
        commands=[shlex.join(words) for words in plan.commands],
        plan_error=plan_error,
        links=[name for name in TABLES if (directory / name).exists()],
        plots=[
            (chart.title, chart.name, min(FILE_PANELS, len(chart.panels)), len(chart.panels))
            for chart in all_charts.drawn
            if (directory / "plots" / f"{chart.name}.png").exists()
        ],
        plotly=(files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
        nonce=secrets.token_hex(16),
    )
    path = directory / REPORT
    write_atomic(path, page.encode(errors="replace"))
    return path


def _plan(directory: Path) -> tuple[Plan, str | None]:
    """The content of `plan.json`, and the error if it cannot be read."""
    try:
        return read_plan(directory), None if (directory / PLAN).exists() else f"{PLAN} not found"
    except UNREADABLE_BECAUSE as error:
        return Plan(), f"{PLAN} cannot be read: {one_line(error)}"


def _times(started: pd.Series) -> list[str]:
    """When the first and the last cell started."""
    known = pd.to_datetime(started, utc=True, errors="coerce", format="ISO8601").dropna()
    return (
        list(dict.fromkeys(f"{time:%Y-%m-%d %H:%M} UTC" for time in (known.min(), known.max()))) if len(known) else []
    )


def _launch_bound(runs: pd.DataFrame) -> int:
    """The number of cells in which the GPU waited for the host: their latencies compare launches, not kernels."""
    return sum(
        any(text.startswith(LAUNCH_BOUND) for text in texts) for texts in runs["warnings"] if isinstance(texts, list)
    )


def _by_group(summary: pd.DataFrame) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts(summary):
        groups.setdefault(verdict.group, []).append(verdict)
    return groups


def _table(runs: pd.DataFrame, compare: Sequence[str]) -> Table:
    """By model, sizes and variant; what is compared stands in the variant's name."""
    runs = runs.sort_values(["model", "batch", "seq_len", "variant"], kind="stable")
    config = [str(name) for name in runs if str(name).startswith("config.")]
    others = [name for name in (*_WHAT, *config) if name.removeprefix("config.").split(".")[0] not in compare]
    differ = [name for name in others if runs[name].astype(str).nunique() > 1]
    columns = [("status", "status"), ("variant", "variant"), ("model", "model"), ("batch", "batch")]
    columns += [("seq_len", "seq_len"), *((name.rsplit(".", 1)[-1], name) for name in differ), *_MEASURED]
    columns += [(head, name) for head, name in _MEASURED_SOMETIMES if name in runs and runs[name].notna().any()]
    fields = [[_field(value) for value in runs[name].astype(object)] for _, name in columns]
    fields.append([Field(str(cell_id)) for cell_id in runs["cell_id"]])
    links = [_link(folder, "") for folder in runs["directory"]]
    heads = [*(head for head, _ in columns), "cell"]
    rows = [list(row) for row in zip(*fields, strict=True)]
    return Table(heads, list(zip(runs["status"].astype(str), links, rows, strict=True)))


def _field(value: Any) -> Field:
    if isinstance(value, list) or not pd.isna(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Field(str(value))
        if isinstance(value, int):
            return Field(f"{value:,}", float(value))
        return Field(four(value), float(f"{value:.7g}"))
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


def _environments(runs: pd.DataFrame) -> dict[str, Any]:
    """A column per machine and versions; a field in which the records of one differ has all its values."""
    columns = ["code_id", *(str(name) for name in runs if str(name).startswith("environment."))]
    groups = list(runs.groupby(runs["env_id"].fillna("unknown"), sort=False))
    rows = []
    for name in columns:
        values = [", ".join(dict.fromkeys(_field(value).text for value in group[name])) for _, group in groups]
        if any(values):
            rows.append((name.removeprefix("environment."), values, len({value for value in values if value}) > 1))
    return {"heads": [(str(env_id), len(group)) for env_id, group in groups], "rows": rows}
