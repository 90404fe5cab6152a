"""results/compare.py: two result sets, cell by cell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from moe_lab.cli.compare import summary, to_markdown
from moe_lab.cli.table import print_sweep
from moe_lab.measure import statistics
from moe_lab.records import identity
from moe_lab.records.schema import Record
from moe_lab.records.store import RESULT
from moe_lab.results import numbers
from moe_lab.results.aggregate import aggregate
from moe_lab.results.compare import COLUMNS, compare
from moe_lab.results.noise import write_floor
from tests import tiny
from tests.results.compared import HERE, QUIET, THERE, five_cells, record, tiny_config, write


def row(tmp_path: Path, a: list[Record], b: list[Record], **options: Any) -> pd.Series:
    """The one row that comparing these records gives."""
    frame = compare(write(tmp_path / "a", *a), write(tmp_path / "b", *b), **{"floors": {}, **options})
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return five_cells(tmp_path)


def test_one_row_per_cell_with_names_numbers_and_verdict(sets: tuple[Path, Path]) -> None:
    """Joined by cell_id, wherever the cell lies in its folder."""
    frame = compare(*sets, floors={})
    assert tuple(frame.columns) == COLUMNS
    assert dict(zip(frame["batch"], frame["verdict"], strict=True)) == {
        1: "slower",
        2: "faster",
        4: "same",
        8: "only in A",
        16: "failed in B",
    }
    first = frame.iloc[0]
    assert first["cell_id"] == identity.cell_id({**tiny_config(), "batch": 1})
    names = ["moe_layer", "sinkhorn", "auto", "fp32", "cpu", "eager", tiny.T]
    assert first[["model", "router", "experts", "dtype", "device", "execution", "seq_len"]].tolist() == names
    assert first[["p50_a_ms", "p50_b_ms", "ratio"]].tolist() == pytest.approx([1.0, 1.2, 1.2], rel=1e-5)
    assert first["ratio_low"] < 1.2 < first["ratio_high"]
    assert (first["replicates_a"], first["replicates_b"], frame["replicates_b"].iloc[3]) == (3, 3, 0)
    assert "out_of_memory" in frame["why"].iloc[4]
    assert frame[["ratio", "p50_b_ms"]].iloc[3:].isna().all(axis=None)


def test_the_sides_mirror(sets: tuple[Path, Path]) -> None:
    """Compare(B, A): verdicts and sides exchanged, ratios inverted."""
    there, back = (compare(*pair, floors={}).set_index("cell_id") for pair in (sets, sets[::-1]))
    back = back.loc[there.index]
    mirror = {"slower": "faster", "faster": "slower", "only in A": "only in B", "failed in B": "failed in A"}
    assert back["verdict"].tolist() == [mirror.get(verdict, verdict) for verdict in there["verdict"]]
    assert (back["ratio"] * there["ratio"]).dropna().tolist() == pytest.approx([1, 1, 1])
    assert (back["ratio_low"] * there["ratio_high"]).dropna().tolist() == pytest.approx([1, 1, 1])
    assert back["p50_a_ms"].equals(there["p50_b_ms"].rename("p50_a_ms"))


@pytest.mark.slow
def test_two_sets_of_the_same_rarely_differ(tmp_path: Path) -> None:
    """A/A: 1000 cells, three replicates, 4 % of noise between processes; slower or faster in under 5 %."""
    rng = np.random.default_rng(5)
    sides = [
        write(tmp_path / side, *(record(*np.exp(rng.normal(0, 0.04, 3)), cell_id=f"{cell}") for cell in range(1000)))
        for side in "ab"
    ]
    verdicts = compare(*sides, floors={})["verdict"]
    assert len(verdicts) == 1000 and verdicts.isin(["slower", "faster"]).sum() < 50


def test_a_tenth_is_found(tmp_path: Path) -> None:
    """100 cells, 10 % slower, three replicates with 1 % of noise: nearly all."""
    rng = np.random.default_rng(6)
    sides = [
        write(
            tmp_path / side,
            *(record(*ratio * np.exp(rng.normal(0, 0.01, 3)), cell_id=f"{cell}") for cell in range(100)),
        )
        for side, ratio in (("a", 1.0), ("b", 1.1))
    ]
    assert (compare(*sides, floors={})["verdict"] == "slower").sum() >= 95


def test_what_the_model_does_not_read_is_no_name(tmp_path: Path) -> None:
    """model=minimal has no router."""
    config = OmegaConf.to_container(tiny.minimal(), resolve=True)
    only = row(tmp_path, [record(1.0, config=config)], [record(1.0, config=config)])
    assert only["router"] is None and only["seq_len"] is None and only["model"] == "minimal"


def test_cells_of_the_same_names_are_told_apart(tmp_path: Path) -> None:
    """By the keys of the configuration that differ, also nested ones."""
    shape = tiny_config()["model"]["shape"]
    changes: list[dict[str, Any]] = [
        {"router": {**tiny_config()["router"], "iters": 5}},
        {
            "router": {**tiny_config()["router"], "iters": 6},
            "model": {**tiny_config()["model"], "shape": {**shape, "top_k": 1}},
        },
        {"batch": 77},
    ]
    records = [record(*QUIET, config=change) for change in changes]
    frame = compare(write(tmp_path / "a", *records), write(tmp_path / "b", *records), floors={})
    assert [set(also.split()) for also in frame["also"]] == [
        {"router.iters=5", f"model.shape.top_k={tiny.K}"},
        {"router.iters=6", "model.shape.top_k=1"},
        set(),
    ]


@pytest.mark.parametrize("replicates", [pytest.param(n, id=f"{n}_processes") for n in (1, 2, 3, 5)])
def test_every_table_shows_the_same_median(tmp_path: Path, replicates: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of processes that differ much and have different numbers of samples; compare, the sweep's table, page and CSV."""
    rng = np.random.default_rng(replicates)
    blocks = [
        base * rng.lognormal(0, 0.2, 5 + 40 * at) for at, base in enumerate([1.0, 3.0, 2.0, 9.0, 4.0][:replicates])
    ]
    latency = statistics.summarize(np.concatenate(blocks), 0.02, blocks)
    assert latency.p50 == pytest.approx(np.exp(np.mean([np.log(np.median(block)) for block in blocks])))
    assert replicates == 1 or latency.p50 != pytest.approx(np.median(np.concatenate(blocks)), rel=1e-3)
    made = record(1.0, latency_ms=latency)
    found = row(tmp_path, [made], [made])
    assert found["p50_a_ms"] == found["p50_b_ms"] == latency.p50
    assert aggregate(tmp_path / "a").runs["latency_ms.p50"].tolist() == [latency.p50]
    print_sweep([made], ("router",))
    assert numbers.with_interval(latency.p50, latency.ci95_low, latency.ci95_high, " ms") in capsys.readouterr().out


