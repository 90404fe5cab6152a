"""cli/progress.py and cli/reporter.py: what is drawn on a terminal, and the plain lines elsewhere."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_lab.cli import reporter as drawing
from moe_lab.cli.reporter import Reporter, clock
from moe_lab.records.schema import Record
from tests import tiny
from tests.results.compared import record as timed


def reporter(n_cells: int, terminal: bool) -> tuple[Reporter, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, soft_wrap=True, color_system=None)
    return Reporter(n_cells, console), file


def failed(reason: str) -> Record:
    return tiny.record(status="failed", reason=reason, directory="outputs/s/cell")


def test_without_a_terminal_every_end_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn for a step; no escape sequence, no bar."""
    reporter_, file = reporter(3, terminal=False)
    with reporter_:
        for step in ("build", "verify", "time", "observe"):
            reporter_.step("a", step)
        assert file.getvalue() == ""
        reporter_.end("a", timed(1.5))
        reporter_.end("b", failed("crash: SIGSEGV"))
        reporter_.end("c", tiny.record(status="skipped", reason="excluded"))
    first, second, third = file.getvalue().splitlines()
    assert re.fullmatch(r"\[1/3\] a: ok 1\.5 ms \(\d+:\d\d, about \d+:\d\d left\)", first)
    assert second == "[2/3] b: failed: crash: SIGSEGV (outputs/s/cell)"
    assert third.startswith("[3/3] c: skipped") and "1 failed" in third
    assert (reporter_.n_done, reporter_.n_failed) == (3, 1)


def test_a_terminal_has_a_bar_with_the_step_and_lines_for_failures_alone() -> None:
    """The bar counts what ended and is gone at the end."""
    reporter_, file = reporter(2, terminal=True)
    with reporter_:
        reporter_.step("a-cell", "build")
        assert "build a-cell" in file.getvalue() and "0/2" in file.getvalue()
        reporter_.end("a-cell", timed(1.5))
        assert "ok" not in file.getvalue()
        reporter_.end("b-cell", failed("out_of_memory"))
        reporter_.step("c-cell", "verify")
        assert "2/2" in file.getvalue() and "1 failed" in file.getvalue()
    assert "[2/2] b-cell: failed: out_of_memory (outputs/s/cell)" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")  # the bar's line is erased


def test_between_blocks_the_bar_is_drawn_no_more_often_than_allowed() -> None:
    """A thousand blocks in a moment draw it once per interval; any other step draws it."""
    reporter_, file = reporter(1, terminal=True)
    with reporter_:
        begun = time.monotonic()
        for _ in range(1000):
            reporter_.step("cell", "time")
        intervals = (time.monotonic() - begun) / drawing._STEP_S
        drawn = file.getvalue().count("time cell")
        assert 1 <= drawn <= intervals + 1
        for number in range(5):
            reporter_.step(f"cell-{number}", "verify")
        assert all(f"verify cell-{number}" in file.getvalue() for number in range(5))


def test_nothing_is_drawn_by_itself() -> None:
    """No thread of it may run while a block is timed."""
    before = set(threading.enumerate())
    reporter_, file = reporter(1, terminal=True)
    with reporter_:
        reporter_.step("cell", "build")
        assert set(threading.enumerate()) == before
        drawn = file.getvalue()
        time.sleep(0.3)  # rich's own interval is a tenth of a second
        assert file.getvalue() == drawn


@pytest.mark.parametrize("terminal", [pytest.param(True, id="terminal"), pytest.param(False, id="file")])
def test_markup_in_a_name_or_a_reason_is_shown_as_it_is(terminal: bool) -> None:
    """They come from exceptions and from YAML files."""
    reporter_, file = reporter(1, terminal=terminal)
    with reporter_:
        reporter_.step("[red]name[/]", "build")
        reporter_.end("[red]name[/]", failed("error: KeyError: [bold]x[/nonsense]"))
    assert "[1/1] [red]name[/]: failed: error: KeyError: [bold]x[/nonsense] (outputs/s/cell)" in file.getvalue()


def test_a_long_line_is_not_broken() -> None:
    """It can be searched for and copied."""
    reporter_, file = reporter(1, terminal=False)
    reporter_.say("x" * 500 + " " + "y" * 500)
    assert file.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        pytest.param(0.2, "0:00", id="nothing"),
        pytest.param(7, "0:07", id="seconds"),
        pytest.param(59.6, "1:00", id="rounded-up"),
        pytest.param(3599, "59:59", id="below-an-hour"),
        pytest.param(3599.6, "1:00:00", id="rounded-to-an-hour"),
        pytest.param(36061, "10:01:01", id="hours"),
    ],
)
def test_the_clock(seconds: float, text: str) -> None:
    """Minutes and seconds, and hours where there are any."""
    assert clock(seconds) == text


@given(seconds=st.floats(0, 1e6))
def test_the_clock_reads_back(seconds: float) -> None:
    """To a second, with two digits behind the first colon."""
    value = 0
    for part in clock(seconds).split(":"):
        value = value * 60 + int(part)
    assert abs(value - seconds) <= 0.5
    assert all(len(part) == 2 and int(part) < 60 for part in clock(seconds).split(":")[1:])
