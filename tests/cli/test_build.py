"""cli/build.py: the extension is built by `moe-lab build` in processes of its own."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from moe_lab.cli.build import architectures
from moe_lab.ops import extension
from tests.cli import test_main
from tests.ops.test_extension import empty_cache as empty_cache
from tests.ops.test_extension import needs_cxx, routes

needs_nvcc = pytest.mark.skipif(extension.find_nvcc() is None, reason="no nvcc for the extension's CUDA half")


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`moe-lab build ARGUMENTS`, with the environment of this process."""
    return subprocess.run(
        [*test_main.MOE_LAB, "build", *arguments], capture_output=True, text=True, env=os.environ, timeout=600
    )


@needs_cxx
@needs_nvcc
@pytest.mark.slow
def test_the_cuda_half_compiles_without_a_gpu_and_its_binary_computes_on_a_cpu(empty_cache: Path) -> None:
    """For Hopper; the second time it is there already, for a run too that needs that one alone."""
    done = build("--arch", "90")
    assert done.returncode == 0, done.stderr
    text, path = done.stdout.splitlines()
    assert text.startswith("C++ and CUDA for sm_90: built in ")
    assert Path(path) == extension.built(("90",))
    assert routes(Path(path)) == "[[1, 3], [3, 0]]"
    assert build("--arch", "90").stdout.startswith("C++ and CUDA for sm_90: already built")
    wider = Path(path).rename(Path(path).with_name("80-90.so"))
    assert extension.built(("90",)) == wider and extension.built(("100",)) is None and extension.built(()) is None


@needs_cxx
@pytest.mark.slow
def test_processes_that_come_at_once_build_it_once(empty_cache: Path) -> None:
    """The others wait for the first, and find it there; it is the C++ half alone, and computes."""
    printed: list[str] = []
    threads = [threading.Thread(target=lambda: printed.append(build("--arch", "cpu").stdout)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = {text.splitlines()[1] for text in printed}
    assert len(printed) == 2 and len(paths) == 1
    path = Path(paths.pop())
    log = path.with_suffix(".log").read_text()
    assert log.count(" -shared ") == 1 and "nvcc" not in log
    assert path == extension.built(()) and routes(path) == "[[1, 3], [3, 0]]"
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []  # nothing half built is left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("100,90, 80,90", ("80", "90", "100"), id="in order, each once"),
        pytest.param("cpu", (), id="cpu"),
        pytest.param("cpu,90", ("90",), id="both halves"),
    ],
)
def test_architectures(text: str, expected: tuple[str, ...]) -> None:
    """Numbers, not texts, are ordered."""
    assert architectures(text) == expected


@pytest.mark.parametrize("text", ["sm_90", "8.0", "9", "", "90,,80"])
def test_what_is_not_an_architecture(text: str) -> None:
    """The message names the option, its value and what to give."""
    with pytest.raises(ValueError, match=f"--arch {text}: must be compute capabilities .* such as 80,90, or cpu"):
        architectures(text)


@needs_cxx
@pytest.mark.slow
def test_what_cannot_be_built_is_one_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exit code 2, whether the GPU is too old or there is no compiler; nothing is written."""
    old = build("--arch", "75")
    assert old.returncode == 2 and old.stderr.count("\n") == 1
    assert "compute capability 8.0 or newer, not 75" in old.stderr
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = build("--arch", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no C++ compiler found" in done.stderr
    assert not empty_cache.exists()
