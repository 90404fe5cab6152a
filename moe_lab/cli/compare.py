"""`moe-lab compare A B`: the comparison as a table on a terminal, as CSV and as Markdown, and its exit code."""

from __future__ import annotations

import argparse
import csv
import re
import sys
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from moe_lab.cli import fit
from moe_lab.cli.arguments import Parser
from moe_lab.cli.fit import Column
from moe_lab.records.store import write_atomic
from moe_lab.results import gate
from moe_lab.results.compare import NAMES, compare
from moe_lab.results.numbers import four
from moe_lab.results.spreadsheet import guarded
from moe_lab.terminal import Console, write_data

_SIDES = ("A", "B", "A and B")
OK, MISTAKE = 0, 2
_STYLES = {"slower": "red", "faster": "green", "same": "", "inconclusive": "yellow"}
_HELP = """\
Compare two folders of results: is B slower or faster than A?

Cells are joined by their configuration (cell_id) and judged by the medians of
their replicates (fresh processes):
  slower, faster  the 95 % interval of the ratio B/A excludes 1, and the ratio
                  is beyond the threshold and any measured noise floor
  same            the whole interval lies within the threshold
  inconclusive    neither; with one replicate on a side there is no interval,
                  and another verdict needs a measured noise floor
Run sweeps with measure.replicates=3 or more, or measure the noise floor of the
machine once with: moe-lab doctor --noise
"""
_EXAMPLES = """\
--fail-on WORDS, one or more of these, joined by commas:
  slower, faster, inconclusive    the verdict of a cell
  failed    failed or unreadable in B, or in both
  missing   only in A, or skipped in B
  any       slower, faster, or anything but ok in only one of A and B

exit codes:
  0  compared; with --fail-on: at least one cell was judged and none matches
  1  at least one cell matches --fail-on
  2  an error: folder not found or no records; without --fail-on also if no
     cell is ok in both
  3  nothing matches --fail-on, but nothing was judged: every cell is
     inconclusive, or none is ok in both

examples:
  moe-lab compare outputs/main outputs/branch
  moe-lab compare outputs/main outputs/branch --threshold 5% --fail-on any
  moe-lab compare outputs/main outputs/branch --fail-on slower,failed,missing
  moe-lab compare outputs/main outputs/branch --markdown - > comment.md
"""


# --- showing ---


def summary(df: pd.DataFrame) -> str:
    """The count of each verdict, and the geometric mean of B/A over the cells that were compared."""
    counts = ", ".join(
        f"{count} {verdict}{_unstable(df[df['verdict'] == verdict])}"
        for verdict, count in df["verdict"].value_counts().items()
    )
    ratios = df["ratio"].dropna()
    if ratios.empty:
        return counts
    return f"{counts}; geometric mean of B/A over {len(ratios)} compared cells: {four(np.exp(np.log(ratios).mean()))}"


def _unstable(rows: pd.DataFrame) -> str:
    count = int(rows["unstable"].isin(_SIDES).sum())
    return f" ({count} with unstable latencies)" if count else ""


def _layout(df: pd.DataFrame) -> tuple[str, pd.DataFrame, list[str]]:
    """What people read, untrusted text made printable: what all cells share, a table of text, numbered notes."""
    text = df.astype(object).where(df.notna(), "-").map(_text)
    named = text[df["cell_id"].notna()]
    varying = [name for name in (*NAMES, "also") if named[name].nunique() > 1]
    shared = " ".join(f"{name}={named[name].iloc[0]}" for name in NAMES if name not in varying) if len(named) else ""
    notes = [why for why in dict.fromkeys(text["why"]) if why]
    table = text[varying].assign(
        **{
            "A ms": text["p50_a_ms"],
            "B ms": text["p50_b_ms"],
            "B/A": text["ratio"],
            "95 % interval": [
                f"{low} to {high}" if low != "-" else "-"
                for low, high in zip(text["ratio_low"], text["ratio_high"], strict=True)
            ],
            "verdict": [
                f"{verdict} (unstable: {sides})" if sides in _SIDES else verdict
                for verdict, sides in zip(text["verdict"], text["unstable"], strict=True)
            ],
            "note": [str(notes.index(why) + 1) if why else "" for why in text["why"]],
            "cell_id": text["cell_id"],
        }
    )
    return shared, table, notes


def _text(value: Any) -> str:
    if isinstance(value, float):
        return four(value)
    return "".join(character if character.isprintable() else " " for character in str(value))


_RANKS = {"A ms": 1, "B ms": 1, "note": 1, "cell_id": 3}  # what a narrow terminal leaves out; see `fit.Column`


