"""results/search.py: which trials are best, and how much better than the default, in sentences that can be held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.records.schema import Record
from moe_lab.records.search import FILE, Constraint, Objective
from moe_lab.results import search
from moe_lab.results.aggregate import aggregate
from tests.results import compared, searched
from tests.results.searched import BITS, cell, trial, write


def said(folder: Path) -> list[str]:
    return search.sentences(searched.found(folder))


def places(folder: Path) -> list[str]:
    found = searched.found(folder)
    return [row.place for row in (found.default, *found.trials)]


def test_the_front_and_what_is_better_than_the_default(tmp_path: Path) -> None:
    """Trial 1 beats the default in both; trial 2 is faster and worse; trial 3 is beaten by trial 1."""
    folder = write(tmp_path, trial(2.0, 0.5, -0.1), trial(3.0, 0.25, 0.3), trial(4.0, 0.8, 0.0))
    assert places(folder) == ["beaten", "front", "front", "beaten"]
    one, two, default = (f"sinkhorn(temperature={number})" for number in (2.0, 3.0, 1.0))
    front, better, fast, good = said(folder)
    assert front.startswith(f"Trial 2 ({two}) and trial 1 ({one}) are the front of latency and bits per byte")
    assert better.startswith(f"Trial 1 ({one}) is better than the default ({default}) in both")
    assert "2x faster [1.96, 2.04]; -0.10 bits per byte [-0.11, -0.09]" in better and "no interval" not in better
    assert "best in latency: 4x faster [3.85, 4.17]; +0.30 bits per byte [+0.29, +0.31]" in fast
    assert "best in bits per byte: -0.10 bits per byte [-0.11, -0.09]; 2x faster" in good


def test_a_difference_within_its_interval_is_not_claimed(tmp_path: Path) -> None:
    """By the values it is better, and the sentence says that no interval shows it."""
    folder = write(tmp_path, trial(2.0, 0.95, -0.01, wide=0.2))
    assert places(folder) == ["beaten", "front"]
    better = said(folder)[1]
    assert "no interval shows that it is" in better and "not surely another" in better


def test_nothing_is_better_than_the_default(tmp_path: Path) -> None:
    """Then it is on the front, and the sentence says so."""
    folder = write(tmp_path, trial(2.0, 0.5, 0.1), trial(3.0, 1.5, 0.2))
    assert places(folder) == ["front", "front", "beaten"]
    assert "No trial is better than the default (sinkhorn(temperature=1.0)) in both" in said(folder)
    alone = write(tmp_path / "alone", trial(2.0, 1.5, 0.2))
    default = "the default (sinkhorn(temperature=1.0))"
    assert said(alone) == [f"No trial is better than {default} in latency or in bits per byte, by what was measured"]


def test_one_objective_has_a_best(tmp_path: Path) -> None:
    """To be made large, here; the default may be the best."""
    most = (Objective("latency_ms.p50", "maximize"),)
    slow = write(tmp_path / "a", trial(2.0, 0.5, 0), trial(3.0, 1.5, 0), objectives=most)
    best = "Trial 2 (sinkhorn(temperature=3.0)) is the best of 2 trials: latency (ms) 3; 1.5x slower [1.49, 1.51]"
    assert said(slow) == [best]
    none = write(tmp_path / "b", trial(2.0, 0.5, 0), objectives=most)
    default = "the default (sinkhorn(temperature=1.0))"
    assert said(none) == [f"The one trial is not better than {default}: latency (ms) 2"]
    one = write(tmp_path / "c", trial(2.0, 1.5, 0), objectives=most)
    assert said(one) == [
        "Trial 1 (sinkhorn(temperature=2.0)) is the only trial: latency (ms) 3; 1.5x slower [1.49, 1.51]"
    ]


def test_trials_that_are_one_variant_are_called_by_what_was_chosen(tmp_path: Path) -> None:
    """A search over sizes, for a number that has no interval."""

    def sized(batch: int, peak: float) -> Record:
        return compared.record(2.0, config={"batch": batch}, memory={"peak_mb": peak})

    least = (Objective("memory.peak_mb", "minimize"),)
    folder = write(tmp_path, sized(4, 300.0), sized(8, 100.0), objectives=least, beside=sized(2, 200.0))
    assert said(folder) == [
        "Trial 2 (t=1) is the best of 2 trials: memory.peak_mb (MB) 100 beside 200, without an interval"
    ]
    assert searched.found(folder).default.name == "the default (as configured)"


def test_what_has_no_place_is_counted(tmp_path: Path) -> None:
    """Failed, pruned, outside, not run, and a cell that two trials have."""
    good = trial(2.0, 0.5, -0.1)
    folder = write(
        tmp_path,
        good,
        trial(3.0, 0.1, 0.5),
        cell(4.0, medians=(), status="failed", reason="out_of_memory"),
        cell(5.0, medians=(), status="skipped", reason="impossible: no"),
        None,
        good,
        constraints=(Constraint(BITS, max=2.2),),
    )
    assert places(folder) == ["beaten", "front", "", "", "", "", ""]
    assert said(folder)[-1] == (
        "Of 6 trials 1 failed, 1 cannot run (pruned), 1 did not run yet, 1 is outside a constraint "
        "(quality.bits_per_byte at most 2.2) and 1 had the cell of another and was not timed again"
    )


def test_a_search_of_which_nothing_is_known(tmp_path: Path) -> None:
    """It says so, and why."""
    folder = write(tmp_path, None, cell(2.0, medians=(), status="failed", reason="error: x"))
    assert said(folder) == ["The search has no result: of 2 trials 1 failed and 1 did not run yet"]
    for n in (1, 2, 3):
        folder = write(tmp_path / str(n), *[None] * n)
        assert said(folder) == ["The search has no result: no trial has run yet"]
    (tmp_path / "none").mkdir()
    assert said(write(tmp_path / "none")) == ["The search has no trials yet"]


@pytest.mark.parametrize(
    ("n", "all_of_them"),
    [
        pytest.param(1, "the one trial is", id="one"),
        pytest.param(2, "both trials are", id="two"),
        pytest.param(3, "all 3 trials are", id="three"),
    ],
)
def test_what_became_of_all_trials_is_not_counted(n: int, all_of_them: str, tmp_path: Path) -> None:
    """It is one thing: all are outside. With one that is not they are counted, and the best is told."""
    trials, limit = [trial(2.0 + at, 0.5, 0.5) for at in range(n)], (Constraint(BITS, max=2.2),)
    outside = f"outside a constraint ({BITS} at most 2.2)"
    assert said(write(tmp_path / "all", *trials, constraints=limit)) == [
        f"The search has no result: {all_of_them} {outside}"
    ]
    several = said(write(tmp_path / "some", *trials, trial(9.0, 0.5, -0.1), constraints=limit))
    assert several[-1] == f"Of {n + 1} trials {n} {'is' if n == 1 else 'are'} {outside}"


def test_a_default_that_failed_is_not_compared_with(tmp_path: Path) -> None:
    """Trials without a ratio have no place; with another objective they have."""
    failed = cell(1.0, medians=(), status="failed", reason="out_of_memory")
    both = (Objective("latency_ms.p50", "minimize"), searched.BOTH[1])
    folder = write(tmp_path, trial(2.0, 0.5, -0.1), objectives=both, beside=failed)
    assert "Nothing is compared with the default (sinkhorn(temperature=1.0)): out_of_memory" in said(folder)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    """And a folder without one has no search."""
    folder = write(tmp_path, trial(2.0, 0.5, -0.1))
    runs = aggregate(folder).runs
    (folder / FILE).write_text("{")
    found, error = search.find(folder, runs)
    assert found is None and error is not None and FILE in error
    (folder / FILE).unlink()
    assert search.find(folder, runs) == (None, None)


@pytest.mark.parametrize(
    ("directions", "front"),
    [
        pytest.param(("minimize", "minimize"), [0, 1], id="min-min"),
        pytest.param(("minimize", "maximize"), [1, 2], id="min-max"),
        pytest.param(("maximize", "minimize"), [0, 3], id="max-min"),
        pytest.param(("maximize", "maximize"), [2, 3], id="max-max"),
    ],
)
def test_the_front_lies_where_both_are_better(directions: tuple[str, str], front: list[int], tmp_path: Path) -> None:
    """Four corners of a square, of which two are on each front; the one between them beats none and is beaten."""
    columns = ("latency_ms.p50", BITS)
    objectives = tuple(Objective(*pair) for pair in zip(columns, directions, strict=True))
    corners = [trial(2.0, 0.6, -0.3), trial(3.0, 0.4, -0.2), trial(4.0, 0.5, 0.3), trial(5.0, 0.8, 0.2)]
    folder = write(tmp_path, *corners, objectives=objectives, beside=trial(1.0, 0.58, 0.0))
    assert [at for at, row in enumerate(searched.found(folder).trials) if row.place == "front"] == front
