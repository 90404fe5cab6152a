"""remembered.py: what is asked once, and what makes it be asked again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lab.config import targets
from moe_lab.sweep import plan, remembered
from moe_lab.sweep.engine import Worker
from tests import quick


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many configurations each call of the worker itself was given."""
    calls: list[int] = []

    def call(self: Worker, step: str, configs: list[Any], *_: Any, **__: Any) -> list[Any]:
        calls.append(len(configs))
        return [{"step": step, "number": number} for number, _ in enumerate(configs)]

    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remembered._surroundings.cache_clear()
    return calls


def look(*overrides: str, model: str = "moe_layer") -> Any:
    remembered._surroundings.cache_clear()
    (answer,) = remembered.Remembered().call("look", [plan.plain(quick.compose(model, *overrides))])
    return answer


def test_an_answer_holds_for_other_sizes_of_the_input(asked: list[int]) -> None:
    """And not for another router; several that are unknown are one call."""
    first = look("router=torch")
    assert look("router=torch", "batch=7", "seed=3") == first and asked == [1]
    look("router=sinkhorn")
    assert asked == [1, 1]
    configs = [plan.plain(quick.compose("moe_layer", f"router={name}")) for name in ("torch", "hash", "base")]
    assert [answer["number"] for answer in remembered.Remembered().call("look", configs)] == [0, 0, 1]
    assert asked == [1, 1, 2]


def _with_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "17")


def _with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def _with_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lab.records.identity._package_code_id", lambda: "f" * 12)


def _with_broken_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in remembered._folder().iterdir():
        file.write_text("{")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_with_threads, id="threads"),
        pytest.param(_with_compiler, id="compiler"),
        pytest.param(_with_code, id="code"),
        pytest.param(_with_broken_files, id="a-file-that-cannot-be-read"),
    ],
)
def test_a_change_is_asked_again(
    change: Callable[[pytest.MonkeyPatch], None], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the answer may depend on."""
    look()
    change(monkeypatch)
    look()
    assert asked == [1, 1]


def test_a_plug_in_that_changed_is_asked_again(asked: list[int], tmp_path: Path) -> None:
    """Its file is part of the code."""
    (tmp_path / "mine" / "router").mkdir(parents=True)
    (tmp_path / "mine" / "router" / "own.yaml").write_text("_target_: remembered_router.Own\nname: own\n")
    (tmp_path / "mine" / "remembered_router.py").write_text("class Own: ...\n")
    targets.trust(tmp_path / "mine")
    config = plan.plain(quick.compose("moe_layer"))
    config["router"] = {"_target_": "remembered_router.Own", "name": "own"}
    for number in (1, 1, 2):
        (tmp_path / "mine" / "remembered_router.py").write_text(f"class Own: ...\n# {number}\n")
        remembered.Remembered().call("look", [config])
    assert asked == [1, 1]
    for _ in range(2):  # it may have a kernel for few tokens
        remembered.Remembered().call("look", [config | {"batch": 77}])
    assert asked == [1, 1, 1]


def test_where_a_gpu_may_be_it_is_asked_every_time(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the run is on the CPU."""
    monkeypatch.setattr(remembered, "_may_have_gpu", lambda: True)
    for device in ("auto", "auto", "cuda", "cuda", "cpu", "cpu"):
        config = plan.plain(quick.compose("moe_layer", device=device))
        remembered.Remembered().call("look", [config])
    assert asked == [1, 1, 1, 1, 1]
    for _ in range(2):
        assert remembered.kept(["x"], lambda: 3) == 3
    assert not list(remembered._folder().glob("*x*"))


def test_what_does_not_fit_into_the_memory_is_told_from_what_is_free_now(asked: list[int]) -> None:
    """By arithmetic, without the worker."""
    config = plan.plain(quick.compose("moe_layer"))
    huge = {**config, "batch": 10**15}
    fits, reason = remembered.Remembered().call("refusals", [config, huge])
    assert fits is None and reason.startswith("memory: needs at least ") and asked == []


@pytest.mark.slow
def test_the_second_time_no_torch_is_loaded_by_anyone(tmp_path: Path) -> None:
    """The same text from `moe-lab list experts` and `moe-lab plan`; the second process starts no worker."""
    program = (
        "import sys; from moe_lab.cli.main import main; from moe_lab.sweep.engine import Worker\n"
        "begun, start = [], Worker.start\n"
        "Worker.start = lambda self: (begun.append(1), start(self))[1]\n"
        "code = main(sys.argv[1:]); print(code, 'torch' in sys.modules, len(begun), file=sys.stderr)"
    )
    for words in (["list", "experts"], ["plan", *quick.overrides("moe_layer", "router=torch,hash")]):
        outcomes = [
            subprocess.run(
                [sys.executable, "-c", program, *words],
                cwd=tmp_path,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
                capture_output=True,
                text=True,
                timeout=300,
            )
            for _ in range(2)
        ]
        first, second = outcomes
        assert first.stdout == second.stdout and first.stdout
        assert first.stderr.split()[:2] == ["0", "False"], first.stderr
        if not remembered._may_have_gpu():
            assert (first.stderr, second.stderr) == ("0 False 1\n", "0 False 0\n")
