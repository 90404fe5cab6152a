"""records/fields.py: what the schema says is what the producers give, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import moe_lab
from moe_lab.measure import agreement, placement, routing_metrics
from moe_lab.ops.routing_sums import NAMES as SUMS
from moe_lab.records import fields
from moe_lab.records.fields import Field
from moe_lab.records.schema import Record, fields_of
from moe_lab.records.store import RESULT
from moe_lab.routers.base import Routing
from tests import quick

# What is open by design: a plug-in's operations, what an export notes, each text's numbers, a kernel of several phases.
OPEN = re.compile(r"implementation\..*|export\..*|quality\.(domains\..*|domain_information)|phases_ms\.\w+(\+\w+)+")
BY_LAYER = re.compile(r"(routing|agreement|agreement\.floor)\.layers")
MEASURED = ("routing.", "agreement.", "quality.", "roofline.", "phases_ms.", "throughput.", "memory.", "router.")
REFERENCE = "measure.reference_router=torch"
RUNS = {
    "text": ("checkpoint", "router=sinkhorn", REFERENCE, "measure.roofline=true"),
    "decode": ("decoder_moe", "workload.phase=decode", "workload.context_len=4", "seq_len=3", REFERENCE),
}


def named(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a record by its name, null or not; lists by layer are values."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= named(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two runs that look at everything write, by run and name, without their configuration."""
    root = tmp_path_factory.mktemp("runs")
    for name, (model, *overrides) in RUNS.items():
        assert moe_lab.run(quick.compose(model, *overrides), root / name).status == "ok"
    contents = {name: json.loads((root / name / RESULT).read_text()) for name in RUNS}
    return {name: named({**content, "config": None}) for name, content in contents.items()}


def test_a_run_writes_no_field_that_the_schema_does_not_have(recorded: dict[str, dict[str, Any]]) -> None:
    """But for what is open by design; a part that was not looked at is null as a whole."""
    known = {*fields.names(fields_of(Record)), "config"}
    parts = {name.split(".")[0] for name, *_ in fields_of(Record)}
    for values in recorded.values():
        unknown = [name for name in values if name not in known and (values[name] is not None or name not in parts)]
        assert [name for name in unknown if not OPEN.fullmatch(name) and not BY_LAYER.fullmatch(name)] == []


def test_a_run_writes_every_metric_of_the_schema(recorded: dict[str, dict[str, Any]]) -> None:
    """Null where this machine or model has no value, but there."""
    written = {name for values in recorded.values() for name in values}
    assert [name for name in fields.names(fields_of(Record)) if name.startswith(MEASURED) and name not in written] == []
    assert {f"environment.{name}" for name in fields.names(fields.ENVIRONMENT)} <= written


def test_the_lists_by_layer_have_the_same_metrics(recorded: dict[str, dict[str, Any]]) -> None:
    """They are no columns, but carry the names too."""
    text = recorded["text"]
    for name, metrics in (
        ("routing.layers", fields.METRICS),
        ("agreement.layers", fields.DIFFERENCES),
        ("agreement.floor.layers", fields.DIFFERENCES),
    ):
        assert all(set(layer) == {"layer", *fields.names(metrics)} for layer in text[name]) and text[name]


def test_types_are_those_that_a_run_writes(recorded: dict[str, dict[str, Any]]) -> None:
    """A whole number may stand for a float."""
    kinds = {field.name: field.kind for field in fields_of(Record)}
    for values in recorded.values():
        for name, value in values.items():
            if value is None or kinds.get(name) is None:
                continue
            kind = kinds[name] if isinstance(kinds[name], type) and not isinstance(value, list) else list
            assert type(value) is kind or (kind is float and type(value) is int), name


def test_every_metric_has_a_formula_and_a_worse_layer() -> None:
    """With more experts than ranks and several slots a token, all have a value."""
    logits_TE = torch.randn(256, 2 * max(fields.DEGREES), generator=torch.Generator().manual_seed(0))
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(2)
    routing = Routing(ids_TK.int(), weights_TK)
    metrics = routing_metrics.metrics(routing_metrics.RoutingStats.of(logits_TE, routing, bytes_per_expert=1e6))
    assert set(metrics) == set(fields.names(fields.METRICS)) == set(routing_metrics.WORSE)
    assert [name for name, value in metrics.items() if value is None] == []
    y_TD = torch.ones(256, 4)
    difference = agreement.Difference.of(routing, routing, y_TD, y_TD, logits_TE.shape[1])
    assert set(difference.measures()) == set(fields.names(fields.DIFFERENCES)) == set(agreement.WORSE)


def test_sums_and_placements_are_metrics() -> None:
    """Of the same names."""
    assert set(routing_metrics._MEANS) <= set(SUMS)
    assert set(placement.NAMES) <= set(fields.names(fields.METRICS))


def test_no_name_stands_twice_and_every_field_has_a_meaning() -> None:
    """And every unit is one that people know."""
    every = fields_of(Record)
    assert len({field.name for field in every}) == len(every) > 200
    assert all(field.meaning and "|" not in field.meaning for field in every)
    assert {field.unit for field in every if field.kind in (str, bool)} == {"", "UTC, ISO 8601"}
    assert all(field.unit for field in every if field.kind is float)


def test_fields_under_a_name() -> None:
    """The meaning may quote the field."""
    part = (Field("a", int, "s", "of time"),)
    assert fields.under("x", part) == (Field("x.a", int, "s", "of time"),)
    assert fields.under("x", part, "`{name}` of the worst")[0].meaning == "`a` of the worst"
