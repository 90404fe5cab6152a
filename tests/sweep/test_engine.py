"""sweep/engine.py, sweep/worker.py: a real worker process, what comes back from it and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.records import identity
from moe_lab.records.store import read_record
from moe_lab.sweep import engine
from moe_lab.sweep.engine import CellFailedError, Worker, WorkerLostError
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.plan import plain
from tests import quick
from tests.sweep import faulty

ROOT = Path(__file__).resolve().parent.parent.parent
_YAML = "_target_: talking_router.Talker\nname: talker\npause_s: 0.0\nchild: null\n"
_MODULE = '''
import os, subprocess, time
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Talker(SoftmaxTopK):
    """Prints who it is, and waits in `select`."""

    def __init__(self, n_experts, top_k, pause_s, child=None):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        self.pause_s, self.child = pause_s, child
        print(f"talker in {os.getpid()}")

    def select(self, logits_TE, ctx=None):
        if self.child:
            with open(self.child, "w") as file:
                file.write(str(subprocess.Popen(["sleep", "3600"]).pid))
        time.sleep(self.pause_s)
        return super().select(logits_TE, ctx)
'''


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --config-dir with router=talker."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "router").mkdir()
    (folder / "router" / "talker.yaml").write_text(_YAML)
    (folder / "talking_router.py").write_text(_MODULE)
    return folder


@pytest.fixture(scope="module")
def worker(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for the tests of this file; whoever ends its process leaves the next call to start another."""
    moe_lab.compose([], config_dir=talker)  # trusts the folder, which the worker is told
    buffering = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    worker = Worker(tmp_path_factory.mktemp("log") / "worker.log", buffering)
    yield worker
    worker.close()


def config(talker: Path, pause_s: float = 0.0) -> dict[str, Any]:
    overrides = quick.overrides("moe_layer", "router=talker", f"router.pause_s={pause_s}")
    return plain(moe_lab.compose(overrides, config_dir=talker))


def compose_talker(talker: str, pause_s: float) -> dict[str, Any]:
    """`config`, in another process."""
    return config(Path(talker), pause_s)


