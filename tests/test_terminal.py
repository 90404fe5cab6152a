"""terminal.py: what text from a file may do to a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from moe_lab.terminal import Console, Filtered, printable, write_data
from tests import tiny
from tests.results.test_compare import write

HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "link": "\x1b]8;;http://x\x1b\\text",
    "clear": "\x1b[2J\x1b[H",
    "c1": "\x9b31m",
    "overwrite": "good\rbad",
    "backspace": "bad\b\b\b",
    "right_to_left": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "mark": "a\u200fb",
    "line": "a\u2028b",
    "half": "\ud83d",
    "delete": "\x7f",
    "null": "a\x00b",
}
CASES = [pytest.param(text, id=name) for name, text in HOSTILE.items()]


def is_plain(text: str) -> bool:
    return printable(text) == text and "\x1b" not in text


@pytest.mark.parametrize("text", CASES)
def test_what_is_printed_is_plain(text: str) -> None:
    """With print, and in a table of rich's, where its own codes stay."""
    file = io.StringIO()
    print(text, file=Filtered(file))  # type: ignore[arg-type]
    assert file.getvalue() == f"{printable(text)}\n"
    assert is_plain(file.getvalue())
    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, color_system=None, width=200, highlight=False)
        console.print(text, markup=False)
        assert is_plain(file.getvalue())  # rich takes some away: bell, backspace, return
        assert ("\\x1b" in file.getvalue()) == ("\x1b" in text)
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=200, highlight=False).print(text, markup=False, style="red")
    assert file.getvalue().startswith("\x1b[31m") and file.getvalue().count("\x1b") == 2


def test_a_progress_bar_keeps_its_own_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is shown, rich puts a stream of its own before the filter."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Filtered(file))
    console = Console(stderr=True, force_terminal=True, width=80)
    with Progress(console=console) as progress:
        progress.add_task("loading", total=3)
        progress.refresh()
    assert "\x1b[2K" in file.getvalue() and "\\x1b[2K" not in file.getvalue()


@given(st.text())
def test_plain_text_stays_and_any_text_becomes_plain(text: str) -> None:
    """Once is enough, and nothing is lost: an escape says what it was."""
    assert is_plain(printable(text))
    assert printable(printable(text)) == printable(text)
    if text.isascii() and text.replace("\n", "").isprintable():
        assert printable(text) == text


def test_data_for_a_program_is_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare --csv -` in a pipe; on a terminal it is text for a person."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Filtered(file))
    write_data("a\x1bb")
    assert file.getvalue() == "a\x1bb"
    monkeypatch.setattr(file, "isatty", lambda: True)
    write_data("a\x1bb")
    assert file.getvalue() == "a\x1bba\\x1bb"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param("checkpoint", id="checkpoint"),
        *(pytest.param(name, id=name, marks=pytest.mark.slow) for name in ("report", "compare", "word")),
    ],
)
def test_no_escape_code_of_a_file_reaches_the_terminal(command: str, tmp_path: Path) -> None:
    """In processes: a config.json, records with hostile names and reasons, and a word of the command line."""
    bad = "\x1b[2J\x1b]0;x\x07\u202e"
    if command == "checkpoint":
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": bad, "architectures": [bad]}))
        words = ["model=checkpoint", "model.path=m", "device=cpu"]
    elif command == "word":
        words = [f"router={bad}"]
    else:
        for name in ("a", "b"):
            write(tmp_path / name, tiny.record(name=bad, status="failed", reason=bad))
        (tmp_path / "a" / "x").mkdir()
        (tmp_path / "a" / "x" / "result.json").write_text(f'{{"status": "{bad}"')
        words = ["report", "a", "--tables"] if command == "report" else ["compare", "a", "b"]
    done = subprocess.run([sys.executable, "-m", "moe_lab", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout + done.stderr
    assert is_plain(done.stdout) and is_plain(done.stderr)
