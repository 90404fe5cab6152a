"""measure/device_lock.py: real processes and real locks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_lab.measure import device_lock
from moe_lab.measure.device_lock import DeviceLock

HOLD = (
    "import sys; from moe_lab.measure.device_lock import DeviceLock\n"
    "with DeviceLock(sys.argv[1]) as lock:\n"
    "    print(lock.others(), flush=True)\n"
    "    sys.stdin.read()\n"
    "print(lock.others(), flush=True)"
)
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(device_lock.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path / "run"


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that uses a device until its standard input is closed; it has said how many others do."""
    started: list[subprocess.Popen[str]] = []

    def start(device_id: str = "cpus_0-1", others: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, device_id]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == f"{others}\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_each_sees_the_others_of_its_device(hold: Hold) -> None:
    """Whoever came first, and only while they are there; not those of another device."""
    with DeviceLock("cpus_0-1") as lock:
        assert lock.others() == 0
        first = hold(others=1)
        assert lock.others() == 1
        second = hold(others=2)
        hold("GPU-1", others=0)
        assert lock.others() == 2
        first.communicate()
        assert lock.others() == 1
        second.communicate()
        assert lock.others() == 0


def test_sets_of_cpus_that_overlap_are_one_device(hold: Hold) -> None:
    """Whatever the other CPUs of each are."""
    with DeviceLock("cpus_0-1_4-7") as lock:
        hold("cpus_2-3", others=0)
        assert lock.others() == 0
        hold("cpus_6-6", others=1)
        assert lock.others() == 1


def test_a_dead_process_uses_nothing(hold: Hold, runtime: Path) -> None:
    """The kernel unlocks its file, and who finds that removes it."""
    process = hold()
    process.kill()
    process.wait()
    (left,) = (runtime / "moe-lab/cpus").iterdir()
    with DeviceLock("cpus_0-1") as lock:
        assert lock.others() == 0 and not left.exists()
    assert list((runtime / "moe-lab/cpus").iterdir()) == []


def test_waiting_ends_when_the_last_has_left(hold: Hold) -> None:
    """One that waits and one that does not; it is said once."""
    told: list[str] = []
    first, second = hold(), hold(others=1)
    waiting = "import sys; from moe_lab.measure.device_lock import DeviceLock\n" + (
        "with DeviceLock(sys.argv[1], wait=True, on_wait=lambda: print('waits', flush=True)) as lock:\n"
        "    print('in', lock.others(), flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", waiting, "cpus_0-1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        first.communicate()
        time.sleep(0.2)
        assert process.poll() is None
        second.communicate()
        assert process.stdout.readline() == "in 0\n"
        process.communicate()
        with DeviceLock("cpus_0-1", wait=True, on_wait=lambda: told.append("waits")) as lock:
            assert lock.others() == 0
    finally:
        process.kill()
        process.communicate()
    assert told == []


def test_two_that_wait_take_turns(hold: Hold, tmp_path: Path) -> None:
    """Never both at once."""
    once = "import sys, time; from moe_lab.measure.device_lock import DeviceLock\n" + (
        "with DeviceLock('cpus_0-1', wait=True) as lock:\n"
        "    for _ in range(20):\n"
        "        assert lock.others() == 0\n"
        "        time.sleep(0.01)"
    )
    keeper = hold()
    waiting = [subprocess.Popen([sys.executable, "-c", once]) for _ in range(3)]
    keeper.communicate()
    assert [process.wait(timeout=60) for process in waiting] == [0, 0, 0]


def test_who_ends_leaves_nothing(runtime: Path) -> None:
    """Also after an exception."""
    with pytest.raises(RuntimeError, match="planted"), DeviceLock("cpus_0-1"):
        raise RuntimeError("planted")
    assert list((runtime / "moe-lab/cpus").iterdir()) == []


def test_the_folder_is_private(runtime: Path) -> None:
    """Nobody else can plant a link in it or hold a lock."""
    with DeviceLock("GPU-1/../../x"):
        pass
    (folder,) = (runtime / "moe-lab").iterdir()
    assert folder.name == "GPU-1_______x"
    assert folder.stat().st_mode & 0o777 == 0o700 and (runtime / "moe-lab").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "open_to_others", "missing"])
def test_a_folder_that_is_not_the_users_own_is_not_used(kind: str, runtime: Path, tmp_path: Path) -> None:
    """A link that somebody planted is not followed; the temporary folder takes its place."""
    planted, elsewhere = runtime / "moe-lab", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        planted.symlink_to(elsewhere)
    elif kind == "file":
        planted.write_text("")
    elif kind == "open_to_others":
        planted.mkdir()
        planted.chmod(0o777)
    else:
        runtime.rmdir()
    with DeviceLock("cpus_0-1") as lock:
        assert lock.others() == 0
        assert [path.name for path in (tmp_path / f"tmp/moe-lab-{os.getuid()}").iterdir()] == ["cpus"]
    assert list(elsewhere.iterdir()) == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    """Nothing is written through it."""
    target = tmp_path / "target"
    with DeviceLock("cpus_0-1"):
        pass
    (runtime / "moe-lab/cpus/turn").symlink_to(target)
    with pytest.raises(ValueError, match=re.escape("sweep.wait=true")), DeviceLock("cpus_0-1", wait=True):
        pass
    (runtime / "moe-lab/cpus/1-2").symlink_to(target)
    with DeviceLock("cpus_0-1") as lock:
        assert lock.others() == 0
    assert not target.exists()


def test_without_a_place_nothing_is_known_and_waiting_is_refused(runtime: Path, tmp_path: Path) -> None:
    """Unknown is not 0; a key that could not be obeyed is a mistake."""
    (runtime / "moe-lab").write_text("")
    (tmp_path / f"tmp/moe-lab-{os.getuid()}").write_text("")
    with DeviceLock("cpus_0-1") as lock:
        assert lock.others() is None
    with pytest.raises(ValueError, match=r"sweep\.wait=true: .*set XDG_RUNTIME_DIR"), DeviceLock("cpus_0-1", wait=True):
        pass
