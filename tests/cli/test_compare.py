"""cli/compare.py: the comparison as text, and `moe-lab compare`."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.cli.compare import main, parse_threshold, to_csv, to_markdown, to_terminal
from moe_lab.records.schema import Record
from moe_lab.records.store import RESULT
from moe_lab.results.compare import COLUMNS, compare
from moe_lab.results.numbers import four
from tests import tiny
from tests.results.compared import HERE, QUIET, five_cells, record, tiny_config, write

Gate = Callable[..., tuple[int, str]]
HOSTILE = "a|b\\|c\n<script>[x](y)`[bold]\x1b[31m"


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return five_cells(tmp_path)


def run(*arguments: str | Path, cache: Path, width: int = 200) -> subprocess.CompletedProcess[str]:
    """`moe-lab compare ARGUMENTS` in a process of its own."""
    program = "import sys; from moe_lab.cli.compare import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": str(width)},
    )


@pytest.fixture
def hostile(tmp_path: Path) -> pd.DataFrame:
    """Two cells with a router's name and a reason that mean something to Markdown, rich or a terminal."""
    named = {"router": {**tiny_config()["router"], "name": HOSTILE}}
    a = [record(*QUIET, config=named), record(status="failed", reason=HOSTILE)]
    return compare(
        write(tmp_path / "hostile/a", *a),
        write(tmp_path / "hostile/b", record(*QUIET, config=named), record(1.0)),
        floors={},
    )


def test_csv_reads_back(sets: tuple[Path, Path], hostile: pd.DataFrame) -> None:
    """Every number in full, every text as it was."""
    for frame in (compare(*sets, floors={}), hostile):
        text = to_csv(frame)
        back = pd.read_csv(io.StringIO(text), dtype={"cell_id": str}, keep_default_na=False, na_values={"ratio": ""})
        assert tuple(back.columns) == COLUMNS
        assert back["ratio"].equals(frame["ratio"])
        for name in ("cell_id", "router", "verdict", "why"):
            assert back[name].tolist() == frame[name].tolist()


def test_markdown_is_a_table_and_numbered_notes(sets: tuple[Path, Path]) -> None:
    """What all cells share stands above it."""
    lines = to_markdown(compare(*sets, floors={})).splitlines()
    assert re.search("1 slower.*geometric mean of B/A over 3 compared cells: 1.000", lines[0])
    assert "router=sinkhorn" in lines[2] and "batch" not in lines[2]
    table = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {len(row) for row in cells} == {len(cells[0])} and len(table) == 2 + 5
    slower = dict(zip(cells[0], cells[2], strict=True))
    assert (slower["batch"], slower["A ms"], slower["B ms"], slower["B/A"]) == ("1", "1.000", "1.200", "1.200")
    assert slower["verdict"] == "slower" and re.fullmatch(r"1\.19\d to 1\.20\d", slower["95 % interval"])
    note = next(line for line in lines if line.startswith(f"{slower['note']}. "))
    assert "excludes 1" in note


def unescaped_cells(line: str) -> list[str]:
    """A row of a Markdown table as GitHub's parser splits it: at bars that no backslash escapes."""
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.findall(r"\|((?:\\.|[^|\\])*)(?=\|)", line)]


@pytest.mark.slow
@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab|\\`<[ ~_\n\r\t")))
def test_markdown_cells_survive_any_text(text: str) -> None:
    """The number of columns stays, and so does the text but for its white space."""
    frame = pd.DataFrame(
        [
            {"cell_id": str(i), "router": name, "also": "", "verdict": "same", "why": ""}
            for i, name in enumerate([f"x{text}y", "z"])
        ],
        columns=list(COLUMNS),
    )
    lines = [line for line in to_markdown(frame).split("\n") if line.startswith("|")]
    header, *rows = [unescaped_cells(line) for line in (lines[0], *lines[2:])]
    assert [len(row) for row in rows] == [len(header)] * 2
    assert rows[0][header.index("router")] == re.sub(r"\s", " ", f"x{text}y")


def test_hostile_text_is_shown_not_obeyed(hostile: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    """No escape sequence reaches the terminal, no markup is read, no row breaks."""
    to_terminal(hostile)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "<script>[x](y)`[bold]" in shown
    markdown = to_markdown(hostile)
    assert "\x1b" not in markdown and not re.search(r"(?<!\\)[<\[]", markdown)
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 4