def test_an_older_record_has_the_median_that_it_says(tmp_path: Path) -> None:
    """0.1 took the median of all samples together; the table shows that, and so does this."""
    older = record(1.0, 3.0, 8.0)
    assert older.latency_ms is not None
    older.latency_ms.p50 = 2.5
    found = row(tmp_path, [older], [older])
    assert (found["p50_a_ms"], found["ratio"]) == (2.5, 1)


@pytest.mark.parametrize("sides", [pytest.param(sides, id=sides or "none") for sides in ("", "A", "B", "A and B")])
def test_what_is_not_stable_is_said_with_the_verdict(tmp_path: Path, sides: str) -> None:
    """In the same cell of the table, in its note, and in the summary."""
    made = {side: record(*(QUIET if side == "A" else np.multiply(QUIET, 1.2))) for side in "AB"}
    for side, one in made.items():
        assert one.latency_ms is not None
        one.latency_ms.stable = side not in sides.split(" and ")
    frame = compare(write(tmp_path / "a", made["A"]), write(tmp_path / "b", made["B"]), floors={})
    found = frame.iloc[0]
    assert (found["verdict"], found["unstable"]) == ("slower", sides)
    assert (f"the latency is not stable in {sides}" in found["why"]) == bool(sides)
    text = to_markdown(frame)
    assert (f"| slower (unstable: {sides}) |" in text) == bool(sides)
    assert ("1 slower (1 with unstable latencies)" in summary(frame)) == bool(sides)


