"""`moe-lab card`: a folder of results as a folder to upload: a README with front matter, Parquet and plots."""

from __future__ import annotations

import argparse
import io
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from moe_lab.cli import table
from moe_lab.cli.arguments import Parser
from moe_lab.cli.fit import Column
from moe_lab.config.unread import key_of
from moe_lab.records.schema import NOT_SENT
from moe_lab.records.store import own_folder, write_atomic
from moe_lab.results import aggregate, charts, load, plots
from moe_lab.results.answers import answers
from moe_lab.results.report import environments
from moe_lab.results.subject import facts
from moe_lab.results.templates import environment

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
_TITLE = "moe-lab: "
"""How the `pretty_name` of every card begins."""
_UNFINISHED = re.compile(r"\.(README\.md|\w+\.parquet|\w+\.png)\.\d+\.tmp")
"""What `write_atomic` leaves of a process that was killed."""


def write(directory: Path, output: Path, license_id: str) -> Path:
    """Write the card of the results in `directory` into the folder `output`; return the path of its README.md.

    The tables and plots in `directory` are brought up to date first, as `moe-lab report` does it. Plots and tables of
    an earlier card in `output` that are not written now are removed.

    Raises:
        ValueError: the folder is missing or has no readable record; `output` holds files that are not a card.
        OSError: a file cannot be written.
    """
    _refuse_other(output)
    there = any(load.search(load.folder(directory)))  # before tables of nothing are written
    tables = aggregate.aggregate(directory) if there else None
    if tables is None or tables.runs.empty:
        raise ValueError(f"{directory}: no readable records; give the folder of a run or a sweep.")
    drawn = plots.draw(directory, tables.runs, tables.summary)
    pictures = {path.name: path for path in drawn.paths if path.suffix == ".png"}
    folders = [own_folder(folder) for folder in (output, output / "data", output / "plots")]
    readme = output / "README.md"
    # First, so that a card of which a process was killed is known as one.
    write_atomic(readme, _text(directory, tables, drawn, license_id).encode())
    for name in TABLES:
        write_atomic(output / "data" / f"{name}.parquet", _table(directory / f"{name}.parquet"))
    for name, path in pictures.items():
        write_atomic(output / "plots" / name, path.read_bytes())
    for old in (output / "plots").glob("*.png"):
        if charts.is_name(old.stem) and old.name not in pictures:
            old.unlink()
    for left in (path for folder in folders for path in folder.glob(".*.tmp") if _UNFINISHED.fullmatch(path.name)):
        left.unlink()
    return readme


def _refuse_other(output: Path) -> None:
    """Only a new folder, one without files, or that of an earlier card is written into."""
    above = next(folder for folder in (output, *output.parents) if folder.exists())
    if not above.is_dir():
        raise ValueError(f"--output={output}: {above} is not a folder; give another one.")
    others = [path for path in output.rglob("*") if not path.is_dir() and not _UNFINISHED.fullmatch(path.name)]
    if others and not _is_card(output / "README.md"):
        raise ValueError(f"--output={output}: holds other files; give a new folder.")


def _is_card(readme: Path) -> bool:
    """Whether a README has the front matter of `_front`."""
    try:
        front = yaml.safe_load(readme.read_text("utf-8").split("---\n")[1])
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return False
    return isinstance(front, dict) and str(front.get("pretty_name")).startswith(_TITLE)


def _table(source: Path) -> bytes:
    """A table as Parquet, without the columns `OF_THIS_MACHINE` and what is said of trackers."""
    table = pq.read_table(source)
    table = table.drop_columns([name for name in OF_THIS_MACHINE if name in table.column_names])
    if "warnings" in table.column_names:
        at, column = table.column_names.index("warnings"), table["warnings"]
        kept = [None if texts is None else _of_the_run(texts) for texts in column.to_pylist()]
        table = table.set_column(at, table.field(at), pa.array(kept, column.type))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _of_the_run(warnings: Sequence[str]) -> list[str]:
    """Without those of trackers: they name hosts, and say what to do here."""
    return [text for text in warnings if not text.startswith(NOT_SENT)]


def _commands(plan: load.Plan) -> list[list[str]]:
    """The commands without the words about trackers."""
    return [[word for word in words if key_of(word).partition(".")[0] != "tracker"] for words in plan.commands]


def _text(directory: Path, tables: aggregate.Aggregate, drawn: plots.Drawn, license_id: str) -> str:
    runs, summary, unreadable = tables
    records, plan = load.records(directory)
    name = plan.name or directory.resolve().name
    shown = table.lines([record for record in records if record.reason != "excluded"], plan.compare, plan.anchor)
    by_machine = table.by_machine(shown)
    kinds: dict[str, list[str]] = {}
    for record in records:
        for warning in _of_the_run(record.warnings):
            kinds.setdefault(warning.split(":")[0], []).append(warning)
    templates = environment("moe_lab.cli", html=False)
    templates.filters["md"] = markdown
    return templates.get_template("card.md.jinja").render(
        front=yaml.safe_dump(_front(name, license_id), sort_keys=False, allow_unicode=True, width=1000),
        name=name,
        facts=facts(directory, runs, plan, sorted(summary["anchor"].dropna().unique())),
        answers=[answer.text for answer in answers(runs, summary).shown],
        results={machine: markdown_table(table.columns(lines)) for machine, lines in by_machine.items()},
        plots=[(path.name, path.stem.replace("_", " ")) for path in drawn.paths if path.suffix == ".png"],
        machines=environments(runs),
        of_this_machine=OF_THIS_MACHINE,
        commands=[shlex.join(words) for words in _commands(plan)],
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
    return {"license": license_id, "pretty_name": f"{_TITLE}{name}", "tags": [*TAGS], "configs": configs}


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
        description="Write a results card: a folder that can be uploaded as a data set, or into a\n"
        "model's repository. README.md has the front matter, the results with their\n"
        "intervals, the machine, the versions, the commands and the plots; data/ has the\n"
        "tables as Parquet.",
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
    if any(_PATH.search(word) for words in _commands(load.records(given.directory)[1]) for word in words):
        print("The commands in it name folders of this machine; read it before you upload it.")
    return 0
