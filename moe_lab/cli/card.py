"""`moe-lab card`: a folder of results as a folder to upload: a README with front matter, Parquet and plots."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, StrictUndefined

from moe_lab.cli import table
from moe_lab.cli.arguments import Parser
from moe_lab.cli.fit import Column
from moe_lab.records.store import own_folder, write_atomic
from moe_lab.results import aggregate, load, plots
from moe_lab.results.answers import answers
from moe_lab.results.report import environments
from moe_lab.results.subject import facts

TAGS = ("moe-lab", "mixture-of-experts", "inference", "benchmark")
TABLES = {
    "summary": "a row per setting and variant: latency, ratio to the anchor, load, quality",
    "runs": "a row per cell: the whole record",
    "samples": "every timing sample of every cell",
}
"""The tables of a results folder that a card has, with what they are; the first is the one that the hub shows."""
OF_THIS_MACHINE = ("environment.node", "environment.job", "export.dir")
"""Columns that name the machine or its folders. They are of no use elsewhere."""
_PATH = re.compile(r"(^|[='\"])~?/")


def write(directory: Path, output: Path, license_id: str) -> Path:
    """Write the card of the results in `directory` into the folder `output`; return the path of its README.md.

    The tables and plots in `directory` are brought up to date first, as `moe-lab report` does it. Plots and tables of
    an earlier card in `output` that are not written now are removed.

    Raises:
        ValueError: there is no such folder, or no record in it can be read; `output` holds something else than a card.
        OSError: a file cannot be written.
    """
    _refuse_other(output)
    there = any(load.search(load.folder(directory)))  # before tables of nothing are written
    tables = aggregate.aggregate(directory) if there else None
    if tables is None or tables.runs.empty:
        raise ValueError(f"{directory}: no readable records; give the folder of a run or a sweep.")
    drawn = plots.draw(directory, tables.runs, tables.summary)
    pictures = [path for path in drawn.paths if path.suffix == ".png"]
    for name in TABLES:
        _copy_table(directory / f"{name}.parquet", own_folder(output / "data") / f"{name}.parquet")
    for path in pictures:
        write_atomic(own_folder(output / "plots") / path.name, path.read_bytes())
    for old in (output / "plots").glob("*.png"):
        if old.name not in {path.name for path in pictures}:
            old.unlink()
    readme = output / "README.md"
    write_atomic(readme, _text(directory, tables, drawn, license_id).encode())
    return readme


def _refuse_other(output: Path) -> None:
    """Only a new folder, an empty one, or that of an earlier card is written into."""
    readme = output / "README.md"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output}: not a folder.")
    if output.is_dir() and any(output.iterdir()) and not (readme.is_file() and TAGS[0] in readme.read_text("utf-8")):
        raise ValueError(f"--output={output}: holds other files; give a new folder.")


def _copy_table(source: Path, destination: Path) -> None:
    """Without the columns `OF_THIS_MACHINE`."""
    whole = pq.read_table(source)
    kept = whole.drop_columns([name for name in OF_THIS_MACHINE if name in whole.column_names])
    pq.write_table(kept, destination)


def _text(directory: Path, tables: aggregate.Aggregate, drawn: plots.Drawn, license_id: str) -> str:
    runs, summary, unreadable = tables
    records, plan = load.records(directory)
    name = plan.name or directory.resolve().name
    shown = table.lines([record for record in records if record.reason != "excluded"], plan.compare, plan.anchor)
    by_machine = table.by_machine(shown)
    kinds: dict[str, list[str]] = {}
    for record in records:
        for warning in record.warnings:
            kinds.setdefault(warning.split(":")[0], []).append(warning)
    template = (files("moe_lab.cli") / "card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["md"] = markdown
    return environment.from_string(template).render(
        front=yaml.safe_dump(_front(name, license_id), sort_keys=False, allow_unicode=True, width=1000),
        name=name,
        facts=facts(directory, runs, plan, sorted(summary["anchor"].dropna().unique())),
        answers=[answer.text for answer in answers(runs, summary).shown],
        results={machine: markdown_table(table.columns(lines)) for machine, lines in by_machine.items()},
        plots=[(path.name, path.stem.replace("_", " ")) for path in drawn.paths if path.suffix == ".png"],
        machines=environments(runs),
        of_this_machine=OF_THIS_MACHINE,
        commands=[shlex.join(words) for words in plan.commands],
        tables=TABLES,
        warnings=kinds,
        not_ok=_not_ok(runs),
        left_out=drawn.left_out,
        unreadable=unreadable[["path", "error"]].to_dict("records"),
    )


def _front(name: str, license_id: str) -> dict[str, Any]:
    """The front matter, as repositories of models and data sets on the Hugging Face hub read it."""
    configs: list[dict[str, Any]] = [{"config_name": key, "data_files": f"data/{key}.parquet"} for key in TABLES]
    configs[0]["default"] = True
    return {"license": license_id, "pretty_name": f"moe-lab: {name}", "tags": [*TAGS], "configs": configs}


def _not_ok(runs: pd.DataFrame) -> list[str]:
    """How many cells failed or were skipped, for each reason."""
    bad = runs[runs["status"] != "ok"]
    counts = Counter(zip(bad["status"].astype(str), bad["reason"].fillna("no reason recorded"), strict=True))
    return [f"{status} ({number} cells): {reason}" for (status, reason), number in counts.items()]


def markdown(text: object) -> str:
    """Text in which nothing is markup, in one line."""
    return re.sub(r"([\\`*|~$])", r"\\\1", " ".join(str(text).split())).replace("<", "&lt;")


def markdown_table(columns: Sequence[Column]) -> str:
    """All of the columns: a table in Markdown, numbers on the right."""
    sides = [":--" if column.is_name or column.is_left else "--:" for column in columns]
    rows = [[column.heading for column in columns], sides, *zip(*(column.cells for column in columns), strict=True)]
    written = [row if row is sides else [markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in written)


def parser() -> Parser:
    """The options of `moe-lab card`."""
    options = Parser(
        prog="moe-lab card",
        description="Write a results card: a folder that can be uploaded as a data set, or into a model's repository. "
        "README.md has the front matter, the results with their intervals, the machine, the versions, the commands "
        "and the plots; data/ has the tables as Parquet.",
        epilog="To upload it to the Hugging Face hub: hf upload NAME DIR/card --repo-type dataset",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("directory", type=Path, help="a sweep's folder, or any folder of runs")
    options.add_argument("-o", "--output", type=Path, help="the folder to write (default: card in DIRECTORY)")
    options.add_argument(
        "--license", default="unknown", metavar="ID", help="under which the results are published, such as cc-by-4.0"
    )
    return options


def main(arguments: list[str]) -> int:
    """`moe-lab card`. Returns the exit code."""
    given = parser().parse_args(arguments)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", given.license):
        raise ValueError(f"--license={given.license}: must be an identifier of the hub, such as cc-by-4.0.")
    output = given.output or given.directory / "card"
    print(write(given.directory, output, given.license))
    if given.license == "unknown":
        print("license: unknown; --license ID sets it")
    if any(_PATH.search(word) for words in load.records(given.directory)[1].commands for word in words):
        print("The commands in it name folders of this machine; read it before you upload it.")
    return 0
