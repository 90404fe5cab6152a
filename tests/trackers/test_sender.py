"""trackers/sender.py: the process of one sending, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.trackers.sender import Job, LostError, Sender, _tried
from tests.trackers import readers
from tests.waiting import becomes_true


def job(folder: Path) -> Job:
    """A greeting."""
    settings = readers.settings_of("tensorboard", folder)["tensorboard"]
    return Job("tensorboard", settings, folder, None, [], None)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_process_is_gone_afterwards_and_one_that_dies_is_said(tmp_path: Path) -> None:
    """Killed in the middle: an error that names the log."""
    pytest.importorskip("tensorboard")
    with Sender(job(tmp_path), tmp_path / "log", 30.0) as sender:
        number = sender._process.pid
        os.kill(number, signal.SIGKILL)
        with pytest.raises(LostError, match="its process ended; see"):
            sender.reply()
    assert not is_alive(number)


def test_the_log_follows_no_link(tmp_path: Path) -> None:
    """Somebody else may have made the folder."""
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        Sender(job(tmp_path), tmp_path / "log", 30.0).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_the_line_of_an_error_and_its_traceback_have_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    """They stand in the record and beside it, which are shared."""

    def fail(_: object) -> None:
        raise OSError("http://me:se@cret@host:5000/x: refused\nhttp://cret@host")

    assert _tried(fail, None) == "OSError: http://host:5000/x: refused"
    logged = capsys.readouterr().err
    assert "Traceback" in logged and "http://host:5000/x" in logged and "cret" not in logged


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it with its parent")
def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    """After kill -9 of a sweep two would send the same."""
    pytest.importorskip("tensorboard")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom moe_lab.trackers.sender import Sender\n"
        "from tests.trackers.test_sender import job\n"
        f"with Sender(job(Path({str(tmp_path)!r})), Path({str(tmp_path / 'log')!r}), 30.0) as sender:\n"
        "    import os, signal; os.kill(sender._process.pid, signal.SIGSTOP)\n"
        "    print(sender._process.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.kill()
    becomes_true(lambda: not is_alive(number))
