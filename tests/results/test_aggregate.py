"""results/aggregate.py, kept.py, summary.py, columns.py: the tables of a sweep's folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_lab
from benchmarks import synthetic
from moe_lab.records.schema import Latency, Record
from moe_lab.records.store import RESULT, UNREADABLE, write_arrays, write_record
from moe_lab.results import columns
from moe_lab.results.aggregate import OUTPUTS, Aggregate, aggregate, read_samples
from moe_lab.results.kept import CACHE
from moe_lab.results.load import Plan
from moe_lab.results.summary import summarize
from tests import quick, tiny

DOCUMENT = tiny.ROOT / "docs/results-format.md"
TABLES = {
    "runs": columns.RUNS,
    "summary": columns.SUMMARY,
    "samples": columns.SAMPLES,
    "unreadable": columns.UNREADABLE,
}
N = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen cells: two models, two sizes, four variants; one failed, one was skipped."""
    root = tmp_path_factory.mktemp("made")
    synthetic.sweep(root, N, samples=20)
    return root


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a record, as another run would leave them."""
    content = json.loads((folder / RESULT).read_text())
    (folder / RESULT).write_text(json.dumps({**content, **fields}))


def cells(sweep: Path) -> list[Path]:
    """The cells' folders, in the order of `runs`."""
    return sorted(path.parent for path in sweep.rglob(RESULT))


def contents(sweep: Path) -> dict[str, bytes]:
    """The outputs, byte by byte."""
    return {name: (sweep / name).read_bytes() for name in OUTPUTS}


def assert_same(one: Aggregate, other: Aggregate) -> None:
    """Same values, same types."""
    for mine, theirs in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(mine, theirs)


def test_there_is_a_row_per_record_and_the_files_hold_what_is_returned(sweep: Path) -> None:
    """runs as `load` has it, but for the directory; Parquet as returned."""
    result = aggregate(sweep)
    loaded = moe_lab.load(sweep)
    assert len(result.runs) == N
    assert [str(sweep / name) for name in result.runs["directory"]] == loaded["directory"].tolist()
    pd.testing.assert_frame_equal(result.runs.drop(columns="directory"), loaded.drop(columns="directory"))
    pd.testing.assert_frame_equal(columns.frame(pq.read_table(sweep / "runs.parquet")), result.runs)
    pd.testing.assert_frame_equal(columns.frame(pq.read_table(sweep / "summary.parquet")), result.summary)


