"""records/schema.py: the fields of result.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_lab.records.schema import SCHEMA, Check, Latency, Record, fields_of
from tests import tiny

IN_THE_DESIGN = {
    "schema",
    "status",
    "reason",
    "cell_id",
    "code_id",
    "env_id",
    "name",
    "overrides",
    "interleaved_with",
    "implementation",
    "latency_ms",
    "throughput",
    "phases_ms",
    "memory",
    "check",
    "routing",
    "quality",
    "roofline",
    "export",
    "environment",
    "warnings",
}
LATENCY = Latency(n=9, mean=2.5, p50=2.0, p90=3.0, p99=4.0, ci95_low=1.5, ci95_high=2.5, stable=True)
CHECK = Check(
    passed=True,
    rel_error=1e-7,
    max_abs_error=1e-6,
    expert_rel_error=None,
    token_rel_error=None,
    near_ties=None,
    free_rel_error=1e-7,
    changed_sets=None,
    reference="fp32",
)


def full() -> Record:
    """A record with every kind of field filled."""
    return tiny.record(
        tiny.decoder_moe(),
        latency_ms=LATENCY,
        check=CHECK,
        phases_ms={"router": 0.5, "dispatch": None},
        routing={"pooled": {"load_cv": 0.5}, "worst": {}, "layers": [{"layer": 0}]},
        warnings=["noise"],
        environment={"torch": "2.13"},
        env_id="2" * 12,
    )


def edited(part: str, **values: object) -> dict[str, Any]:
    """The full record with other values in one part."""
    content = full().to_dict()
    return {**content, part: {**content[part], **values}}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def test_a_record_survives_a_round_trip_through_json() -> None:
    """Nested dataclasses come back as such."""
    again = Record.from_dict(json.loads(json.dumps(full().to_dict())))
    assert again == full()
    assert isinstance(again.latency_ms, Latency) and isinstance(again.check, Check)


def test_the_least_record_survives_a_round_trip() -> None:
    """A skipped cell has neither latency nor check."""
    least = tiny.record(status="skipped", reason="excluded")
    assert Record.from_dict(least.to_dict()) == least


def test_the_fields_of_the_design_are_there() -> None:
    """Each of them, whatever the status; unknown is null."""
    content = tiny.record(status="skipped").to_dict()
    assert set(content) >= IN_THE_DESIGN
    assert content["schema"] == SCHEMA == 1
    assert content["latency_ms"] is None and content["env_id"] is None


def test_where_a_record_lies_is_not_part_of_it() -> None:
    """A moved folder is the same result."""
    assert "directory" not in tiny.record(directory="/somewhere").to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({}, "schema=None", id="empty"),
        pytest.param({**full().to_dict(), "schema": 2}, "schema=2", id="newer_schema"),
        pytest.param({**full().to_dict(), "schema": "1"}, "schema='1'", id="schema_as_text"),
        pytest.param(without(full().to_dict(), "schema"), "schema=None", id="no_schema"),
        pytest.param(without(full().to_dict(), "cell_id"), "cell_id", id="missing_field"),
        pytest.param(without(full().to_dict(), "status"), "status", id="missing_status"),
        pytest.param({**full().to_dict(), "surprise": 1}, "surprise", id="unknown_field"),
        pytest.param({**full().to_dict(), "latency_ms": {"n": 1}}, "mean", id="half_a_latency"),
        pytest.param({**full().to_dict(), "check": {"passed": True}}, "rel_error", id="half_a_check"),
        pytest.param({**full().to_dict(), "latency_ms": 3.0}, "schema 1", id="latency_is_no_object"),
        pytest.param(edited("check", passed=False), "status is ok, and check.passed false", id="ok_though_it_failed"),
        pytest.param(edited("latency_ms", p50=1.0), r"p50=1.0 lies outside .* \[1.5, 2.5\]", id="median_outside"),
    ],
)
def test_what_is_no_record_of_this_schema_is_refused(content: dict[str, Any], message: str) -> None:
    """The error says what is wrong with it."""
    with pytest.raises(ValueError, match=message):
        Record.from_dict(content)


def test_reading_a_record_leaves_its_source_alone() -> None:
    """The dictionary may be used again."""
    content = full().to_dict()
    before = json.dumps(content)
    Record.from_dict(content)
    assert json.dumps(content) == before


def test_two_records_share_no_lists() -> None:
    """A warning of one run is not another's."""
    one, other = tiny.record(), tiny.record()
    one.warnings.append("noise")
    assert other.warnings == []


def test_a_result_of_an_earlier_version_is_read() -> None:
    """Written by moe-lab 0.1.0 before the schema had units; every value is still there."""
    content = json.loads((Path(__file__).parent / "result-0.1.0.json").read_text())
    record = Record.from_dict(content)
    read = {key: value for key, value in record.to_dict().items() if key in content}
    for part in ("check", "latency_ms"):  # fields that came later
        read[part] = {key: value for key, value in read[part].items() if key in content[part]}
    assert read == content
    assert record.quality is not None and record.routing is not None and record.roofline is not None


def test_a_field_without_meaning_is_refused() -> None:
    """It would be a column that nobody can read."""

    @dataclass
    class Bare:
        seconds: float

    with pytest.raises(AssertionError, match=r"float.*neither fields nor a unit"):
        fields_of(Bare)
