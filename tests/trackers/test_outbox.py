"""trackers/outbox.py: when and whether records are sent; a tracker that is down, hangs or refuses."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from moe_lab.config.trackers import TRACKERS
from moe_lab.records import store
from moe_lab.trackers import notes
from moe_lab.trackers.outbox import Outbox
from moe_lab.trackers.sender import Job, LostError, Sender
from tests.trackers import readers
from tests.trackers.made import Sweep


@contextmanager
def silent_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that accepts and never answers; its URI and the connections it has."""
    taken: list[socket.socket] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        server.shutdown(socket.SHUT_RDWR)


def test_nothing_is_started_without_a_tracker_or_anything_to_send(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is written."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path)
    before = sorted(path.name for path in sweep.directory.iterdir())
    monkeypatch.setattr(Sender, "__enter__", lambda *_: pytest.fail("started"))
    for settings in ({}, None):
        outbox = Outbox(settings, sweep.directory, is_sweep=True)
        outbox.begin(sweep.say)
        outbox.send(sweep.cells, sweep.say)
        outbox.end(sweep.say, is_complete=True)
    sweep.outbox("tensorboard").send([], sweep.say)
    assert sorted(path.name for path in sweep.directory.iterdir()) == before
    assert sweep.said == []


@pytest.mark.slow
def test_what_was_sent_is_not_sent_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what is new starts a process."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path, 3)
    sweep.outbox("tensorboard").send(sweep.cells[:2], sweep.say)
    jobs = []
    enter = Sender.__enter__
    monkeypatch.setattr(Sender, "__enter__", lambda self: (jobs.append(self._job), enter(self))[1])
    sweep.outbox("tensorboard").send(sweep.cells[:2], sweep.say)
    assert jobs == []
    sweep.outbox("tensorboard").send(sweep.cells, sweep.say)
    assert [cell.record["cell_id"] for cell in jobs[0].cells] == [store.read_record(sweep.cells[2]).cell_id]
    assert sorted(seen.cell_id for seen in readers.of("tensorboard", tmp_path)) == sweep.cell_ids()


def test_a_tracker_that_failed_is_a_warning_in_each_row_until_it_has_them(tmp_path: Path) -> None:
    """It is left alone until the end; then all is sent, and the warnings go. The records are otherwise the same."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path)
    before = [store.read_record(folder).to_dict() for folder in sweep.cells]
    place = tmp_path / "events"
    place.write_text("no folder")
    outbox = sweep.outbox("tensorboard")
    outbox.send(sweep.cells[:1], sweep.say)
    assert len(sweep.said) == 1 and sweep.said[0].startswith("not sent to tensorboard: ")
    assert sweep.said[0].endswith("; tried again at the end")
    place.unlink()
    outbox.send(sweep.cells[1:], sweep.say)
    assert len(sweep.said) == 1 and not place.exists()
    for (text,) in sweep.warnings():
        assert text.startswith("not sent to tensorboard: ")
        assert text.endswith("; run the same command again to send what is missing.")
    outbox.send(sweep.cells, sweep.say, is_last=True)
    assert sorted(seen.cell_id for seen in readers.of("tensorboard", tmp_path)) == sweep.cell_ids()
    assert [store.read_record(folder).to_dict() for folder in sweep.cells] == before and len(sweep.said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in TRACKERS])
def test_what_was_deleted_on_this_disk_is_sent_again(name: str, tmp_path: Path) -> None:
    """All of it, also when some other cell was sent before."""
    pytest.importorskip(name)
    sweep = Sweep(tmp_path)
    sweep.outbox(name).send(sweep.cells, sweep.say)
    for place in ("m.db", "trackio", "wandb", "events"):
        if (tmp_path / place).exists():
            (tmp_path / place).rename(tmp_path / "gone")
    outbox = sweep.outbox(name)
    outbox.send(sweep.cells[1:], sweep.say)
    outbox.send(sweep.cells, sweep.say)
    assert sorted(seen.cell_id for seen in readers.of(name, tmp_path)) == sweep.cell_ids() and sweep.said == []


def test_a_search_begins_once(tmp_path: Path) -> None:
    """A tracker that is down is not tried again with each of its batches, and stays left alone."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path, 1)
    (tmp_path / "events").write_text("no folder")
    outbox = sweep.outbox("tensorboard")
    outbox.begin(sweep.say)
    (tmp_path / "events").unlink()
    outbox.begin(sweep.say)
    outbox.send(sweep.cells, sweep.say)
    assert len(sweep.said) == len(sweep.warnings()[0]) == 1 and not (tmp_path / "events").exists()


def test_a_single_run_is_not_said_to_be_sent_by_its_command(tmp_path: Path) -> None:
    """That measures again."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path, 1)
    (tmp_path / "events").write_text("no folder")
    outbox = Outbox(readers.settings_of("tensorboard", tmp_path), sweep.cells[0], is_sweep=False)
    outbox.send(sweep.cells, sweep.say, is_last=True)
    for text in (*sweep.said, *sweep.warnings()[0]):
        assert text.rstrip(".").endswith("; the same command measures again, and sends the new record")
    assert len(sweep.said) == 1


def test_what_a_found_folder_says_means_nothing_to_a_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key or a cell_id of somebody else's making is replaced, and files behind links are not sent."""
    pytest.importorskip("tensorboard")
    sweep = Sweep(tmp_path, 1)
    record = store.read_record(sweep.cells[0])
    record.cell_id = "x' or tags.y != '*"
    store.write_record(sweep.cells[0], record)
    (sweep.directory / store.SENT).write_text('{"key": "*/../*", "sent": []}')
    (tmp_path / "secret.csv").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "secret.svg").write_text("secret")
    (sweep.directory / "runs.csv").symlink_to(tmp_path / "secret.csv")
    (sweep.directory / "plots").symlink_to(tmp_path / "secrets")
    (sweep.directory / "report.html").write_text("page")
    jobs: list[Job] = []

    def enter(self: Sender) -> Sender:
        jobs.append(self._job)
        raise LostError("enough seen")

    monkeypatch.setattr(Sender, "__enter__", enter)
    sweep.outbox("tensorboard").send(sweep.cells, sweep.say)
    sweep.outbox("tensorboard").end(sweep.say, is_complete=True)
    (sent,), files = jobs[0].cells, jobs[1].files
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{8}", sent.id)
    assert files is not None and [path.name for path in files.paths] == ["report.html"]