def pid(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_steps_run_in_another_process_whose_output_is_its_log(worker: Worker, talker: Path, tmp_path: Path) -> None:
    """What a step returns comes back; what is printed there stands in the log at once, not here."""
    content = config(talker)
    assert worker.call("build", content, str(tmp_path)) is None
    seen = worker.call("verify", identity.cell_id(content))
    run = moe_lab.build_model(quick.compose("moe_layer"))
    assert seen["parameter_bytes"] == sum(p.numel() * p.element_size() for p in run.parameters())
    assert worker.log is not None
    deadline = time.monotonic() + 10
    while f"talker in {pid(worker)}\n" not in worker.log.read_text():
        assert time.monotonic() < deadline
    assert f"talker in {os.getpid()}\n" not in worker.log.read_text()
    ms, stamp_s = worker.call("block", identity.cell_id(content), 3)
    assert len(ms) == len(stamp_s) == 3 and (ms > 0).all()


def test_a_mistake_of_ours_is_a_runtime_error_that_names_the_step(worker: Worker) -> None:
    """The process goes on serving."""
    for step, arguments, cause in (("verify", ["unknown"], "KeyError"), ("no_such_step", [], "AttributeError")):
        with pytest.raises(RuntimeError, match=f"^{step}: {cause}: "):
            worker.call(step, *arguments)
    life = worker.life
    assert worker.call("look", []) == []
    assert worker.life == life


def test_an_os_error_stays_one(worker: Worker, talker: Path, tmp_path: Path) -> None:
    """With its class, its number and its file: a full disk is no failure of a cell."""
    (tmp_path / "file").write_text("")
    life = worker.life
    with pytest.raises(NotADirectoryError) as raised:
        worker.call("build", config(talker), str(tmp_path / "file" / "cell"))
    assert raised.value.filename == str(tmp_path / "file" / "cell")
    assert worker.call("look", []) == []
    assert worker.life == life


def test_a_cell_that_fails_is_told_from_a_mistake_and_has_a_record(worker: Worker, tmp_path: Path) -> None:
    """dtype=fp16 on a CPU: status and reason come back, and the process goes on."""
    content = plain(quick.compose("moe_layer", "dtype=fp16"))
    with pytest.raises(CellFailedError) as raised:
        worker.call("build", content, str(tmp_path))
    record = read_record(tmp_path)
    assert (raised.value.status, raised.value.reason) == (record.status, record.reason)
    assert record.status == "skipped" and str(record.reason).startswith("unavailable: dtype=fp16")
    assert not raised.value.lost_device
    assert worker.call("look", []) == []


@pytest.mark.slow
def test_after_an_interrupted_call_settle_reads_its_reply(worker: Worker, talker: Path, tmp_path: Path) -> None:
    """The step ends, and the next call gets its own answer, not that of the step before."""
    content = config(talker, pause_s=0.2)
    worker.call("build", content, str(tmp_path))
    before = pid(worker)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        worker.call("verify", identity.cell_id(content))
    interrupt.join()
    worker.settle(60)
    assert worker.call("look", []) == []
    assert worker.call("verify", identity.cell_id(content))["parameter_bytes"] > 0
    assert pid(worker) == before
    worker.settle(0)  # nothing is pending: nothing to wait for


@pytest.mark.slow
def test_renew_is_another_process_in_which_nothing_is_built(worker: Worker, talker: Path, tmp_path: Path) -> None:
    """A higher life says so to whoever holds a run."""
    content = config(talker)
    worker.call("build", content, str(tmp_path))
    life, before = worker.life, pid(worker)
    worker.renew()
    assert worker.life > life
    assert pid(worker) != before and not is_alive(before)
    with pytest.raises(RuntimeError, match=r"^verify: KeyError"):
        worker.call("verify", identity.cell_id(content))


@pytest.mark.parametrize(
    "how", [pytest.param("call", id="call"), pytest.param("settle", id="settle", marks=pytest.mark.slow)]
)
def test_a_step_out_of_time_is_named_and_its_process_ended(
    worker: Worker, talker: Path, tmp_path: Path, how: str
) -> None:
    """Also one that does not end after Ctrl-C. The next call starts another process."""
    content = config(talker, pause_s=3600)
    worker.call("build", content, str(tmp_path))
    life, before = worker.life, pid(worker)
    if how == "call":
        with pytest.raises(WorkerLostError, match=r"^timeout: verify$"):
            worker.call("verify", identity.cell_id(content), timeout_s=0.3)
    else:
        interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            worker.call("verify", identity.cell_id(content))
        interrupt.join()
        with pytest.raises(WorkerLostError, match=r"^timeout: verify$"):
            worker.settle(0.3)
    assert not is_alive(before)
    assert worker.life > life


def stopped_for(process: int, seconds: float) -> None:
    """Stop a process for a while, from outside of it."""
    script = f"kill -STOP {process}; sleep {seconds}; kill -CONT {process}"
    subprocess.Popen(["sh", "-c", script], start_new_session=True)


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_not_out_of_time(
    worker: Worker, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP for longer than the time-out: the step goes on afterwards."""
    monkeypatch.setattr(engine, "_TICK_S", 0.1)
    content = config(talker, pause_s=0.02)
    worker.call("build", content, str(tmp_path))
    threading.Timer(0.1, stopped_for, (pid(worker), 4)).start()
    started = time.monotonic()
    assert worker.call("verify", identity.cell_id(content), timeout_s=3)["parameter_bytes"] > 0
    assert time.monotonic() - started > 3.5


_STOPPED = """
import sys
from moe_lab.sweep.engine import Worker
worker = Worker()
assert worker.call("look", []) == []
print("ready", flush=True)
sys.stdin.readline()
worker._pending = "look"
worker._connection.send(("look", ([],), 2.0))
print("sent", flush=True)
assert worker._receive(2.0) == []
worker.close()
"""


@pytest.mark.slow
def test_a_parent_that_is_stopped_takes_the_reply_that_came(tmp_path: Path) -> None:
    """SIGSTOP of the parent for longer than the time-out, while its worker is slow to answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)  # no answer before the parent waits
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "sent\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    os.kill(int(child), signal.SIGCONT)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_what_a_step_started_ends_with_it(worker: Worker, talker: Path, tmp_path: Path) -> None:
    """A child of the worker, after a time-out and after a crash."""
    for how in ("timeout", "crash"):
        worker.call("look", [])
        content = config(talker, pause_s=3600)
        content["router"]["child"] = str(tmp_path / how)
        worker.call("build", content, str(tmp_path))
        if how == "crash":
            threading.Timer(1, os.kill, (pid(worker), signal.SIGKILL)).start()
        reason = "timeout: verify" if how == "timeout" else r"crash: SIGKILL \(killed by signal 9; out of memory\?\)"
        with pytest.raises(WorkerLostError, match=f"^{reason}$"):
            worker.call("verify", identity.cell_id(content), timeout_s=1 if how == "timeout" else 60)
        ends(int((tmp_path / how).read_text()))


_KILLED = """
import sys
from tests.sweep.test_engine import compose_talker
from moe_lab.records import identity
from moe_lab.sweep.engine import Worker
content = compose_talker(sys.argv[1], 3600)
content["router"]["child"] = sys.argv[2] + "/child"
worker = Worker()
worker.call("build", content, sys.argv[2])
worker.call("verify", identity.cell_id(content))
"""


@pytest.mark.slow
def test_what_a_worker_started_ends_with_the_sweep(talker: Path, tmp_path: Path) -> None:
    """After kill -9 of the parent: the worker and its child are gone."""
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(talker), str(tmp_path)], cwd=ROOT)
    child = tmp_path / "child"
    deadline = time.monotonic() + 60
    while not child.exists() or not child.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    ends(int(child.read_text()))