@pytest.mark.parametrize("name", ["runs", "summary"])
def test_csv_floats_are_read_back_exactly(sweep: Path, name: str) -> None:
    """Every number has all its digits; what is missing is empty; lists are JSON."""
    frame = getattr(aggregate(sweep), name)
    with open(sweep / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(frame.columns)
    for column in frame:
        for text, value in zip((row[column] for row in rows), frame[column], strict=True):
            if isinstance(value, list):
                assert json.loads(text) == value
            elif pd.isna(value):
                assert text == ""
            elif isinstance(value, float):
                assert float(text) == value
            else:
                assert text == (str(value).lower() if isinstance(value, bool | np.bool_) else str(value))


def test_types_are_kept(sweep: Path) -> None:
    """In Parquet and in pandas, with and without missing values."""
    result = aggregate(sweep)
    schema = pq.read_schema(sweep / "runs.parquet")
    assert {name: schema.field(name).type for name in schema.names if name in columns.RUNS} == {
        name: kind for name, kind in columns.RUNS.items() if kind is not None
    }
    assert str(result.runs["check.near_ties"].dtype) == "Int64"
    assert str(result.runs["check.passed"].dtype) == "boolean"
    assert isinstance(result.runs["overrides"].iloc[0], list)


def test_samples_are_those_of_the_records(sweep: Path) -> None:
    """Every one, under its cell."""
    aggregate(sweep)
    samples = pq.read_table(sweep / "samples.parquet").to_pandas()
    for folder in cells(sweep):
        mine = samples[samples["directory"] == folder.name]
        if (folder / "samples.npz").exists():
            with np.load(folder / "samples.npz") as arrays:
                for name in arrays.files:
                    assert mine[name].tolist() == arrays[name].tolist()
            assert set(mine["cell_id"]) == {json.loads((folder / RESULT).read_text())["cell_id"]}
        else:
            assert mine.empty


# ---- summary


def test_summary_has_a_row_per_setting_and_variant_with_one_anchor_each(sweep: Path) -> None:
    """The anchor is the one that the others were timed beside; the ratios are the records' own."""
    runs, summary, _ = aggregate(sweep)
    assert len(summary) == N and not summary.duplicated(["setting_id", "variant"]).any()
    assert (summary.groupby("setting_id")["is_anchor"].sum() == 1).all()
    assert set(summary["anchor"]) == {"torch/grouped"}
    assert summary.loc[summary["is_anchor"], "ratio_to_anchor.p50"].isna().all()
    others = summary[~summary["is_anchor"] & (summary["status"] == "ok")]
    assert others["ratio_to_anchor.paired"].all() and len(others) > 9
    merged = others.merge(runs, on="cell_id", suffixes=("", "_run"))
    for name in ("p50", "ci95_low", "ci95_high"):
        assert (merged[f"ratio_to_anchor.{name}"] == merged[f"ratio_to_anchor.{name}_run"]).all()


def test_without_common_rounds_the_ratio_is_a_quotient_without_an_interval(sweep: Path) -> None:
    """Timed apart; the first variant of the plan is then the anchor, without a plan the first by name."""
    for folder in cells(sweep):
        edit(folder, ratio_to_anchor=None)
    assert set(aggregate(sweep).summary["anchor"]) == {"torch/grouped"}
    (sweep / "plan.json").unlink()
    summary = aggregate(sweep).summary
    assert set(summary["anchor"]) == {"sinkhorn/grouped"}
    p50 = summary.set_index(["setting_id", "variant"])["latency_ms.p50"]
    for _, row in summary[~summary["is_anchor"]].iterrows():
        quotient = row["latency_ms.p50"] / p50[row["setting_id"], "sinkhorn/grouped"]
        assert row["ratio_to_anchor.p50"] == quotient or np.isnan(quotient)
        assert pd.isna(row["ratio_to_anchor.ci95_low"])
        assert pd.isna(row["ratio_to_anchor.paired"]) if np.isnan(quotient) else not row["ratio_to_anchor.paired"]


def test_the_plan_says_what_is_compared_and_with_what(sweep: Path) -> None:
    """Its anchor and its keys go before what the records tell; ratios to another anchor are not taken."""
    plan = json.loads((sweep / "plan.json").read_text())
    (sweep / "plan.json").write_text(json.dumps({**plan, "compare": ["router"], "anchor": {"router": "sinkhorn"}}))
    summary = aggregate(sweep).summary
    assert set(summary["variant"]) == {"torch", "sinkhorn"} and set(summary["anchor"]) == {"sinkhorn"}
    assert (summary.groupby("setting_id")["variant"].count() == 2).all()
    assert not summary["ratio_to_anchor.paired"].dropna().any()


def test_of_several_that_the_plan_would_have_the_one_timed_beside_is_the_anchor() -> None:
    """`router: torch` agrees with both; without the plan's word the one timed beside; without rounds the first."""
    rows = [{"cell_id": name, "setting_id": "s", "variant": name} for name in ("grouped", "loop", "a")]
    contents = [{"router": {"name": name}} for name in ("torch", "torch", "sinkhorn")]
    for wanted, beside, expected in (
        ({"router": "torch"}, "loop", "loop"),
        ({"router": "torch"}, "a", "grouped"),
        (None, "loop", "loop"),
        (None, "gone", "a"),
    ):
        rows[0]["ratio_to_anchor.anchor"] = beside
        assert {row["anchor"] for row in summarize(rows, contents, Plan(anchor=wanted))} == {expected}


def test_a_ratio_without_a_value_is_none(tmp_path: Path) -> None:
    """The cells were timed together, but no round was complete."""
    rows = [
        {"cell_id": "a", "setting_id": "s", "env_id": "1", "variant": "x", "latency_ms.p50": 1.0},
        {"cell_id": "b", "setting_id": "s", "env_id": "1", "variant": "y", "ratio_to_anchor.anchor": "a"},
    ]
    table = columns.table(summarize(rows, [None] * 2, Plan()), columns.SUMMARY)
    assert table["ratio_to_anchor.p50"].to_pylist() == table["ratio_to_anchor.paired"].to_pylist() == [None, None]


def test_machines_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """One cell on two machines: two rows, and no ratio between them."""
    rows = [
        {"cell_id": cell, "setting_id": "s", "env_id": env, "variant": variant, "latency_ms.p50": p50}
        for cell, env, variant, p50 in (("a", "1", "x", 1.0), ("b", "1", "y", 2.0), ("b", "2", "y", 9.0))
    ]
    summary = summarize(rows, [None] * 3, Plan())
    assert [(row["env_id"], row["variant"], row["ratio_to_anchor.p50"]) for row in summary] == [
        ("1", "x", None),
        ("1", "y", 2.0),
        ("2", "y", None),
    ]


def test_of_copies_the_newest_stands_in_the_summary_and_all_in_runs(sweep: Path) -> None:
    """And both say how many there are."""
    first = next(folder for folder in cells(sweep) if "torch-grouped" in folder.name)
    copy = shutil.copytree(first, sweep / "copies" / "a")
    edit(copy, started="2999-01-01T00:00:00+00:00", elapsed_s=7)
    runs, summary, _ = aggregate(sweep)
    assert len(runs) == N + 1 and len(summary) == N
    assert sorted(runs["n_records"]) == [1] * (N - 1) + [2, 2]
    assert summary.loc[summary["n_records"] == 2, "directory"].tolist() == ["copies/a"]
    assert runs["elapsed_s"].iloc[runs["directory"].tolist().index("copies/a")] == 7.0


def test_replicates_are_counted(tmp_path: Path) -> None:
    """No latency, none; a latency of one process, one."""
    for name, medians in (("none", None), ("one", []), ("three", [1.0, 2.0, 3.0])):
        (tmp_path / name).mkdir()
        latency = None
        if medians is not None:
            latency = Latency(
                n=9, mean=2, p50=2, p90=3, p99=4, ci95_low=None, ci95_high=None, stable=True, replicate_p50=medians
            )
        write_record(tmp_path / name, tiny.record(tiny.minimal(), cell_id=name, env_id=name, latency_ms=latency))
    summary = aggregate(tmp_path).summary
    assert dict(zip(summary["cell_id"], summary["n_replicates"], strict=True)) == {"none": 0, "one": 1, "three": 3}


# ---- what cannot be read


def nested(field: str) -> bytes:
    """A record with lists in lists: few enough to be parsed, too many to be followed by everything that comes after."""
    deep = json.loads("[" * 600 + "]" * 600)
    value = {"x": deep, "model": {"name": "m"}, "export": {}}
    return json.dumps({**tiny.record().to_dict(), field: value}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"schema": 1', id="cut_off", marks=pytest.mark.slow),
        pytest.param(b"\xff\xfe\x00", id="no_text"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"[1]", id="a_list", marks=pytest.mark.slow),
        pytest.param(
            json.dumps({**tiny.record().to_dict(), "cell_id": None}).encode(), id="no_cell_id", marks=pytest.mark.slow
        ),
        pytest.param(nested("config"), id="configuration_nested_without_end"),
        pytest.param(nested("quality"), id="value_nested_without_end", marks=pytest.mark.slow),
        pytest.param(json.dumps({**tiny.record().to_dict(), "config": {"model": 3}}).encode(), id="model_is_a_number"),
        pytest.param(
            json.dumps({**tiny.record().to_dict(), "elapsed_s": "long"}).encode(),
            id="text_for_a_number",
            marks=pytest.mark.slow,
        ),
        pytest.param(json.dumps({**tiny.record().to_dict(), "memory": {"x": 10**400}}).encode(), id="too_many_bits"),
        pytest.param(json.dumps({**tiny.record().to_dict(), "name": "\ud800"}).encode(), id="half_a_surrogate_pair"),
    ],
)
def test_an_unreadable_record_is_listed_and_stops_nothing(sweep: Path, content: bytes) -> None:
    """Whatever is wrong with it."""
    broken = cells(sweep)[3]
    (broken / RESULT).write_bytes(content)
    result = aggregate(sweep)
    assert result.unreadable["path"].tolist() == [f"{broken.name}/{RESULT}"] and len(result.runs) == N - 1
    assert result.unreadable["error"].iloc[0] and "\n" not in result.unreadable["error"].iloc[0]
    lines = (sweep / "unreadable.csv").read_text().splitlines()
    assert [row["path"] for row in csv.DictReader(lines)] == [f"{broken.name}/{RESULT}"]
    assert_same(aggregate(sweep), result)