def test_a_record_without_replicates_counts_by_its_median(tmp_path: Path) -> None:
    """Older records have an empty list."""
    older = record(2.0)
    assert older.latency_ms is not None
    older.latency_ms.replicate_p50 = []
    only = row(tmp_path, [older], [record(3.0)])
    assert (only["p50_a_ms"], only["replicates_a"]) == (2.0, 1) and only["ratio"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        pytest.param({"status": "failed", "reason": "crash: SIGSEGV"}, None, "failed in A", id="failed_in_a"),
        pytest.param(None, {"status": "skipped", "reason": "excluded"}, "skipped in B", id="skipped_in_b"),
        pytest.param({"status": "failed"}, {"status": "failed"}, "failed in both", id="failed_in_both"),
        pytest.param({"status": "failed"}, {"status": "skipped"}, "failed in A, skipped in B", id="each_its_own"),
        pytest.param({"status": "ok"}, None, "not timed in A", id="not_timed"),
    ],
)
def test_only_what_is_ok_on_both_sides_is_judged(
    tmp_path: Path, a: dict[str, Any] | None, b: dict[str, Any] | None, verdict: str
) -> None:
    """Whatever latency a failed record may hold."""
    records = [record(*QUIET) if fields is None else record(**fields) for fields in (a, b)]
    for one in records:
        if one.status == "failed":
            one.latency_ms = record(*QUIET).latency_ms
    only = row(tmp_path, [records[0]], [records[1]])
    assert only["verdict"] == verdict
    assert np.isnan(only["ratio"])
    assert all((fields or {}).get("reason", "") in only["why"] for fields in (a, b))


def test_results_of_one_cell_are_pooled(tmp_path: Path) -> None:
    """Replicates in separate folders: three of one median are as good as one of three, and it is said."""
    a = [record(median, started=f"day {day}") for day, median in enumerate(QUIET)]
    apart = row(tmp_path / "x", a, [record(*(1.2 * x for x in QUIET))])
    together = row(tmp_path / "y", [record(*QUIET)], [record(*(1.2 * x for x in QUIET))])
    assert apart["verdict"] == "slower" and apart["replicates_a"] == 3
    assert apart["ratio_low"] == pytest.approx(together["ratio_low"])
    assert "3 results pooled in A" in apart["why"] and "pooled" not in together["why"]
    assert "versions" not in apart["why"]


def test_pooled_versions_of_the_code_are_named(tmp_path: Path) -> None:
    """A stale result beside its successor is still a result, but not quietly."""
    b = [record(1.0), record(1.1, code_id="2" * 12)]
    assert "2 results pooled in B, from 2 code versions" in row(tmp_path, [record(1.0)], b)["why"]


def test_a_copy_is_no_replicate(tmp_path: Path) -> None:
    """Copied on both sides it would have an interval of no width."""
    only = row(tmp_path, [record(1.0)] * 2, [record(1.2)] * 2)
    assert (only["verdict"], only["replicates_a"], only["replicates_b"]) == ("inconclusive", 1, 1)
    assert "copies in A" in only["why"] and "copies in B" in only["why"]


def test_a_record_is_not_compared_with_itself(tmp_path: Path) -> None:
    """A wrong folder must not pass for no change."""
    only = row(tmp_path, [record(*QUIET, started="now")], [record(*QUIET, started="now")])
    assert only["verdict"] == "inconclusive" and "a record of A is in B too" in only["why"]
    assert row(tmp_path / "x", [record(*QUIET, started="now")], [record(*QUIET, started="later")])["verdict"] == "same"


def test_a_failure_beside_a_success_is_told(tmp_path: Path) -> None:
    """The cell is judged by what was timed."""
    failed = record(status="failed", reason="timeout: verify")
    only = row(tmp_path, [failed, record(*QUIET)], [record(*QUIET)])
    assert only["verdict"] == "same" and "A: timeout: verify" in only["why"]


BROKEN = [
    pytest.param("", id="empty"),
    pytest.param("[1]", id="no_record"),
    pytest.param("[" * 100_000, id="too_deep"),
    pytest.param(json.dumps({**tiny.record().to_dict(), "config": {"model": 3}}), id="strange_configuration"),
    *(
        pytest.param(json.dumps({**record(1.0).to_dict(), key: value}), id=f"{key}_{type(value).__name__}")
        for key, value in {
            "cell_id": [],
            "status": "great",
            "env_id": 7,
            "environment": [],
            "implementation": None,
            "latency_ms": 5,
        }.items()
    ),
    *(
        pytest.param(json.dumps(record(*medians).to_dict()), id=f"medians_{position}")
        for position, medians in enumerate([(0.0,), (-1.0, 1.0), (float("inf"),), (float("nan"), 1.0)])
    ),
]


