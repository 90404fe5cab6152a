"""benchmarks/expert_verdicts.py: who is ahead, of rows made by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import expert_verdicts as module

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


def found(*folders: Path) -> pd.Series:
    ran = module.joined(pd.concat([module.cells(folder) for folder in folders]))
    rows = module.verdicts(ran, PEERS, module.witness(ran, PEERS))
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
