"""cli/slots_display.py: the display of a sweep on several slots."""

from __future__ import annotations

import io
import re

from moe_lab.cli.slots_display import SlotsReporter
from moe_lab.terminal import Console
from tests.cli.test_progress import failed
from tests.results.compared import record as timed


def reporter(slots: list[str], *, terminal: bool, height: int = 40) -> tuple[SlotsReporter, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, height=height, soft_wrap=True, color_system=None)
    return SlotsReporter(8, slots, console), file


def drawn(file: io.StringIO) -> list[str]:
    """The lines that were drawn last."""
    return [line.strip() for line in re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).splitlines()]


def test_on_a_terminal_each_slot_has_a_line() -> None:
    """What it does, of which group, how many it has done and how fast; who is lost or idle says so."""
    one, file = reporter(["n1-cpu0", "n2-cpu0", "n3-cpu0"], terminal=True)
    with one:
        one.step("torch batch=1", "verify", "n1-cpu0", 3)
        one.end("cell-a", timed(1.5), "n1-cpu0")
        one.end("cell-b", failed("out_of_memory"), "n1-cpu0")
        one.gone("n2-cpu0")
        one.idle("n3-cpu0")
        assert "[2/8] cell-b: failed: out_of_memory" in file.getvalue()
        file.truncate(0)
        one.step("torch batch=2", "build", "n1-cpu0", 4)
        text = drawn(file)
        assert any("2/8" in line and "1 failed" in line for line in text)
        (row,) = (line for line in text if line.startswith("n1-cpu0"))
        assert re.search(r"group 4 +build torch batch=2 .* 2 done, 1 failed, [\d.e+]+/min", row)
        assert any(re.match(r"n2-cpu0 +out of service", line) for line in text)
        assert any(re.match(r"n3-cpu0 +waits", line) for line in text)


def test_more_slots_than_lines_are_counted() -> None:
    """None is left out in silence."""
    one, file = reporter([f"slot{number}" for number in range(20)], terminal=True, height=10)
    with one:
        one.step("x", "build", "slot0", 1)
        text = drawn(file)
    assert any("slot5" in line for line in text) and not any("slot6" in line for line in text)
    assert any("14 more slots (moe-lab status shows them)" in line for line in text)


def test_without_a_terminal_there_are_plain_lines_that_name_the_slot() -> None:
    """And nothing for a step."""
    one, file = reporter(["n1-cpu0"], terminal=False)
    with one:
        one.step("torch", "verify", "n1-cpu0", 1)
        assert file.getvalue() == ""
        one.end("cell-a", timed(1.5), "n1-cpu0")
    assert re.fullmatch(r"\[1/8\] cell-a: ok 1\.5 ms \(.*\) on n1-cpu0\n", file.getvalue())
