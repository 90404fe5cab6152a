"""How a sweep tells the person at the terminal what it is going to do, and where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape

from moe_lab.cli.reporter import Reporter
from moe_lab.cli.slots_display import SlotsReporter
from moe_lab.sweep import plan as planning
from moe_lab.sweep.plan import Plan
from moe_lab.terminal import Console


class Terminal:
    """Tells the person at the terminal; see `sweep.session.Progress`."""

    def announce(self, plan: Plan, how: str | None = None) -> None:
        """Say in a line what is going to happen, and why cells are skipped."""
        console = Console(stderr=True, soft_wrap=True)
        console.print(escape(_first_line(plan, how)), highlight=False)
        if plan.builds_extension and plan.to_run():
            console.print("building the C++/CUDA extension once; this takes about a minute", highlight=False)
        for line in plan.without_effect:
            console.print(escape(line), style="yellow", highlight=False)
        reasons = Counter(cell.reason for cell in plan.cells if cell.status == "skipped")
        for reason, number in reasons.items():
            console.print(escape(f"skipped ({number} cells): {reason}"), style="yellow", highlight=False)

    def say(self, text: str) -> None:
        """A line."""
        Console(stderr=True, soft_wrap=True).print(escape(text), style="yellow", highlight=False)

    def reporter(self, n_cells: int, slots: Sequence[str] = ()) -> Reporter:
        """A bar, or lines, for this many cells; with several slots a line for each."""
        return SlotsReporter(n_cells, slots) if slots else Reporter(n_cells)


def _first_line(plan: Plan, suffix: str | None) -> str:
    groups = planning.groups(plan)
    counts = [f"{len(plan.cells)} cells"]
    if plan.n_equal:
        counts.append(f"{plan.n_equal} {'duplicate' if plan.n_equal == 1 else 'duplicates'} left out")
    for status in ("done", "stale", "skipped", "excluded"):
        if number := sum(cell.status == status for cell in plan.cells):
            counts.append(f"{number} {status}")
    if suffix is None:
        together = sum(len(group) > 1 for group in groups)
        suffix = f" in {len(groups)} group{'' if len(groups) == 1 else 's'}"
        suffix += f", {together} of them interleaved" if together else ""
        if n_slots := sum(len(kind["slots"]) for kind in plan.kinds):
            suffix += f", on {n_slots} slot{'' if n_slots == 1 else 's'}"
    n_to_run = len(plan.to_run())
    return f"{plan.directory}: {', '.join(counts)}; {n_to_run} to run{suffix if n_to_run else ''}"
