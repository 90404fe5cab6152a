"""What every tracker is held to, with the real packages, read back from what they keep.

trackers/mlflow.py, trackers/trackio.py, trackers/wandb.py, trackers/tensorboard.py.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.config.trackers import TRACKERS
from moe_lab.errors import UnavailableError
from moe_lab.records import store
from moe_lab.trackers import notes, tracker
from moe_lab.trackers.mlflow import Mlflow
from tests.trackers import readers
from tests.trackers.made import Sweep

NAMES = [pytest.param(name, id=name) for name in TRACKERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_each_cell_once_whatever_was_noted(name: str, tmp_path: Path) -> None:
    """Sent, sent again without the notes, as after kill -9 before they were written, and sent with a newer record."""
    pytest.importorskip(name)
    sweep = Sweep(tmp_path)
    sweep.outbox(name).send(sweep.cells, sweep.say)
    first = readers.of(name, tmp_path)
    assert sorted(seen.cell_id for seen in first) == sweep.cell_ids()
    assert len({seen.parent for seen in first}) == 1 and first[0].parent
    for folder in sweep.cells:
        (folder / store.SENT).unlink()
    record = store.read_record(sweep.cells[1])
    assert record.latency_ms is not None
    record.latency_ms.p50 = 123.5
    store.write_record(sweep.cells[1], record)
    sweep.outbox(name).send(sweep.cells, sweep.say)
    seen = {one.cell_id: one for one in readers.of(name, tmp_path)}
    assert sorted(one.cell_id for one in readers.of(name, tmp_path)) == sweep.cell_ids()
    before = {one.cell_id: one for one in first}
    for folder in sweep.cells:
        record = store.read_record(folder)
        assert record.latency_ms is not None
        one = seen[record.cell_id]
        assert one.metrics["latency_ms.p50"] == pytest.approx(record.latency_ms.p50, rel=1e-6)
        assert one.metrics["latency_ms.ci95_low"] == pytest.approx(record.latency_ms.ci95_low, rel=1e-6)
        assert str(one.params["router.name"]) == record.config["router"]["name"]
        assert float(one.params["batch"]) == record.config["batch"]
        assert one.status == "ok"
        if "record.json" in one.files:
            assert json.loads(one.files["record.json"])["latency_ms"]["p50"] == record.latency_ms.p50
    assert seen[record.cell_id].metrics != before[record.cell_id].metrics
    assert sweep.said == [] and sweep.warnings() == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_tracker_has_the_files_of_the_sweep(name: str, tmp_path: Path) -> None:
    """Report, tables and plots; once, also if they are sent again."""
    pytest.importorskip(name)
    sweep = Sweep(tmp_path, 1)
    (sweep.directory / "plots").mkdir()
    for file in ("report.html", "runs.csv", "plots/load.svg"):
        (sweep.directory / file).write_text(file)
    sweep.outbox(name).send(sweep.cells, sweep.say)
    for _ in range(2):
        sweep.outbox(name).end(sweep.say, is_complete=True)
        (sweep.directory / store.SENT).write_text(json.dumps({"key": notes.key_of(sweep.directory), "sent": []}))
    assert sweep.said == []
    if name == "mlflow":
        ((status, files),) = readers.mlflow_sweeps(f"sqlite:///{tmp_path}/m.db").values()
        assert (status, files) == ("FINISHED", ["plots", "report.html", "runs.csv"])
    elif name == "wandb":
        (folder,) = tmp_path.glob("wandb/offline-run-*-sweep-*/files")
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} >= {
            "plots/load.svg",
            "report.html",
            "runs.csv",
        }
    else:
        blobs = [path.read_text() for path in (tmp_path / "trackio/artifacts").rglob("*") if path.is_file()]
        assert {"plots/load.svg", "report.html", "runs.csv"} <= set(blobs)
    assert [seen.cell_id for seen in readers.of(name, tmp_path)] == sweep.cell_ids()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        pytest.param("failed", "out_of_memory", id="failed"),
        pytest.param("skipped", "unavailable: no GPU", id="skipped"),
    ],
)
def test_a_row_without_a_measurement_is_sent_too(status: str, reason: str, tmp_path: Path) -> None:
    """With its status; what runs again, and what the sweep leaves out, is not."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path, 3)
    for folder, (as_status, as_reason) in zip(
        sweep.cells, [(status, reason), ("failed", "interrupted"), ("skipped", "excluded")], strict=True
    ):
        record = store.read_record(folder)
        record.status, record.reason, record.latency_ms = as_status, as_reason, None  # type: ignore[assignment]
        store.write_record(folder, record)
    sweep.outbox("tensorboard").send(sweep.cells, sweep.say)
    (seen,) = readers.of("tensorboard", tmp_path)
    assert seen.status == status and "latency_ms.p50" not in seen.metrics


