"""records/search.py: what a record says of a trial, and a file that comes back as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_lab.records import search as searches
from moe_lab.records.schema import Ratio
from moe_lab.records.search import FILE, RATIO, Constraint, Objective, Search, Trial
from tests.results import compared

BITS, PEAK = "quality.bits_per_byte", "memory.peak_mb"


def search(*, peak: float = 500.0, default: str = "d") -> Search:
    """For fast and good trials in a memory."""
    objectives = [Objective(RATIO, "minimize"), Objective(BITS, "maximize")]
    limits = [Constraint(PEAK, max=peak), Constraint(BITS, min=1.0, max=3.0)]
    trials = [Trial(0, 0, {"k": 0.25, "router": "a"}, ["k=0.25", "router=a"], "c")]
    return Search(objectives, limits, ["k=interval(0,1)"], "tpe", 8, 3, default, trials)


def row(**more: Any) -> dict[str, Any]:
    found = {"status": "ok", "cell_id": "c", RATIO: 0.5, "ratio_to_anchor.anchor": "d", BITS: 2.0, PEAK: 400.0}
    return found | more


def test_a_trial_within_the_constraints() -> None:
    """Its values in the order of the objectives, and how far it is from each limit."""
    outcome = search().outcome(row())
    assert outcome.state == "ok" and outcome.values == (0.5, 2.0) and outcome.reason is None
    assert outcome.excess == {f"{PEAK} max": -100.0, f"{BITS} min": -1.0, f"{BITS} max": -1.0}


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        pytest.param({PEAK: 501.0}, "outside", "memory.peak_mb is 501, beyond its max", id="above"),
        pytest.param({BITS: 0.5}, "outside", "quality.bits_per_byte is 0.5, beyond its min", id="below"),
        pytest.param({BITS: None}, "failed", "the record has no quality.bits_per_byte", id="no-value"),
        pytest.param({BITS: math.nan}, "failed", "the record has no quality.bits_per_byte", id="nan"),
        pytest.param({BITS: True}, "failed", "the record has no quality.bits_per_byte", id="no-number"),
        pytest.param({"ratio_to_anchor.anchor": "x"}, "failed", f"the record has no {RATIO}", id="beside-another"),
        pytest.param({"status": "failed", "reason": "out_of_memory"}, "failed", "out_of_memory", id="failed"),
        pytest.param({"status": "skipped", "reason": "excluded"}, "pruned", "excluded", id="skipped"),
    ],
)
def test_a_trial_that_is_not_ok(changes: dict[str, Any], state: str, reason: str) -> None:
    """It says why; one outside keeps its values, so that the sampler learns from them."""
    outcome = search().outcome(row(**changes))
    assert (outcome.state, outcome.reason) == (state, reason)
    assert bool(outcome.values) == (state == "outside")
    assert any(by > 0 for by in outcome.excess.values()) == (state == "outside")


def test_the_default_is_1_beside_itself_and_what_did_not_run_is_unknown() -> None:
    """The anchor's record has no ratio."""
    outcome = search().outcome(row(cell_id="d", **{RATIO: None, "ratio_to_anchor.anchor": None}))
    assert outcome.values == (1.0, 2.0)
    assert search().outcome(None).state == "not run"


def test_a_record_has_the_columns_of_its_row() -> None:
    """With the names that the tables have."""
    ratio = Ratio(anchor="d", p50=0.5, ci95_low=None, ci95_high=None, rounds=3)
    made = compared.record(1.0, 2.0, 3.0, ratio_to_anchor=ratio)
    found = searches.row_of(made)
    assert found["latency_ms.p50"] == 2.0 and found[RATIO] == 0.5 and found["ratio_to_anchor.anchor"] == "d"
    assert found["status"] == "ok" and found["cell_id"] == made.cell_id


def test_a_file_comes_back(tmp_path: Path) -> None:
    """Numbers too, to the last digit; without a file there is no search."""
    assert searches.read(tmp_path) is None
    search().write(tmp_path)
    assert searches.read(tmp_path) == search()


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema": 2}', '{"schema": 1, "objectives": 3}', "{"])
def test_a_file_that_is_none_raises(content: str, tmp_path: Path) -> None:
    """One of the errors that readers of strange folders expect."""
    (tmp_path / FILE).write_text(content)
    with pytest.raises((ValueError, KeyError, TypeError)):
        searches.read(tmp_path)
    search().write(tmp_path)
    whole = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**whole, "more": 1}))
    with pytest.raises(TypeError):
        searches.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        pytest.param("latency_ms", "latency_ms.p50", id="latency"),
        pytest.param("bits_per_byte", BITS, id="last-part"),
        pytest.param("memory.peak_mb", PEAK, id="whole"),
        pytest.param("ratio_to_anchor", RATIO, id="ratio"),
        pytest.param("tokens_per_s", "throughput.tokens_per_s", id="throughput"),
        pytest.param("quality.domains.code.bits_per_byte", "quality.domains.code.bits_per_byte", id="of-a-text"),
    ],
)
def test_columns_have_short_names(name: str, column: str) -> None:
    """Where the last part tells."""
    assert searches.column(name, "objectives") == column


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("bits_per_bite", "Did you mean bits_per_byte?", id="misspelt"),
        pytest.param("latency", "Did you mean latency_ms?", id="near"),
        pytest.param("implementation.router", "not a column of numbers", id="text"),
        pytest.param("load_cv", "may be routing.pooled.load_cv, routing.worst.load_cv", id="several"),
    ],
)
def test_an_unknown_column_is_a_line(name: str, says: str) -> None:
    """With the key that names it."""
    with pytest.raises(ValueError, match="objectives: ") as error:
        searches.column(name, "objectives")
    assert says in str(error.value) and "\n" not in str(error.value)