def to_terminal(df: pd.DataFrame, file: IO[str] | None = None) -> None:
    """Print the table, its notes and the summary; `file` gets them in place of standard output."""
    shared, content, notes = _layout(df)
    console = Console()
    width = console.width if console.is_terminal else None  # a file or a pipe has no width to fit
    if file is not None:
        console.file = file
    columns = [
        Column(
            name,
            content[name].tolist(),
            is_name=name in (*NAMES, "also"),
            is_left=name not in ("A ms", "B ms", "B/A"),
            rank=_RANKS.get(name, 0),
        )
        for name in content
    ]
    fitted = fit.fit(columns, width)
    heading, rows = fit.lines(fitted)
    console.print(shared, markup=False, highlight=False)
    styles = (_STYLES.get(verdict, "magenta") for verdict in df["verdict"])
    for style, lines in (("bold", heading), *zip(styles, rows, strict=True)):
        console.print("\n".join(lines), style=style, markup=False, highlight=False, soft_wrap=True)
    if fitted.left_out:
        named = f"not shown at {width} columns: {', '.join(fitted.left_out)}; --csv FILE has them"
        console.print(named, markup=False, highlight=False)
    for number, note in enumerate(notes, 1):
        console.print(f"{number}: {note}", markup=False, highlight=False)
    console.print(summary(df), style="bold", markup=False, highlight=False)


def to_csv(df: pd.DataFrame) -> str:
    """All columns, numbers in full; see `results.spreadsheet` for text like a formula."""
    safe = df.map(lambda value: guarded(value) if isinstance(value, str) else value)
    return str(safe.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC))  # a \r needs quotes


def to_markdown(df: pd.DataFrame) -> str:
    """Summary, table and notes for a comment on a pull request."""
    shared, content, notes = _layout(df)
    rows = [list(content), ["---"] * len(content.columns), *content.itertuples(index=False)]
    lines = [f"| {' | '.join(map(_escape_markdown, row))} |" for row in rows]
    numbered = [f"{number}. {_escape_markdown(note)}" for number, note in enumerate(notes, 1)]
    return "\n".join([summary(df), "", _escape_markdown(shared), "", *lines, "", *numbered, ""])


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`|<\[])", r"\\\1", text)


# --- the command ---


def _parser() -> Parser:
    parser = Parser(
        prog="moe-lab compare",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "a", metavar="A", type=Path, help="folder of the results to compare with (searched recursively)"
    )
    parser.add_argument("b", metavar="B", type=Path, help="folder of the new results")
    parser.add_argument(
        "--threshold", default="3%", help="the smallest difference that matters: 3%% or 0.03 (default: %(default)s)"
    )
    parser.add_argument(
        "--fail-on", metavar="WORDS", help="exit with 1 if a cell is one of these: " + ", ".join(gate.FAIL_ON)
    )
    parser.add_argument("--csv", metavar="FILE", help="write all columns as CSV; - for standard output (no table)")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the table as Markdown; - for standard output (no table)"
    )
    return parser


def parse_threshold(text: str) -> float:
    """`3%` or `0.03` as 0.03. Raises `ValueError` if it is not a number; `compare` checks the range."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"--threshold={text}: must be a number such as 3% or 0.03.") from None


def _write(target: str | None, text: str) -> None:
    if target == "-":
        write_data(text)
    elif target is not None:
        write_atomic(Path(target), text.encode())


def _gate(df: pd.DataFrame, words: list[str]) -> int:
    """The exit code of `--fail-on`, and on stderr what matches and what was not judged."""
    found = gate.judge(df, words)
    if found.why:
        print(f"moe-lab: --fail-on={','.join(words)}: {found.why}", file=sys.stderr)
    return found.code


def main(arguments: list[str]) -> int:
    """`moe-lab compare`. Returns the exit code."""
    try:
        given = _parser().parse_args(arguments)
        words = gate.words_of(given.fail_on, "--fail-on") if given.fail_on is not None else []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            df = compare(given.a, given.b, threshold=parse_threshold(given.threshold))
        for warning in caught:
            print(f"moe-lab: {warning.message}", file=sys.stderr)
        if df["ratio"].isna().all() and not words:
            raise ValueError(f"no cell is ok in both {given.a} and {given.b}: {summary(df)}.")
        if "-" not in (given.csv, given.markdown):
            print(f"A: {given.a}\nB: {given.b}")
            to_terminal(df)
        _write(given.csv, to_csv(df))
        _write(given.markdown, to_markdown(df))
    except SystemExit:  # --help; `Parser.error` does not exit
        return OK
    except (OSError, ValueError) as error:
        print(f"moe-lab: {error}", file=sys.stderr)
        return MISTAKE
    return _gate(df, words) if words else OK