@pytest.mark.parametrize("width", [pytest.param(width, id=str(width)) for width in (80, 120)])
def test_a_terminal_is_not_too_narrow(
    sets: tuple[Path, Path], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of the table is longer; what is not shown is named."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    frame = compare(*sets, floors={})
    to_terminal(frame)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    end = next(place for place, line in enumerate(lines) if line.startswith(("not shown", "1: ")))
    assert all(len(line) <= width for line in lines[:end])
    table = "\n".join(lines[:end])
    assert all(
        f" {four(value)} " in table for name in ("ratio", "p50_a_ms", "p50_b_ms") for value in frame[name].dropna()
    )
    assert all(word in " ".join(lines) for word in ("batch", "verdict", "note"))


@pytest.mark.slow
def test_a_narrow_terminal_cuts_no_number(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Names are folded; half a number would be another number."""
    program = (
        "import sys, rich.console as c; from pathlib import Path; from moe_lab.cli import compare as m\n"
        "m.Console = lambda width=40: c.Console(width=width, force_terminal=True, no_color=True)\n"
        "m.to_terminal(m.compare(Path(sys.argv[1]), Path(sys.argv[2]), floors={}))"
    )
    narrow = tiny.python(program, *sets)
    for text in compare(*sets, floors={})["ratio"].dropna().map(four):
        assert re.search(rf"\s{re.escape(text)}\s", narrow)
    assert re.search(r"1\.19\d to 1\.20\d", narrow)
    assert all(verdict in narrow for verdict in ("slower", "faster", "only in A", "failed in B"))


# --- the command ---


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gate:
    """`moe-lab compare A B --fail-on WORDS` in this process: exit code and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def compared(a: Sequence[Record], b: Sequence[Record], *options: str) -> tuple[int, str]:
        for side, records in (("a", a), ("b", b)):
            shutil.rmtree(tmp_path / side, ignore_errors=True)
            write(tmp_path / side, *records)
        code = main([str(tmp_path / "a"), str(tmp_path / "b"), *options])
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1
        return code, printed.err

    return compared


SAME = record(*QUIET, config={"batch": 3})
CELL, SLOWER = record(*QUIET), record(*(1.2 * x for x in QUIET))
FAILED, SKIPPED = record(status="failed", reason="crash: SIGSEGV"), record(status="skipped", reason="unavailable: x")
UNTIMED = record(status="ok")
ONCE = record(1.0)  # one replicate: no interval
PAIRS: dict[str, tuple[list[Record], list[Record]]] = {
    "same": ([CELL, SAME], [CELL, SAME]),
    "slower": ([CELL, SAME], [SLOWER, SAME]),
    "faster": ([SLOWER, SAME], [CELL, SAME]),
    "inconclusive": ([ONCE, SAME], [ONCE, SAME]),
    "failed_in_a": ([FAILED, SAME], [CELL, SAME]),
    "failed_in_b": ([CELL, SAME], [FAILED, SAME]),
    "failed_in_both": ([FAILED, SAME], [FAILED, SAME]),
    "failed_and_skipped": ([SKIPPED, SAME], [FAILED, SAME]),
    "skipped_in_a": ([SKIPPED, SAME], [CELL, SAME]),
    "skipped_in_b": ([CELL, SAME], [SKIPPED, SAME]),
    "skipped_in_both": ([SKIPPED, SAME], [SKIPPED, SAME]),
    "untimed_in_b": ([CELL, SAME], [UNTIMED, SAME]),
    "missing_in_a": ([SAME], [CELL, SAME]),
    "missing_in_b": ([CELL, SAME], [SAME]),
}
MATCHES = {
    "slower": {"slower"},
    "faster": {"faster"},
    "inconclusive": {"inconclusive"},
    "failed": {"failed_in_b", "failed_in_both", "failed_and_skipped"},
    "missing": {"missing_in_b", "skipped_in_b", "untimed_in_b"},
    "any": set(PAIRS) - {"same", "inconclusive", "failed_in_both", "skipped_in_both"},
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(word, id=word, marks=() if word in ("slower", "missing", "any,failed") else pytest.mark.slow)
        for word in (*MATCHES, "slower,failed", "any,failed")
    ],
)
def test_each_word_matches_its_cells(gate: Gate, words: str) -> None:
    """Of each kind of pair, beside a cell that is the same in both; what is neither is named, not passed over."""
    expected = set().union(*(MATCHES[word] for word in words.split(",")))
    for name, pair in PAIRS.items():
        code, said = gate(*pair, "--fail-on", words)
        assert code == (1 if name in expected else 0), f"{name}: {said}"
        if name in expected:
            assert f"--fail-on={words}: 1 of 2 rows match" in said
        elif name in ("same", "slower", "faster"):
            assert said == ""
        else:
            assert "passed, but 1 of 2 rows were not judged: 1 " in said


@pytest.mark.parametrize("words", [pytest.param(word, id=word) for word in MATCHES])
def test_nothing_judged_never_passes(gate: Gate, words: str) -> None:
    """Everything inconclusive, or not ok on a side: 3, or 1 where that is what the word names."""
    for pair, named in (
        (([ONCE], [ONCE]), {"inconclusive"}),
        (([CELL], [FAILED]), {"failed", "any"}),
        (([CELL], [SKIPPED]), {"missing", "any"}),
        (([CELL], [SAME]), {"missing", "any"}),
        (([FAILED], [FAILED]), {"failed"}),
        (([SKIPPED], [SKIPPED]), set()),
    ):
        code, said = gate(*pair, "--fail-on", words)
        assert code == (1 if words in named else 3), said
        assert words in named or "nothing was judged (" in said
        assert ("measure.replicates=3" in said) == (code == 3 and pair == ([ONCE], [ONCE]))


def test_an_unreadable_record_has_failed(gate: Gate, tmp_path: Path) -> None:
    """It may have been the slower one."""
    folder = write(tmp_path / "sets/b", SAME)
    (folder / "cell-1").mkdir()
    (folder / "cell-1" / RESULT).write_text("{")
    arguments = [str(write(tmp_path / "sets/a", SAME)), str(folder), "--fail-on"]
    assert [main([*arguments, word]) for word in ("slower", "failed", "any", "missing")] == [0, 1, 1, 0]


def test_without_fail_on_it_only_shows(gate: Gate) -> None:
    """Exit code 0 and nothing on stderr, unless there is nothing to compare."""
    for name in ("slower", "inconclusive", "failed_in_b", "missing_in_b"):
        assert gate(*PAIRS[name]) == (0, "")
    code, said = gate([CELL], [FAILED])
    assert code == 2 and "no cell is ok in both" in said


@pytest.mark.slow
def test_the_gate_is_below_the_table(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """The table is printed in any case; what was found is said on stderr."""
    done = run(*sets, "--fail-on", "slower,missing", cache=tmp_path)
    assert done.returncode == 1 and "geometric mean" in done.stdout and str(sets[0]) in done.stdout
    assert done.stderr == "moe-lab: --fail-on=slower,missing: 2 of 5 rows match (1 slower, 1 missing)\n"
    assert run(*sets, "--fail-on", "slower", "--threshold", "30%", cache=tmp_path).returncode == 0


def test_mistakes_are_one_line(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Exit code 2, nothing on stdout, and the line names what is wrong."""
    (tmp_path / "empty").mkdir()
    other = write(tmp_path / "other", record(1.0, config={"batch": 99}))
    unreadable = tmp_path / "unreadable" / RESULT
    unreadable.parent.mkdir()
    unreadable.write_text("{")
    renamed = write(tmp_path / "renamed", record(1.0, cell_id="f" * 12, config={"batch": 1}, code_id="9" * 12))
    a, b = sets
    mistakes: dict[str, tuple[Any, ...]] = {
        "nowhere: folder not found": (a, tmp_path / "nowhere"),
        "empty: no readable records": (tmp_path / "empty", b),
        r"unreadable: no readable records \(1 unreadable\)": (a, unreadable.parent),
        "no cell is ok in both .*: 5 only in A, 1 only in B": (a, other),
        "renamed and .* have no cell in common: cell_ids changed between .*; measure the older one again": (renamed, b),
        "--threshold=lots: .*3% or 0.03": (a, b, "--threshold", "lots"),
        "threshold=3.0: .*0.03 or 3%": (a, b, "--threshold", "3"),
        "required: B": (a,),
        "--fail-on=never: never is not one of slower, faster, failed, missing, inconclusive, any": (
            *(a, b, "--fail-on", "never"),
        ),
        "--fail-on=Slower: Slower is not one of": (a, b, "--fail-on", "Slower"),
        "--fail-on=: nothing is not one of": (a, b, "--fail-on", ""),
        "--fail-on=slower,: nothing is not one of": (a, b, "--fail-on", "slower,"),
        "--fail-on=any,failed,any: name each word once": (a, b, "--fail-on", "any,failed,any"),
        "--fail-on is given twice": (a, b, "--fail-on", "slower", "--fail-on", "failed"),
        "expected one argument": (a, b, "--fail-on"),
        "unrecognized arguments: --fast": (a, b, "--fast"),
        "nowhere.*out.csv": (a, b, "--csv", tmp_path / "nowhere" / "out.csv"),
    }
    program = (
        "import contextlib, io, json, sys; from moe_lab.cli.compare import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = main(arguments)\n"
        "    print(json.dumps([code, err.getvalue()]))"
    )
    printed = tiny.python(program, json.dumps([[str(x) for x in arguments] for arguments in mistakes.values()]))
    for pattern, line in zip(mistakes, printed.splitlines(), strict=True):
        code, err = json.loads(line)
        assert code == 2 and err.count("\n") == 1
        assert re.fullmatch(f"moe-lab: .*{pattern}.*\n", err), err
    done = run(a, tmp_path / "nowhere", cache=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_files_and_standard_output(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """`-` takes the place of the table, so that it can be piped; a file does not."""
    piped = run(*sets, "--csv", "-", cache=tmp_path)
    assert piped.stdout == to_csv(compare(*sets, floors={}))
    assert run(*sets, "--markdown", "-", cache=tmp_path).stdout == to_markdown(compare(*sets, floors={}))
    done = run(*sets, "--csv", tmp_path / "x.csv", "--markdown", tmp_path / "x.md", cache=tmp_path)
    assert "geometric mean" in done.stdout and "cell_id,model" not in done.stdout
    assert (tmp_path / "x.csv").read_text() == piped.stdout
    assert (tmp_path / "x.md").read_text() == to_markdown(compare(*sets, floors={}))


@pytest.mark.slow
def test_a_broken_floor_warns_in_one_line(tmp_path: Path) -> None:
    """And the comparison goes on."""
    sides = [write(tmp_path / side, record(1.0), record(1.0, config={"batch": 5})) for side in "ab"]
    (tmp_path / "moe-lab").mkdir()
    (tmp_path / "moe-lab" / f"noise-{HERE}.json").write_text("{")
    done = run(*sides, cache=tmp_path)
    assert done.returncode == 0 and "2 inconclusive" in done.stdout
    assert re.fullmatch(
        f"moe-lab: cannot read the noise floor of machine '{HERE}': .*; run moe-lab doctor --noise\n", done.stderr
    )


def test_help_names_the_rule_the_options_and_the_exit_codes(tmp_path: Path) -> None:
    """And fits a terminal of 80 columns."""
    done = run("--help", cache=tmp_path, width=80)
    assert done.returncode == 0 and not done.stderr
    words = (
        "A",
        "B",
        "--threshold",
        "--fail-on",
        "--csv",
        "--markdown",
        "inconclusive",
        "exit codes",
        "measure.replicates",
    )
    assert all(word in done.stdout for word in words)
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "share"),
    [
        pytest.param("3%", 0.03, id="percent"),
        pytest.param("0.03", 0.03, id="share"),
        pytest.param("2.5 %", 0.025, id="space"),
    ],
)
def test_thresholds(text: str, share: float) -> None:
    """Either way of writing."""
    assert parse_threshold(text) == pytest.approx(share)


@pytest.mark.parametrize("text", [pytest.param(text, id=text or "empty") for text in ("", "%", "3%%", "three")])
def test_a_threshold_that_is_no_number(text: str) -> None:
    """The message shows it and the two ways."""
    with pytest.raises(ValueError, match=f"--threshold={text}: .*3% or 0.03"):
        parse_threshold(text)


def test_comparing_loads_no_torch(sets: tuple[Path, Path]) -> None:
    """Results are read on machines without it."""
    imports = "import sys; from moe_lab.cli.compare import main"
    code = f"{imports}; main(sys.argv[1:]); print({{'torch', 'triton'}} & set(sys.modules))"
    assert tiny.python(code, *sets).endswith("set()\n")