def ends(process: int) -> None:
    """Wait until it is gone, or a zombie that nobody asked about."""
    deadline = time.monotonic() + 10
    while is_alive(process) and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


@pytest.mark.slow
def test_the_start_is_not_the_steps_time_and_close_ends_the_process(tmp_path: Path) -> None:
    """A start that takes longer than the step may; then a process that is gone, and no second life by closing twice."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(1.5)\n")
    worker = Worker(environment={**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        assert worker.call("look", [], timeout_s=1.5) == []
        number = pid(worker)
        assert is_alive(number)
    finally:
        worker.close()
    assert not is_alive(number)
    assert worker.life == 1
    worker.close()
    assert worker.life == 1


def test_this_process_as_an_engine(tmp_path: Path) -> None:
    """The same steps; renew and close let go of what was built."""
    here, content = InProcess(), plain(quick.compose("moe_layer"))
    here.call("build", content, str(tmp_path))
    assert here.call("verify", identity.cell_id(content))["parameter_bytes"] > 0
    here.settle(0)
    for life, forget in ((1, here.renew), (1, here.close)):
        here.call("build", content, str(tmp_path))
        forget()
        assert here.life == life
        with pytest.raises(KeyError):
            here.call("verify", identity.cell_id(content))


_NOTES = """
import gc, os, sys

def freeze(really=gc.freeze):
    really()
    notes = open(os.environ["NOTES"], "a", buffering=1)
    notes.write("frozen\\n")
    sys.addaudithook(lambda event, arguments: event == "import" and notes.write(arguments[0] + "\\n"))

gc.freeze = freeze
"""


@pytest.mark.slow
def test_cells_import_little_once_the_worker_has_frozen_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven modules at this time. Every collection of garbage would look through what more of them hold."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_NOTES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    done = faulty.sweep("router=torch,sinkhorn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frozen, *imported = (tmp_path / "notes").read_text().split()
    assert frozen == "frozen" and len(set(imported)) < 30, sorted(set(imported))
