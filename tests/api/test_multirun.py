"""api/multirun.py: a sweep from Python is the command line's."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

import moe_lab
from moe_lab.config.hydra_patches import SWEEP_NAME
from moe_lab.records.store import read_record
from moe_lab.sweep import multirun as sweeps
from moe_lab.sweep.lock import Lock
from tests import quick
from tests.cli.test_main import moe_lab as command

AXES = ["router=torch,sinkhorn", "batch=1,3", "sweep.report=false", "sweep.worker=false"]


def words(*more: str) -> list[str]:
    return quick.overrides("moe_layer", *AXES, *more)


def state() -> tuple[str | None, bool]:
    return os.environ.get(SWEEP_NAME), GlobalHydra.instance().is_initialized()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra, the sweep's name and the folder are afterwards as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SWEEP_NAME, raising=False)  # what a command in this process left
    before = state()
    yield
    assert state() == before and sweeps.current is None
    assert Path.cwd() == tmp_path


@pytest.mark.slow
def test_a_sweep_twice_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record per cell in the order of the command; again, nothing is measured; progress is not on standard output."""
    first = moe_lab.multirun(words("sweep.name=s"))
    assert [(one.config["router"]["name"], one.config["batch"], one.status) for one in first] == [
        (router, batch, "ok") for router in ("torch", "sinkhorn") for batch in (1, 3)
    ]
    assert first.directory == Path("outputs/s") and first.page is None
    assert all(one.ratio_to_anchor for one in first if one.config["router"]["name"] == "sinkhorn")
    again = moe_lab.multirun(words("sweep.name=s"))
    assert [one.started for one in again] == [one.started for one in first]
    printed = capsys.readouterr()
    assert printed.out == "" and "4 done; 0 to run" in printed.err
    assert {path.name for path in first.directory.iterdir() if path.is_file()} >= {
        "plan.json",
        "multirun.yaml",
        "runs.csv",
    }
    assert len(first.frame) == 4 and repr(first).splitlines()[0].startswith("variant")


@pytest.mark.slow
def test_the_command_line_continues_it_and_the_other_way_round(tmp_path: Path) -> None:
    """The folder of overrides without a name is the same, and the plan names a command that runs it again."""
    found = moe_lab.multirun(words())
    assert found.directory.parent == Path("outputs") and found.directory.name.startswith("sweep-")
    plan = json.loads((found.directory / "plan.json").read_text())
    assert plan["commands"] == [["moe-lab", "-m", *words()]]
    done = command("-m", *words(), cwd=tmp_path)
    assert done.returncode == 0 and f"{found.directory}: 4 cells, 4 done; 0 to run" in done.stderr, done.stderr


def test_a_folder_of_any_name(tmp_path: Path) -> None:
    """Quotes and blanks in it are not Hydra's."""
    folder = tmp_path / 'it\'s a "folder"'
    found = moe_lab.multirun(words("router=torch", "batch=1"), directory=folder)
    assert found.directory == folder and len(found) == 1 and Path(str(found[0].directory)).parent == folder


def test_a_failure_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on."""
    from moe_lab.routers.sinkhorn import Sinkhorn

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Sinkhorn, "select", fail)
    found = moe_lab.multirun(words("batch=1"))
    assert [one.status for one in found] == ["ok", "failed"]
    assert found.failed[0].reason == "error: RuntimeError: no such luck" and "no such luck" in repr(found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["router=torch,sinkhron"], "router=sinkhron: unknown option", id="option"),
        pytest.param(["bacth=1,2"], "bacth: unknown key", id="key"),
        pytest.param("router=torch,sinkhorn", "'router=torch,sinkhorn': must be a list of overrides", id="text"),
        pytest.param(["hydra/launcher=basic"], "hydra/launcher, hydra/sweeper: only read by moe-lab -m", id="launcher"),
        pytest.param(["hydra.sweeper.max_batch_size=2"], "hydra.sweeper.max_batch_size: only read", id="batches"),
    ],
)
def test_a_mistake_is_one_line(overrides: Any, message: str, tmp_path: Path) -> None:
    """And leaves no folder."""
    with pytest.raises(ValueError) as caught:
        moe_lab.multirun(overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "outputs").exists() or list((tmp_path / "outputs").iterdir()) == []


def test_another_sweep_in_the_folder_is_a_mistake(tmp_path: Path) -> None:
    """Of another process, or of this one."""
    lock = Lock(tmp_path / "outputs" / "s")
    with pytest.raises(ValueError, match="another sweep is using this folder"):
        moe_lab.multirun(words("sweep.name=s"))
    lock.release()


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised when the tables are written, the folder is free, and the same call continues."""
    from moe_lab.sweep import session

    run_group, groups = session._run_group, []

    def interrupted(*arguments: Any) -> None:
        groups.append(arguments)
        if len(groups) == 2:
            raise KeyboardInterrupt
        run_group(*arguments)

    monkeypatch.setattr(session, "_run_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_lab.multirun(words("sweep.name=s"))
    assert len(list(tmp_path.glob("outputs/s/*/result.json"))) == 2 and (tmp_path / "outputs/s/runs.csv").is_file()
    found = moe_lab.multirun(words("sweep.name=s"))
    assert [one.status for one in found] == ["ok"] * 4


def test_hydra_of_the_caller_stays(tmp_path: Path) -> None:
    """A script that uses Hydra itself, such as one with `@hydra.main`, has its own session back."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("mine: 7\n")
    os.environ[SWEEP_NAME] = "before"
    with hydra.initialize_config_dir(str(tmp_path / "own"), version_base=None):
        session = GlobalHydra.instance().hydra
        moe_lab.multirun(words("router=torch", "batch=1"))
        assert os.environ.pop(SWEEP_NAME) == "before"
        assert moe_lab.compose(["batch=3"]).batch == 3
        assert GlobalHydra.instance().hydra is session


@pytest.mark.slow
def test_in_a_script_with_a_worker(tmp_path: Path) -> None:
    """No `if __name__`: the worker does not import the script. The page is there."""
    overrides = [word for word in words("sweep.name=s") if not word.startswith(("sweep.report", "sweep.worker"))]
    script = tmp_path / "script.py"
    script.write_text(f"import moe_lab\nfound = moe_lab.multirun({overrides!r})\nprint(found.page, len(found))\n")
    import subprocess
    import sys

    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "outputs/s/report.html 4\n"), done.stderr
    assert (tmp_path / "outputs/s/report.html").is_file()


@pytest.mark.slow
def test_in_a_thread(tmp_path: Path) -> None:
    """As a notebook's server may do; a second one meanwhile is a mistake."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(moe_lab.multirun(words("sweep.name=s"))))
    thread.start()
    refused = None
    while thread.is_alive() and refused is None:
        time.sleep(0.01)
        if sweeps.current is not None:
            with contextlib.suppress(AssertionError):
                with pytest.raises(ValueError, match="this process is running this sweep") as caught:
                    moe_lab.multirun(words("sweep.name=other"))
                refused = caught.value
    thread.join()
    assert (
        refused is not None
        and [read_record(path).status for path in map(Path, (str(o.directory) for o in found[0]))] == ["ok"] * 4
    )


def test_a_folder_that_is_given_twice_is_a_mistake(tmp_path: Path) -> None:
    """As an argument and in the command line's language."""
    with pytest.raises(ValueError, match=r"hydra\.sweep\.dir is given twice \(hydra\.sweep\.dir=x\); remove one\.$"):
        moe_lab.multirun(["hydra.sweep.dir=x", "batch=1,2"], directory=tmp_path)