@pytest.mark.slow
def test_a_record_that_a_tracker_refuses_holds_up_no_other(tmp_path: Path) -> None:
    """Its row has the reason; the tracker is not left alone."""
    pytest.importorskip("mlflow")
    sweep = Sweep(tmp_path, 3)
    record = store.read_record(sweep.cells[1])
    record.config["model"]["/odd/"] = 1  # MLflow takes names for paths
    store.write_record(sweep.cells[1], record)
    sweep.outbox("mlflow").send(sweep.cells, sweep.say)
    assert [len(texts) for texts in sweep.warnings()] == [0, 1, 0]
    assert "MlflowException" in sweep.warnings()[1][0]
    assert len(sweep.said) == 1 and "MlflowException" in sweep.said[0]
    assert "Traceback" in (sweep.directory / store.TRACKERS_LOG).read_text()
    seen = {one.cell_id for one in readers.of("mlflow", tmp_path) if "record.json" in one.files}
    assert seen == set(sweep.cell_ids()) - {record.cell_id}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_hangs_costs_its_time_limit(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server accepts and never answers: the process is ended, the row says so, and nothing of it is left behind."""
    pytest.importorskip(name)
    sweep = Sweep(tmp_path)
    with silent_server() as (uri, taken):
        if name == "mlflow":
            settings: dict[str, object] = {"uri": uri, "timeout_s": 2.0}
        else:
            settings = {"mode": "online", "timeout_s": 2.0}
            monkeypatch.setenv("WANDB_BASE_URL", uri)
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        waited: list[tuple[float, float]] = []
        reply = Sender.reply

        def timed(self: Sender, timeout_s: float | None = None) -> str | None:
            begun = time.monotonic()
            try:
                return reply(self, timeout_s)
            finally:
                waited.append((timeout_s or 2.0, time.monotonic() - begun))

        monkeypatch.setattr(Sender, "reply", timed)
        outbox = sweep.outbox(name, **settings)
        outbox.send(sweep.cells, sweep.say)
        outbox.send(sweep.cells, sweep.say)
        assert taken, "nobody came"
    assert len(sweep.said) == 1 and "no answer within 2 s" in sweep.said[0]
    assert [len(texts) for texts in sweep.warnings()] == [1, 1]
    assert [limit for limit, _ in waited].count(2.0) <= 2  # begin, and for W&B the first cell
    assert not any(notes.is_sent(folder, name, "", "") for folder in sweep.cells)


@pytest.mark.slow
def test_an_account_that_is_not_there_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before a cell runs; nobody is asked for a key."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where wandb login leaves it
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sweep = Sweep(tmp_path, 1)
    sweep.outbox("wandb", mode="online").begin(sweep.say)
    assert len(sweep.said) == 1 and "wandb login" in sweep.said[0]


@pytest.mark.slow
def test_a_server_that_is_not_there_is_known_soon(tmp_path: Path) -> None:
    """Without the minutes of retries that a client would make."""
    pytest.importorskip("mlflow")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    sweep = Sweep(tmp_path, 1)
    sweep.outbox("mlflow", uri=f"http://127.0.0.1:{port}").begin(sweep.say)
    assert len(sweep.said) == 1 and "no answer" not in sweep.said[0] and "MlflowException" in sweep.said[0]
