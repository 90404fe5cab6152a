"""trackers/message.py: what is sent of a record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import synthetic
from moe_lab.records import store
from moe_lab.records.schema import NOT_SENT, Record
from moe_lab.results import columns
from moe_lab.trackers.message import Cell, Files, hash_of, of_record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One with a measurement."""
    (folder,) = synthetic.sweep(tmp_path_factory.mktemp("one"), 1)
    return store.read_record(folder)


def cell_of(record: Record) -> Cell:
    """What is sent of it."""
    content = of_record(record.to_dict())
    return Cell("id", "name", hash_of(content), content)


def test_parameters_are_the_flattened_configuration(record: Record) -> None:
    """Without what a sweep does with its cells."""
    params = cell_of(record).params
    assert params["model.n_layers"] == record.config["model"]["n_layers"]
    assert params["batch"] == record.config["batch"]
    assert json.loads(params["export.dynamic"]) == record.config["export"]["dynamic"]
    assert not [key for key in params if key.startswith(("sweep", "tracker", "overrides"))]


def test_metrics_are_the_numbers_under_the_names_of_the_columns(record: Record) -> None:
    """With the ends of intervals; NaN and what is unknown are left out, and so are words and truth values."""
    assert record.latency_ms is not None
    record.latency_ms.p99 = math.nan
    metrics = cell_of(record).metrics
    for key in ("p50", "ci95_low", "ci95_high"):
        assert metrics[f"latency_ms.{key}"] == getattr(record.latency_ms, key)
    assert "latency_ms.p99" not in metrics and "latency_ms.stable" not in metrics and "schema" not in metrics
    assert {type(value) for value in metrics.values()} == {float}
    known = set(columns.RUNS)
    assert {"latency_ms.p50", "check.rel_error", "memory.peak_mb"} <= metrics.keys() & known


def test_tags_say_who_the_result_is_and_where_it_ran(record: Record) -> None:
    """What is unknown is not a tag."""
    record.environment["node"] = "host7"
    tags = cell_of(record).tags
    assert (tags["cell_id"], tags["code_id"], tags["status"]) == (record.cell_id, record.code_id, record.status)
    assert (tags["node"], tags["device_name"]) == ("host7", "Synthetic CPU")
    assert tags["implementation.router"] == record.implementation["router"]
    assert "reason" not in tags


def test_the_warning_that_a_record_was_not_sent_is_not_sent(record: Record, tmp_path: Path) -> None:
    """So it has the same content whether or not it was sent before."""
    before = cell_of(record)
    record.warnings.append(f"{NOT_SENT}mlflow: it is down; run the same command again to send it.")
    after = cell_of(record)
    record.warnings.pop()
    assert after == before
    assert json.loads(after.write_record(tmp_path).read_text())["warnings"] == record.warnings
    record.warnings.append("another")
    assert cell_of(record).content != before.content
    record.warnings.pop()


def test_the_times_are_those_of_the_run(record: Record) -> None:
    """Seconds since 1970; None of a record without a run."""
    record.started, record.elapsed_s = "1970-01-01T00:01:40+00:00", 2.5
    assert (cell_of(record).started_s, cell_of(record).ended_s) == (100.0, 102.5)
    record.started = None
    assert (cell_of(record).started_s, cell_of(record).ended_s) == (None, None)


def test_the_files_of_a_sweep_differ_if_their_content_does(tmp_path: Path) -> None:
    """Or if the sweep has become complete."""
    path = tmp_path / "runs.csv"
    path.write_text("a")
    content = Files([path], True).content
    assert Files([path], False).content != content
    path.write_text("b")
    assert Files([path], True).content != content
    path.write_text("a")
    assert Files([path], True).content == content
