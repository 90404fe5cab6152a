"""What `moe-lab analyze` writes: tables (CSV, Parquet), plots (PNG, SVG) and one page that opens with sentences."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from moe_lab.analyses.findings import Findings, Plot
from moe_lab.analyses.routes import View
from moe_lab.records.store import own_folder, write_atomic
from moe_lab.records.trace import PHASES, Trace
from moe_lab.results.numbers import four
from moe_lab.results.spreadsheet import guarded
from moe_lab.results.style import variant_style
from moe_lab.results.templates import environment

PAGE = "analysis.html"
_WRITTEN = ".written"  # the names of the files, for the next analysis into the same folder
_ROWS = 60  # of a table on the page; its file has all


def write(
    folder: Path, title: str, facts: Sequence[tuple[str, str]], found: Sequence[Findings], missing: Sequence[str]
) -> Path:
    """Write everything into `folder`; returns the path of the page. Raises `OSError` if it cannot be written.

    Args:
        facts: what the findings are of, and how it is.
        missing: a sentence for everything that is not in it.
    """
    own_folder(folder)
    sections, written = [], {PAGE}
    for findings in found:
        for name, table in findings.tables.items():
            plain = table.map(lambda value: guarded(value) if isinstance(value, str) else value)
            written |= {f"{name}.csv", f"{name}.parquet"}
            write_atomic(folder / f"{name}.csv", plain.to_csv(index=False).encode())
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False)
            write_atomic(folder / f"{name}.parquet", buffer.getvalue())
        pictures = []
        for plot in findings.plots:
            figure = draw(plot)
            for kind in ("png", "svg"):
                written.add(f"{plot.name}.{kind}")
                write_atomic(folder / f"{plot.name}.{kind}", _bytes(figure, kind))
            source = "data:image/png;base64," + b64encode((folder / f"{plot.name}.png").read_bytes()).decode()
            pictures.append({"title": plot.title, "source": source})
        tables = [{"name": name, **_shown(table)} for name, table in findings.tables.items()]
        sections.append({"findings": findings, "pictures": pictures, "tables": tables})
    html = (
        environment("moe_lab.analyses")
        .get_template("page.html.jinja")
        .render(
            css=(files("moe_lab.results") / "report.css").read_text(encoding="utf-8"),
            title=title,
            facts=facts,
            sections=sections,
            missing=missing,
        )
    )
    write_atomic(folder / PAGE, html.encode(errors="replace"))
    _forget_others(folder, written)
    return folder / PAGE


def _forget_others(folder: Path, written: set[str]) -> None:
    """Remove what an earlier analysis wrote here, and this one did not."""
    names = folder / _WRITTEN
    before = set(names.read_text().splitlines()) if names.is_file() and not names.is_symlink() else set()
    for name in before - written:
        if name and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    write_atomic(names, "\n".join(sorted(written)).encode())


def facts(trace: Trace, view: View, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was analysed, for the head of the page."""
    layers = trace.layers
    sizes = ", ".join(sorted({f"{layer.top_k} of {layer.n_experts}" for layer in layers}))
    phases = trace.tokens().phase[view.rows]
    counts = [
        f"{int((phases == index).sum()):,} {name}" for index, name in enumerate(PHASES) if (phases == index).any()
    ]
    known = [(name, str(trace.source[name])) for name in ("model", "router", "imported_from") if trace.source.get(name)]
    return [
        *((name.replace("_", " ").capitalize(), value) for name, value in known),
        ("Layers", f"{len(layers)}, {sizes} experts for a token"),
        ("Tokens", f"{view.n_tokens:,} ({', '.join(counts)})"),
        ("Units", f"{view.n_units:,} sequences or stretches, on which intervals rest"),
        ("Parts", ", ".join(view.parts[:12]) + (", ..." if len(view.parts) > 12 else "")),
        *([("Phase", settings["phase"])] if settings["phase"] else []),
    ]


def _shown(table: pd.DataFrame) -> dict[str, Any]:
    """Of a table on the page: heads and rows of text."""
    kept = [name for name in table if "_ci95_" not in str(name)]
    rows = [[_field(value) for value in row] for row in table[kept].head(_ROWS).itertuples(index=False)]
    return {"heads": [str(name).replace("_", " ") for name in kept], "rows": rows, "more": max(len(table) - _ROWS, 0)}


def _field(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return four(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def draw(plot: Plot) -> Figure:
    """Lines with their intervals; each line has a colour, a dash and a marker of its own."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, x, y, low, high) in enumerate(plot.lines):
        style = variant_style(index)
        dashes = (0, style.dashes) if style.dashes else "solid"
        axes.plot(x, y, label=name, color=style.colour, marker=style.marker, linestyle=dashes, markersize=5)
        if low is not None and high is not None and np.isfinite(low).any():
            axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if plot.doubles:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # so that the same findings are the same file
    with matplotlib.rc_context({"svg.hashsalt": "moe-lab"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()