def npz(**arrays: Any) -> bytes:
    """As a file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


FOUR = {"ms": np.ones(3), "round": np.arange(3), "order": np.arange(3), "stamp_s": np.ones(3)}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(npz(**FOUR)[:-30], id="cut_off"),
        pytest.param(npz(**FOUR).replace(b"\x00\x00\xf0?", b"\x00\x01\xf0?"), id="a_bit_flipped"),
        pytest.param(npz(**{**FOUR, "ms": np.ones(2)}), id="lengths_differ"),
        pytest.param(npz(**{**FOUR, "ms": np.ones((3, 1))}), id="two_dimensions"),
        pytest.param(npz(**{**FOUR, "round": np.ones(3)}), id="rounds_are_floats"),
        pytest.param(npz(**{**FOUR, "ms": np.array(["a", "b", "c"])}), id="text"),
        pytest.param(npz(**{**FOUR, "ms": np.array([1, 2, print], object)}), id="python_objects"),
        pytest.param(npz(ms=np.ones(3)), id="arrays_missing"),
    ],
)
def test_unreadable_samples_are_listed_and_the_record_stays(sweep: Path, content: bytes) -> None:
    """Nothing is unpickled."""
    broken = next(folder for folder in cells(sweep) if (folder / "samples.npz").exists())
    (broken / "samples.npz").write_bytes(content)
    result = aggregate(sweep)
    assert result.unreadable["path"].tolist() == [f"{broken.name}/samples.npz"] and len(result.runs) == N
    assert broken.name not in pq.read_table(sweep / "samples.parquet")["directory"].to_pylist()


@given(st.lists(st.floats(allow_nan=False, width=32)), st.booleans())
def test_samples_read_as_numpy_reads_them(ms: list[float], compressed: bool) -> None:
    """Written compressed or not, with or without `replicate`."""
    buffer = io.BytesIO()
    arrays = {"ms": np.array(ms, float), "stamp_s": np.array(ms, np.float32)}
    arrays |= {name: np.arange(len(ms), dtype=np.int32) for name in ("round", "order")}
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    read = read_samples(buffer.getvalue())
    assert read["replicate"].tolist() == [0] * len(ms)
    assert all(read[name].tolist() == array.tolist() for name, array in arrays.items())


def test_records_set_aside_and_a_broken_plan_are_listed(sweep: Path) -> None:
    """The defaults take the plan's place."""
    (cells(sweep)[0] / UNREADABLE).write_text("{")
    (sweep / "plan.json").write_text('{"schema": 1}')
    result = aggregate(sweep)
    assert sorted(result.unreadable["path"]) == sorted([f"{cells(sweep)[0].name}/{UNREADABLE}", "plan.json"])
    assert len(result.runs) == N and set(result.summary["anchor"]) == {"torch/grouped"}