@pytest.mark.slow
def test_mlflow_takes_what_is_too_long_and_oddly_named(tmp_path: Path) -> None:
    """A long parameter is cut and says so; more than a hundred are sent in parts."""
    pytest.importorskip("mlflow")
    sweep = Sweep(tmp_path, 1)
    record = store.read_record(sweep.cells[0])
    record.config["workload"]["path"] = "x" * 9000
    record.config["model"] |= {f"odd key+{number}": number for number in range(150)}
    record.phases_ms = {"dispatch+experts": 1.5}
    store.write_record(sweep.cells[0], record)
    sweep.outbox("mlflow").send(sweep.cells, sweep.say)
    assert sweep.said == [] and sweep.warnings() == [[]]
    (seen,) = readers.of("mlflow", tmp_path)
    assert seen.params["workload.path"].endswith("(cut; see record.json)")
    assert seen.params["model.odd key_149"] == "149" and seen.metrics["phases_ms.dispatch_experts"] == 1.5
    assert json.loads(seen.files["record.json"])["config"]["workload"]["path"] == "x" * 9000


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        pytest.param("https://me:secret@host:5000/path", "https://host:5000/path", id="user"),
        pytest.param("http://:secret@host", "http://host", id="no-user"),
        pytest.param("mysql+pymysql://host/db?password=secret", "mysql+pymysql://host/db", id="query"),
    ],
)
def test_a_destination_has_no_password(uri: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is written beside the records, which are shared."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Mlflow({"uri": None, "experiment": "e"}, tmp_path).destination == f"{place} e"


def test_a_destination_is_the_same_from_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative one is made absolute; a server of one's own is a place of its own."""
    monkeypatch.chdir(tmp_path)
    more = {"project": "p", "entity": None, "dir": "d"}
    for name in ("tensorboard", "trackio", "wandb"):
        made = tracker.make(name, {**more, "mode": "offline"}, tmp_path)
        assert made.destination.split()[0] == str(tmp_path / "d")
        assert made.keeps is not None and made.keeps.is_relative_to(tmp_path / "d")
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:secret@host")
    made = tracker.make("wandb", {**more, "mode": "online"}, tmp_path)
    assert (made.destination, made.keeps) == ("http://host online p", None)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        pytest.param({"HOME": "home"}, "home/.cache/huggingface/trackio", id="home"),
        pytest.param({"HOME": "home", "XDG_CACHE_HOME": "x"}, "x/huggingface/trackio", id="caches"),
        pytest.param({"XDG_CACHE_HOME": "x", "HF_HOME": "hf"}, "hf/trackio", id="hugging-face"),
        pytest.param({"HOME": "home", "HF_HOME": "~/hf"}, "home/hf/trackio", id="tilde"),
        pytest.param({"HF_HOME": "hf", "TRACKIO_DIR": "own"}, "own", id="its-own"),
    ],
)
def test_trackio_keeps_its_runs_where_it_does_by_itself(
    variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a default folder that is gone is seen, too. Where trackio is installed it is asked."""
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value if value.startswith("~") else str(tmp_path / value))
    made = tracker.make("trackio", {"project": "p", "dir": None}, tmp_path)
    assert (made.keeps, made.destination) == (tmp_path / place, f"{tmp_path / place} p")
    if importlib.util.find_spec("trackio") is not None:
        ask = [sys.executable, "-c", "from trackio.utils import TRACKIO_DIR as place; print(place)"]
        assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == str(made.keeps)


@pytest.mark.slow
def test_a_default_folder_that_cannot_be_written_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is sent, with the keys that choose another."""
    pytest.importorskip("trackio")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    sweep = Sweep(tmp_path)
    sweep.outbox("trackio", dir=None).begin(sweep.say)
    (line,) = sweep.said
    why = (
        f"OSError: {tmp_path}/file/trackio cannot be written (Not a directory); set tracker.trackio.dir or TRACKIO_DIR"
    )
    assert line == f"not sent to trackio: {why}; tried again at the end"


def test_mlflow_keeps_a_file_or_a_folder_or_is_elsewhere(tmp_path: Path) -> None:
    """Which its address says."""

    def keeps(uri: str) -> Path | None:
        return Mlflow({"uri": uri, "experiment": "e"}, tmp_path).keeps

    assert keeps(f"sqlite:///{tmp_path}/m.db?timeout=5") == tmp_path / "m.db"
    assert keeps((tmp_path / "ml runs").as_uri()) == tmp_path / "ml runs"
    assert keeps("http://host") is None


def test_a_variable_that_is_no_address_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its name and the remedy."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@[x")
    with pytest.raises(
        ValueError, match=r"^MLFLOW_TRACKING_URI: is not an address; set one such as http://host:5000\.$"
    ):
        Mlflow({"uri": None, "experiment": "e"}, tmp_path)


def test_a_tracker_that_is_not_installed_is_said_in_a_line(tmp_path: Path) -> None:
    """With the remedy."""
    made = tracker.make("tensorboard", {"dir": None}, tmp_path)
    made.needs = ("tensorboard_of_nobody", "json")
    with pytest.raises(UnavailableError, match=r"tracker=tensorboard: needs tensorboard_of_nobody; pip install 'moe"):
        tracker.require_installed("tensorboard", made)
