"""results/load.py: a folder of runs as a DataFrame."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import moe_lab
from moe_lab.records.schema import Latency
from moe_lab.records.store import RESULT, write_record
from moe_lab.results.load import load
from tests import tiny

LATENCY = Latency(n=9, mean=2.5, p50=2.0, p90=3.0, p99=4.0, ci95_low=None, ci95_high=None, stable=False)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs at different depths: a decoder, a minimal, and a skipped one."""
    runs = {
        "b/decoder": tiny.record(
            tiny.decoder_moe("router=sinkhorn", "dtype=bf16"),
            latency_ms=LATENCY,
            routing={"pooled": {"load_cv": 0.5}, "worst": {"load_cv": 0.7}, "layers": [{"layer": 0, "load_cv": 0.7}]},
            overrides=["router=sinkhorn"],
        ),
        "a/minimal": tiny.record(tiny.minimal(), latency_ms=LATENCY),
        "c/deep/er/skipped": tiny.record(tiny.moe_layer(), status="skipped", reason="unavailable: no CUDA"),
    }
    for name, record in runs.items():
        (tmp_path / name).mkdir(parents=True)
        write_record(tmp_path / name, record)
    return tmp_path


def test_there_is_a_row_per_run_at_any_depth_ordered_by_path(sweep: Path) -> None:
    """Skipped and failed runs are rows too."""
    frame = load(sweep)
    assert frame["model"].tolist() == ["minimal", "decoder_moe", "moe_layer"]
    assert frame["status"].tolist() == ["ok", "ok", "skipped"]
    assert frame["directory"].tolist() == [
        str(sweep / name) for name in ("a/minimal", "b/decoder", "c/deep/er/skipped")
    ]


def test_columns_are_settings_options_and_the_records_fields(sweep: Path) -> None:
    """Nested fields are joined by dots."""
    row = load(sweep).iloc[1]
    assert (row["batch"], row["seq_len"], row["seed"]) == (tiny.BATCH, tiny.SEQ, 0)
    assert (row["router"], row["experts"], row["dtype"], row["device"]) == ("sinkhorn", "auto", "bf16", "cpu")
    assert (row["workload"], row["execution"]) == ("random", "eager")
    assert (row["latency_ms.p50"], row["latency_ms.stable"]) == (2.0, False)
    assert (row["routing.pooled.load_cv"], row["routing.worst.load_cv"]) == (0.5, 0.7)
    assert row["overrides"] == ["router=sinkhorn"]


def test_configuration_and_layers_are_no_columns(sweep: Path) -> None:
    """They would make thousands."""
    columns = list(load(sweep).columns)
    assert not [name for name in columns if name.startswith(("config", "routing.layers"))]
    assert len(columns) == len(set(columns))


def test_what_the_model_does_not_read_is_unknown(sweep: Path) -> None:
    """model=minimal has no sequence, router or experts, whatever stood in its configuration."""
    frame = load(sweep)
    assert frame[["seq_len", "router", "experts"]].iloc[0].isna().all()
    assert frame["batch"].iloc[0] == 2


def test_the_variant_and_its_setting_stand_in_the_row(tmp_path: Path) -> None:
    """Cells that differ only in what is compared share a setting; names tell apart what differs."""
    overrides = {"a": "router=torch", "b": "router=sinkhorn", "c": "batch=1"}
    for name, override in overrides.items():
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, tiny.record(tiny.decoder_moe(override), cell_id=name))
    frame = load(tmp_path)
    assert frame["variant"].tolist() == ["torch", "sinkhorn", "torch"]
    a, b, c = frame["setting_id"]
    assert a == b != c
    plan = {"schema": 1, "name": "s", "commands": [], "compare": ["batch"], "anchor": None, "cells": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    frame = load(tmp_path)
    a, b, c = frame["setting_id"]
    assert a == c != b and frame["variant"].iloc[0] == "2"


def test_a_broken_plan_is_listed(sweep: Path) -> None:
    """What is compared could not be told."""
    (sweep / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json"):
        load(sweep)


def test_what_was_not_measured_is_unknown(sweep: Path) -> None:
    """A skipped run has no latency, and that is not 0."""
    assert math.isnan(load(sweep)["latency_ms.p50"].iloc[2])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param('{"schema": 1', id="cut_off"),
        pytest.param('{"schema": 7}', id="another_schema"),
        pytest.param(json.dumps({**tiny.record().to_dict(), "config": None}), id="configuration_is_null"),
        pytest.param(json.dumps({**tiny.record().to_dict(), "config": {"model": 3}}), id="model_is_a_number"),
    ],
)
def test_unreadable_records_are_all_listed(sweep: Path, content: str) -> None:
    """Each by name; a row is never dropped in silence."""
    broken = [sweep / "a/minimal" / RESULT, sweep / "z" / RESULT]
    broken[1].parent.mkdir()
    for path in broken:
        path.write_text(content)
    with pytest.raises(ValueError) as caught:
        load(sweep)
    assert all(str(path) in str(caught.value) for path in broken)
    assert str(sweep / "b/decoder") not in str(caught.value)


def test_an_empty_folder_is_an_empty_frame(tmp_path: Path) -> None:
    """No runs are no mistake."""
    assert len(load(tmp_path)) == 0


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    """The message names it."""
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_a_file_is_no_folder(sweep: Path) -> None:
    """Nor is a single record."""
    with pytest.raises(ValueError, match=RESULT):
        load(sweep / "a/minimal" / RESULT)


def test_text_and_path_are_the_same(sweep: Path) -> None:
    """As the package's `moe_lab.load`."""
    assert moe_lab.load(str(sweep)).equals(load(sweep))


def test_loading_imports_no_torch(sweep: Path) -> None:
    """Results are read on machines without it."""
    code = "import sys, moe_lab; print(len(moe_lab.load(sys.argv[1])), 'torch' in sys.modules)"
    assert tiny.python(code, sweep).split() == ["3", "False"]