PLAN = {"schema": 1, "name": "s", "commands": [], "compare": ["router"], "anchor": None, "cells": []}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([], id="a_list"),
        pytest.param({"schema": 1}, id="nothing_in_it"),
        pytest.param({**PLAN, "schema": 2}, id="another_schema"),
        pytest.param({**PLAN, "compare": "router"}, id="compare_is_text"),
        pytest.param({**PLAN, "compare": []}, id="compare_is_empty"),
        pytest.param({**PLAN, "anchor": "torch"}, id="anchor_is_text"),
        pytest.param({**PLAN, "commands": 7}, id="commands_is_a_number"),
        pytest.param({**PLAN, "cells": [3]}, id="a_cell_is_a_number"),
        pytest.param({**PLAN, "anchor": json.loads('{"a":' * 300 + "1" + "}" * 300)}, id="anchor_is_deep"),
    ],
)
def test_what_is_no_plan_stops_nothing(sweep: Path, content: Any) -> None:
    """Any JSON may stand there."""
    (sweep / "plan.json").write_text(json.dumps(content))
    assert aggregate(sweep).unreadable["path"].tolist() == ["plan.json"]


def test_nothing_to_aggregate_is_four_empty_tables(tmp_path: Path) -> None:
    """Each with its columns."""
    result = aggregate(tmp_path)
    for name in ("runs", "summary", "unreadable"):
        header = next(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines()))
        assert header == [column for column, kind in TABLES[name].items() if kind is not None]
    assert [len(frame) for frame in result] == [0, 0, 0]
    assert pq.read_table(tmp_path / "samples.parquet").num_rows == 0
    assert_same(aggregate(tmp_path), result)