@pytest.mark.parametrize("text", BROKEN)
def test_what_cannot_be_read_is_a_row_and_stops_nothing(tmp_path: Path, text: str) -> None:
    """It names its side and its file."""
    a, b = write(tmp_path / "a", record(*QUIET)), write(tmp_path / "b", record(*QUIET))
    broken = b / "0" / RESULT
    broken.parent.mkdir()
    broken.write_text(text)
    frame = compare(a, b, floors={})
    assert frame["verdict"].tolist() == ["same", "unreadable in B"]
    assert str(broken) in frame["why"].iloc[1] and pd.isna(frame["cell_id"].iloc[1])


def test_another_machine_joins_and_is_named(tmp_path: Path) -> None:
    """What differs stands in `why`; a floor of one machine is none of the pair."""
    a = record(1.0, environment={"device_name": "A100", "torch": "2.11", "git_sha": "x"})
    b = record(1.5, environment={"device_name": "H100", "torch": "2.11", "git_sha": "y"}, env_id=THERE)
    only = row(tmp_path / "one", [a], [b], floors={HERE: 0.01, THERE: 0.01})
    assert only["verdict"] == "inconclusive"
    assert "machines differ: device_name A100 in A and H100 in B" in only["why"]
    assert not re.search("torch|git_sha|doctor", only["why"])
    replicated = [record(*QUIET), record(*(1.5 * x for x in QUIET), env_id=THERE)]
    assert row(tmp_path / "three", replicated[:1], replicated[1:])["verdict"] == "slower"


def test_two_machines_pooled_in_one_set_are_named(tmp_path: Path) -> None:
    """Even if the other set pools the same two."""
    pair = [record(x, environment={"cpu": x}, env_id=machine) for x, machine in ((1.0, HERE), (1.1, THERE))]
    assert "cpu 1.0/1.1 in A and 1.0/1.1 in B" in row(tmp_path, pair, pair, floors={HERE: 0.01})["why"]


def test_another_implementation_is_named(tmp_path: Path) -> None:
    """`auto` may have chosen otherwise: a reason for a difference."""
    a, b = (record(*QUIET, implementation={"router": "torch", "segment_mm": name}) for name in ("loop", "grouped_mm"))
    assert "different kernels ran: segment_mm loop in A and grouped_mm in B" in row(tmp_path, [a], [b])["why"]


def test_another_way_of_timing_is_not_comparable(tmp_path: Path) -> None:
    """`measure.cache` is no part of the cell_id, yet changes what a latency means."""
    only = row(tmp_path, [record(*QUIET)], [record(*(2 * x for x in QUIET), cache="cold")])
    assert only["verdict"] == "inconclusive" and "measure.cache natural in A and cold in B" in only["why"]


@pytest.mark.parametrize(
    ("floors", "verdict"),
    [
        pytest.param({HERE: 0.07}, "slower", id="beyond_the_floor"),
        pytest.param({HERE: 0.2}, "inconclusive", id="within_the_floor"),
        pytest.param({THERE: 0.01}, "inconclusive", id="floor_of_another_machine"),
    ],
)
def test_one_replicate_is_judged_by_the_floor_of_its_machine(
    tmp_path: Path, floors: dict[str, float], verdict: str
) -> None:
    """Where there is none, `why` says how to measure it."""
    only = row(tmp_path, [record(1.0)], [record(1.1)], floors=floors)
    assert only["verdict"] == verdict
    assert ("moe-lab doctor --noise" in only["why"]) == (HERE not in floors)
    assert np.isnan(only["ratio_low"])


def test_stored_floors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless others are given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_floor(HERE, {"floor": 0.05, "runs": 8})
    assert row(tmp_path / "x", [record(1.0)], [record(1.1)], floors=None)["verdict"] == "slower"
    assert row(tmp_path / "y", [record(1.0)], [record(1.1)], floors={})["verdict"] == "inconclusive"


@pytest.mark.parametrize("threshold", [pytest.param(x, id=str(x)) for x in (0, 1, -0.1, 3.0, float("nan"))])
def test_a_threshold_out_of_range_is_a_mistake(sets: tuple[Path, Path], threshold: float) -> None:
    """3 is more likely 3 % than 300 %."""
    with pytest.raises(ValueError, match=f"threshold={threshold}: .*0.03 or 3%"):
        compare(*sets, threshold=threshold, floors={})


