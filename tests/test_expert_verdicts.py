"""benchmarks/expert_verdicts.py: who is ahead, of rows made by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import expert_verdicts as module
from tests import tiny

SHAPE = {"config.model.shape.name": "olmoe_1b_7b", "seq_len": 64, "status": "ok", "roofline.floor_ms": 0.5}
PEERS = pd.DataFrame(
    [("olmoe_1b_7b", 64, "vllm", 1.0), ("olmoe_1b_7b", 64, "sonic", 3.0), ("olmoe_1b_7b", 64, "old", 5.0)],
    columns=["shape", "tokens", "peer", "ms"],
)


def sweep(folder: Path, ours: float, vllm: float, *, load: str | None = None) -> Path:
    """A folder with the runs of `auto`, of vllm beside it and of one that failed."""
    ratio = vllm / ours
    rows = [
        {"experts": "auto", "ms": ours},
        {"experts": "vllm", "ms": vllm, "ratio": ratio},
        {"experts": "grouped", "ms": 0.01, "ratio": 0.01 / ours},
        {"experts": "deepgemm", "ms": 0.01, "ratio": 0.01, "status": "failed"},
    ]
    runs = [
        SHAPE
        | {"config.workload.load": load, "experts": row["experts"], "status": row.get("status", "ok")}
        | {f"latency_ms.{key}": row["ms"] for key in ("p50", "ci95_low", "ci95_high")}
        | {
            f"ratio_to_anchor.{key}": row["ratio"] * share if "ratio" in row else None
            for key, share in (("p50", 1), ("ci95_low", 0.995), ("ci95_high", 1.005))
        }
        for row in rows
    ]
    folder.mkdir()
    pd.DataFrame(runs).to_csv(folder / "runs.csv")
    return folder


def found(*folders: Path, peers: pd.DataFrame = PEERS, more: pd.DataFrame | None = None) -> pd.Series:
    ran = module.read([*folders])
    rows = module.verdicts(ran, peers, module.witness(ran, peers), more)
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        pytest.param(1.9, "ahead", id="ahead"),
        pytest.param(2.0, "level", id="level"),
        pytest.param(2.1, "behind", id="behind"),
    ],
)
def test_the_peer_beside_decides(tmp_path: Path, ours: float, verdict: str) -> None:
    """By the worse end of its interval; neither our own nor what failed is a peer."""
    row = found(sweep(tmp_path / "one", ours, 2.0))
    assert (row.verdict, row.beside) == (verdict, "vllm")
    assert row.over_beside == pytest.approx(ours / 2)
    assert row.over_floor == pytest.approx(ours / 0.5)


def test_peers_of_another_day_are_scaled_by_the_witness(tmp_path: Path) -> None:
    """vLLM took twice what it did that day, so sonic is taken to need 6."""
    row = found(sweep(tmp_path / "one", 1.0, 2.0))
    assert (row.absent, row.over_absent) == ("sonic", pytest.approx(1 / 6))
    row = found(sweep(tmp_path / "two", 1.9, 0.5, load="zipf"))
    assert pd.isna(row.over_absent)  # they were measured with the native load


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [
        pytest.param(3.0, "ahead", id="far"),
        pytest.param(1.0, "unknown", id="within what the scale may be off by"),
        pytest.param(0.4, "behind", id="far behind"),
    ],
)
def test_what_only_the_scale_decides_is_unknown(tmp_path: Path, ms: float, verdict: str) -> None:
    """Of two witnesses one took as long as that day, the other half as long."""
    day = [("olmoe_1b_7b", 64, "vllm", 2.0), ("olmoe_1b_7b", 64, "sonic", ms), ("demo", 64, "vllm", 2.0)]
    peers = pd.DataFrame(day, columns=PEERS.columns)
    folder = sweep(tmp_path / "one", 0.8, 2.0)
    runs = pd.read_csv(folder / "runs.csv")
    other = runs[runs.experts == "vllm"].assign(**{"config.model.shape.name": "demo", "latency_ms.p50": 1.0})
    pd.concat([runs, other]).to_csv(folder / "runs.csv")
    row = found(folder, peers=peers)
    assert (row.verdict, row.absent) == (verdict, "sonic")
    assert row.over_absent == pytest.approx(0.8 / (ms * 0.5**0.5))
    assert (row.over_absent_low, row.over_absent_high) == pytest.approx((0.8 / ms, 1.6 / ms))


@pytest.mark.parametrize(
    ("low", "verdict"),
    [pytest.param(0.95, "behind", id="interval"), pytest.param(None, "ahead", id="no interval: the median")],
)
def test_peers_of_other_sweeps_stand_beside(tmp_path: Path, low: float | None, verdict: str) -> None:
    """In the ratio to their own `auto`; the table then has nothing to say of them."""
    columns = ["shape", "load", "tokens", "experts", "ms", "ratio", "ratio_low"]
    rows = [("olmoe_1b_7b", "native", 64, "sonic tuned", 1.2, 1.05, low)]
    row = found(sweep(tmp_path / "one", 1.0, 2.0), more=pd.DataFrame(rows, columns=columns))
    assert (row.verdict, row.beside, row.absent) == (verdict, "sonic tuned", "old")
    assert row.over_beside == pytest.approx(1 / 1.05) and row.over_beside_high == pytest.approx(1 / (low or 1.05))


def test_the_page_says_what_its_tables_come_to() -> None:
    """By the command that it names, of the files beside it."""
    folder = tiny.ROOT / "docs/results/h200"
    ran, peers = pd.read_csv(folder / "experts.csv"), pd.read_csv(folder / "expert_peers.csv")
    more = pd.concat([pd.read_csv(folder / f"experts_{name}.csv") for name in ("flashinfer", "sonic")])
    rows = module.verdicts(ran, peers, module.witness(ran, peers), more)
    committed = pd.read_csv(folder / "expert_verdicts.csv")
    assert rows.verdict.tolist() == committed.verdict.tolist() and len(rows) == 30
    of = rows.verdict.value_counts()
    real = module.mean_of(rows[rows["shape"] != "demo"])
    page = " ".join((folder / "experts.md").read_text().split())
    assert f"{of['ahead']} cells are ahead, {of['level']} level, {of['behind']} behind" in page
    assert f"over the 24 cells of real shapes, is {real:.3f}" in page
    readme = " ".join((tiny.ROOT / "README.md").read_text().split())
    assert f"ahead of every peer in {of['ahead']}, level in {of['level']} and behind in {of['behind']}" in readme


def test_processes_are_joined(tmp_path: Path) -> None:
    """The median, and an interval over all."""
    row = found(*(sweep(tmp_path / name, ours, 2.0) for name, ours in (("a", 1.0), ("b", 1.2), ("c", 1.9))))
    assert (row.ms, row.ms_low, row.ms_high, row.processes) == (1.2, 1.0, 1.9, 3)
    assert row.over_beside_high == pytest.approx(1.9 / 2 / 0.995)


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no runs\.csv; give the folder of a finished sweep"):
        module.cells(tmp_path)


def test_the_table_of_peers_can_be_read() -> None:
    peers = pd.read_csv(Path(__file__).parents[1] / "docs/results/h200/expert_peers.csv")
    assert set(peers.columns) >= {"shape", "tokens", "peer", "ms"}
    assert (peers.ms > 0).all()
    assert not peers.duplicated(["shape", "tokens", "peer"]).any()