def test_strange_records_are_rows(tmp_path: Path) -> None:
    """No latency, no configuration, a plug-in's options without a name and with keys and values of its own."""
    plug_in = {
        "model": {"_target_": "mine.Model", "sizes": [1, 2], "deep": {"er": None}},
        "router": {"_target_": "mine.Router", "x": 2**80},
        "export": {},
        "mine": "<script>",
    }
    other = {**plug_in, "router": {"_target_": "mine.Router", "x": "much", "only": 1}, "mine": {"a": 1}}
    records = {
        "a": tiny.record(),
        "b": tiny.record(tiny.decoder_moe(), status="failed", reason="crash: SIGSEGV"),
        "c": Record(status="ok", cell_id="c", code_id="c", config=plug_in, quality={"x": 1, "y": [{"z": 1}]}),
        "d": Record(status="ok", cell_id="d", code_id="d", config=other, elapsed_s=2**60 + 1, quality={"x": "one"}),
    }
    for name, record in records.items():
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
    runs, summary, unreadable = aggregate(tmp_path)
    assert unreadable.empty and len(runs) == len(summary) == 4
    assert runs["model"].tolist()[1:] == ["decoder_moe", "Model", "Model"] and pd.isna(runs["model"].iloc[0])
    assert runs["config.router.x"].tolist()[2:] == [str(2**80), "much"]
    assert runs["config.router.only"].dropna().tolist() == [1]
    assert runs["elapsed_s"].iloc[3] == float(2**60)
    assert runs["quality.x"].tolist()[2:] == ["1", "one"]
    assert set(runs["variant"].dropna()) >= {f"Router(x={2**80})", "Router(x=much, only=1)"}


def test_a_folders_name_may_be_no_text(sweep: Path) -> None:
    """Bytes that are no UTF-8 are escaped in the tables."""
    shutil.copytree(cells(sweep)[0], os.path.join(os.fsencode(sweep), b"caf\xe9").decode(errors="surrogateescape"))
    result = aggregate(sweep)
    assert "caf\\xe9" in result.runs["directory"].tolist()
    assert_same(aggregate(sweep), result)


def test_what_differs_between_records_is_a_column(tmp_path: Path) -> None:
    """A swept value, and not what only another model has."""
    runs = {
        "a": tiny.decoder_moe("model.top_k=1"),
        "b": tiny.decoder_moe("model.top_k=2", "model.n_kv_heads=2"),
        "c": tiny.moe_layer(),
    }
    for name, cfg in runs.items():
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, tiny.record(cfg, cell_id=name))
    frame = moe_lab.load(tmp_path)
    assert [name for name in frame if name.startswith("config.")] == ["config.model.n_kv_heads", "config.model.top_k"]
    assert frame["config.model.top_k"].tolist()[:2] == [1, 2] and pd.isna(frame["config.model.top_k"].iloc[2])


def test_records_that_are_no_runs_of_this_version_keep_their_columns(tmp_path: Path) -> None:
    """A field nobody documented has a column, at its place."""
    record = tiny.record(tiny.minimal(), throughput={"tokens_per_s": 1.0, "steps_per_s": 2.0}, quality={"b": 1})
    write_record(tmp_path, record)
    names = list(aggregate(tmp_path).runs)
    assert names[-1] == "throughput.steps_per_s"
    assert names.index("routing.worst.tile_waste_128") < names.index("quality.b") < names.index("roofline.flops")


# ---- again


def test_with_nothing_changed_nothing_is_written(sweep: Path) -> None:
    """The same tables are returned, from another path too."""
    result = aggregate(sweep)
    before = {path: path.stat() for path in sweep.iterdir()}
    assert_same(aggregate(Path(os.path.relpath(sweep))), result)
    assert {path: path.stat().st_mtime_ns for path in sweep.iterdir()} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    assert {path: path.stat().st_ino for path in sweep.iterdir()} == {
        path: status.st_ino for path, status in before.items()
    }


def _change_record(sweep: Path) -> None:
    edit(cells(sweep)[2], name="changed")