def test_the_threshold_moves_the_verdict(sets: tuple[Path, Path]) -> None:
    """20 % is within 25 %."""
    assert compare(*sets, threshold=0.25, floors={})["verdict"].tolist()[:3] == ["same", "same", "same"]


def test_real_records_compare(tmp_path: Path) -> None:
    """A record as a run writes it, copied: the same medians, one replicate."""
    import moe_lab
    from tests import quick

    for side in "ab":
        assert moe_lab.run(quick.compose("decoder_moe"), tmp_path / side / "cell").status == "ok"
    only = compare(tmp_path / "a", tmp_path / "b", floors={}).iloc[0]
    assert only["verdict"] == "inconclusive" and only["ratio"] > 0
    assert not re.search("machines differ|different kernels ran", only["why"])


OLD = {"code_id": "3" * 12, "environment": {"moe_lab": "0.1.0"}}
NEW = {"code_id": "4" * 12, "environment": {"moe_lab": "0.2.0"}}


def earlier(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny layer's model as an earlier version wrote it: the number of experts beside the shape."""
    shape = {**config["model"]["shape"]}
    return {"model": {**config["model"], "n_experts": shape.pop("n_experts"), "shape": shape}}


def test_cells_whose_ids_changed_between_versions_are_one_line(tmp_path: Path) -> None:
    """Two batches, each in both sets, under other keys; a table that calls all missing would mislead."""
    batches = [{"batch": batch} for batch in (1, 2)]
    a = [record(*QUIET, config={**earlier(tiny_config()), **batch}, **OLD) for batch in batches]
    b = [record(*QUIET, config=batch, **NEW) for batch in batches]
    for sides, versions in (((a, b), "0.1.0 and 0.2.0"), ((b, a), "0.2.0 and 0.1.0")):
        folders = [write(tmp_path / versions / name, *side) for name, side in zip("ab", sides, strict=True)]
        with pytest.raises(
            ValueError, match=f"have no cell in common: cell_ids changed between moe-lab {versions}"
        ) as told:
            compare(*folders, floors={})
        assert "model.n_experts only in" in str(told.value) and "model.shape.n_experts only in" in str(told.value)
        assert "\n" not in str(told.value) and "measure the older one again" in str(told.value)


def test_ids_that_changed_without_a_key_are_told_too(tmp_path: Path) -> None:
    """The same configuration, another hash; the versions may have one number."""
    a = write(tmp_path / "a", record(*QUIET, cell_id="a" * 12, code_id="3" * 12))
    b = write(tmp_path / "b", record(*QUIET, cell_id="b" * 12, code_id="4" * 12))
    with pytest.raises(ValueError, match=r"code_id 333333333333\) and .*code_id 444444444444\) \(see CHANGELOG\)"):
        compare(a, b, floors={})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param({**OLD}, {**NEW, "config": {"batch": 3}}, id="another_size"),
        pytest.param({**OLD}, {**NEW, "config": {"seed": 3}}, id="another_seed"),
        pytest.param({**OLD}, {**NEW, "config": {"workload": {"name": "text", "other": 1}}}, id="another_workload"),
        pytest.param({**OLD, "config": earlier(tiny_config())}, {**OLD}, id="the_same_code"),
    ],
)
def test_other_cells_are_missing_and_no_change_of_ids(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Different cells of two versions, or of one."""
    frame = compare(write(tmp_path / "a", record(*QUIET, **a)), write(tmp_path / "b", record(*QUIET, **b)), floors={})
    assert frame["verdict"].tolist() == ["only in A", "only in B"]


def test_one_cell_in_both_is_compared(tmp_path: Path) -> None:
    """However many others have other ids."""
    same = {"model": {**tiny_config()["model"], "name": "kept"}}
    a = write(tmp_path / "a", record(*QUIET, config=same, **OLD), record(*QUIET, config=earlier(tiny_config()), **OLD))
    b = write(tmp_path / "b", record(*QUIET, config=same, **NEW), record(*QUIET, **NEW))
    assert compare(a, b, floors={})["verdict"].tolist() == ["same", "only in A", "only in B"]