def _break_record(sweep: Path) -> None:
    (cells(sweep)[2] / RESULT).write_text("{")


def _remove_record(sweep: Path) -> None:
    shutil.rmtree(cells(sweep)[2])


def _add_record(sweep: Path) -> None:
    shutil.copytree(cells(sweep)[2], sweep / "another")


def _change_samples(sweep: Path) -> None:
    write_arrays(next(sweep.rglob("samples.npz")), FOUR)


def _change_routing(sweep: Path) -> None:
    routing = next(sweep.rglob("routing.npz"))
    with np.load(routing) as arrays:
        write_arrays(routing, {**arrays, "coactivation_LEE": arrays["coactivation_LEE"] + 1})


def _break_routing(sweep: Path) -> None:
    next(sweep.rglob("routing.npz")).write_bytes(b"PK")


def _break(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Turn one bit of an earlier table without a change of its stamp; and change something that makes it be read."""

    def act(sweep: Path) -> None:
        path = sweep / name
        status, whole = path.stat(), path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        change(sweep)

    return act


def _change_plan(sweep: Path) -> None:
    (sweep / "plan.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_change_record, id="a_record_changed"),
        pytest.param(_break_record, id="a_record_broke", marks=pytest.mark.slow),
        pytest.param(_remove_record, id="a_record_went", marks=pytest.mark.slow),
        pytest.param(_add_record, id="a_record_came"),
        pytest.param(_change_samples, id="samples_changed"),
        pytest.param(_change_routing, id="routing_changed"),
        pytest.param(_break_routing, id="routing_broke", marks=pytest.mark.slow),
        pytest.param(_break("coactivation.parquet", _change_routing), id="the_table_of_pairs_broke"),
        pytest.param(
            _break("samples.parquet", _change_samples), id="the_table_of_samples_broke_too", marks=pytest.mark.slow
        ),
        pytest.param(_break("runs.parquet", _change_record), id="the_table_of_runs_broke", marks=pytest.mark.slow),
        pytest.param(_change_plan, id="the_plan_went", marks=pytest.mark.slow),
        pytest.param(lambda sweep: (sweep / "runs.csv").unlink(), id="an_output_went", marks=pytest.mark.slow),
        pytest.param(
            lambda sweep: (sweep / "summary.csv").write_text("mine"), id="an_output_was_edited", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda sweep: (sweep / "samples.parquet").write_text("mine"),
            id="the_samples_table_broke",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda sweep: (sweep / CACHE).write_text("no Parquet"), id="foreign_cache"),
    ],
)
def test_an_incremental_aggregation_is_the_same_as_a_fresh_one(sweep: Path, tmp_path: Path, change: Any) -> None:
    """Byte for byte, whatever changed in between."""
    aggregate(sweep)
    change(sweep)
    result = aggregate(sweep)
    fresh = shutil.copytree(sweep, tmp_path / "fresh", ignore=shutil.ignore_patterns(CACHE, *OUTPUTS))
    assert_same(aggregate(fresh), result)
    assert contents(fresh) == contents(sweep)


def test_what_has_not_changed_is_not_read_again(sweep: Path) -> None:
    """Content changed behind an unchanged time stamp and size goes unseen; then another record makes it read anew."""
    aggregate(sweep)
    hidden, seen = cells(sweep)[:2]
    status = (hidden / RESULT).stat()
    (hidden / RESULT).write_bytes(b" " * status.st_size)
    os.utime(hidden / RESULT, ns=(status.st_atime_ns, status.st_mtime_ns))
    edit(seen, name="changed")
    result = aggregate(sweep)
    assert result.unreadable.empty and "changed" in result.runs["name"].tolist()
    (sweep / CACHE).unlink()
    assert len(aggregate(sweep).unreadable) == 1


def _of_other_code(table: Any) -> Any:
    """What that code took from the records is something else, too."""
    state = re.sub(rb'"code": "\w+"', b'"code": "0"', table.schema.metadata[b"moe_lab"])
    names = ["Another" for _ in range(table.num_rows)]
    forged = table.set_column(table.schema.names.index("name"), "name", pa.array(names, pa.string()))
    return forged.replace_schema_metadata({"moe_lab": state})


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda table: table.replace_schema_metadata({}), id="no_state"),
        pytest.param(lambda table: table.replace_schema_metadata({"moe_lab": "{}"}), id="empty_state"),
        pytest.param(lambda table: table.drop_columns(["cell_id"]), id="a_column_less"),
        pytest.param(lambda table: table.slice(0, 3), id="rows_missing"),
        pytest.param(
            lambda table: table.set_column(
                table.schema.names.index("batch"), "batch", pa.array(["1"] * table.num_rows, pa.string())
            ),
            id="a_column_of_another_type",
        ),
        pytest.param(_of_other_code, id="other_code"),
    ],
)
def test_a_cache_that_does_not_fit_is_ignored(sweep: Path, forge: Any) -> None:
    """One of another version, or made by hand."""
    aggregate(sweep)
    expected = contents(sweep)
    pq.write_table(forge(pq.read_table(sweep / CACHE)), sweep / CACHE)
    (sweep / "runs.csv").unlink()
    aggregate(sweep)
    assert contents(sweep) == expected


@pytest.mark.slow
def test_a_damaged_cache_is_ignored(sweep: Path) -> None:
    """One byte changed anywhere in its data."""
    aggregate(sweep)
    expected = contents(sweep)
    whole = (sweep / CACHE).read_bytes()
    for at in (whole.index(b"Synthetic"), *range(4, len(whole) - 8, len(whole) // 15)):
        (sweep / CACHE).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (sweep / "runs.csv").unlink()
        aggregate(sweep)
        assert contents(sweep) == expected


def test_samples_of_another_table_are_not_taken(sweep: Path) -> None:
    """It fits in all but its content."""
    aggregate(sweep)
    expected = contents(sweep)
    table = pq.read_table(sweep / "samples.parquet")
    zeros = pa.array(np.zeros(table.num_rows))
    pq.write_table(table.set_column(table.schema.names.index("ms"), "ms", zeros), sweep / "samples.parquet")
    aggregate(sweep)
    assert contents(sweep) == expected


# ---- writing


def test_a_folder_in_the_place_of_a_table_is_set_aside(sweep: Path) -> None:
    """With what is in it."""
    (sweep / "summary.csv" / "x").mkdir(parents=True)
    aggregate(sweep)
    assert all((sweep / name).is_file() for name in OUTPUTS)
    assert (sweep / "summary.unreadable.csv" / "x").is_dir()


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_tables_whole(sweep: Path) -> None:
    """No file may grow beyond a limit: the error names the first that would, and none is cut off."""
    aggregate(sweep)
    before = contents(sweep)
    edit(cells(sweep)[0], name="changed")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, "-B", "-m", "moe_lab", "report", "--tables", sweep]  # -B: nor may a module's byte code
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(sweep / OUTPUTS[0]) in done.stderr
    assert contents(sweep) == before
    assert not list(sweep.glob(".*.tmp"))


def test_aggregating_imports_no_torch(sweep: Path) -> None:
    """Results are read on machines without it."""
    code = "import sys, moe_lab.results.aggregate as a; a.aggregate(sys.argv[1]); print('torch' in sys.modules)"
    assert tiny.python(code, sweep).split() == ["False"]


# ---- the document


def documented(table: str) -> dict[str, str]:
    """Column -> type, as docs/results-format.md has them under the table's heading."""
    section = DOCUMENT.read_text().split(f"\n## {table}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([\w ]+) \| .*\S \|$", section, re.MULTILINE))


@pytest.mark.parametrize("model", quick.MODELS)
def test_every_column_of_a_real_run_is_documented(tmp_path: Path, model: str) -> None:
    """By its own name, or at a place that is not the last one for everything else."""
    moe_lab.run(quick.compose(model, "measure.roofline=true"), tmp_path / "cell")
    result = aggregate(tmp_path)
    assert result.unreadable.empty
    for table, names in (("runs", result.runs), ("summary", result.summary)):
        places = [name.removesuffix("*") for name in documented(table) if name.endswith(".*")]
        undocumented = [name for name in names if name not in documented(table)]
        assert not [name for name in undocumented if not name.startswith(tuple(places))]
    assert list(pq.read_schema(tmp_path / "samples.parquet").names) == list(documented("samples"))
    assert result.runs["latency_ms.n"].iloc[0] == pq.read_table(tmp_path / "samples.parquet").num_rows > 0
