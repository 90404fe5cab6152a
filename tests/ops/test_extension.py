"""The build of kernels/: both halves, the cache and its key, the lock, what is missing, what fails."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_router_ext.py"
needs_cxx = pytest.mark.skipif(extension.find_cxx() is None, reason="no C++ compiler for the extension")
needs_nvcc = pytest.mark.skipif(extension.find_nvcc() is None, reason="no nvcc for the extension's CUDA half")
CPU = torch.device("cpu")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, where nothing is built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """scripts/build_router_ext.py."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)


ROUTE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -3.0, -0.5]])
print(torch.ops.moe_lab.route(x, None, None, 2, "softmax", 1, 1, "max", True, 1.0)[0].tolist())
"""


def routes(path: Path) -> str:
    """What a process that loads this binary, and nothing of moe_lab, prints for two rows."""
    done = subprocess.run([sys.executable, "-c", ROUTE, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fast_compile() -> str:
    """nvcc's option, where it has one, to leave out most optimisations: a third of the time."""
    nvcc = extension.find_nvcc()
    known = nvcc is not None and "-Ofc" in subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout
    return "-Ofc=max" if known else ""


@needs_cxx
@needs_nvcc
@pytest.mark.parametrize(
    "optimised",
    [pytest.param(False, id="in-a-hurry"), pytest.param(True, id="as-it-is-used", marks=pytest.mark.slow)],
)
def test_the_cuda_half_compiles_without_a_gpu_and_its_binary_computes_on_a_cpu(
    optimised: bool, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script, for Hopper; the second time it is there already, for a run too that needs that one alone."""
    if not optimised:
        monkeypatch.setenv("NVCC_APPEND_FLAGS", fast_compile())
    done = script("--arch", "90")
    assert done.returncode == 0, done.stderr
    said, path = done.stdout.splitlines()
    assert said.startswith("C++, and CUDA for sm_90: built in ")
    assert Path(path) == extension.built(("90",))
    assert routes(Path(path)) == "[[1, 3], [3, 0]]"
    assert script("--arch", "90").stdout.startswith("C++, and CUDA for sm_90: was there already")
    wider = Path(path).rename(Path(path).with_name("80-90.so"))
    assert extension.built(("90",)) == wider and extension.built(("100",)) is None and extension.built(()) is None


@needs_cxx
@pytest.mark.slow
def test_without_nvcc_the_cpp_half_is_built_alone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And serves a CPU; for a GPU nvcc is named as missing."""
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    assert extension.why_unavailable(CPU) is None
    path = extension.build(())
    assert path == extension.built(()) and routes(path) == "[[1, 3], [3, 0]]"
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []  # nothing half built is left
    with pytest.raises(UnavailableError, match="its CUDA half needs nvcc"):
        extension.build(("90",))


@needs_cxx
def test_processes_that_come_at_once_build_it_once(empty_cache: Path) -> None:
    """The others wait for the first, and find it there; it is the C++ half alone, and computes."""
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(script("--arch", "cpu").stdout)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = {text.splitlines()[1] for text in said}
    assert len(said) == 2 and len(paths) == 1
    path = Path(paths.pop())
    log = path.with_suffix(".log").read_text()
    assert log.count(" -shared ") == 1 and "nvcc" not in log
    assert path == extension.built(()) and routes(path) == "[[1, 3], [3, 0]]"
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []  # nothing half built is left


@needs_cxx
def test_without_nvcc_there_is_the_cpp_half_alone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves a CPU; for a GPU nvcc is named as missing."""
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    assert extension.why_unavailable(CPU) is None
    with pytest.raises(UnavailableError, match="its CUDA half needs nvcc"):
        extension.build(("90",))


def test_without_a_compiler_it_is_unavailable(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, that names what is missing; nothing is written."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert extension.why_unavailable(CPU) == "it needs a C++ compiler (g++ or clang++; $CXX names another)"
    with pytest.raises(UnavailableError, match=r"cannot be built: it needs a C.. compiler"):
        extension.build(())
    done = script("--arch", "cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not empty_cache.exists()


@needs_cxx
def test_a_compiler_that_fails_is_named_with_its_last_lines(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that it said is in a file; the next attempt begins anew."""
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cannot find <sorrow>' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UnavailableError, match=r"does not compile: cannot find <sorrow> .all of it in (.*)") as caught:
        extension.build(())
    log = Path(str(caught.value).partition("all of it in ")[2].rstrip(")"))
    assert "cannot find <sorrow>" in log.read_text() and extension.built(()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--arch", "sm_90"), "give compute capabilities, such as 80,90", id="not a number"),
        pytest.param(("--arch", "75"), "compute capability 8.0 or newer, not 75", id="too old"),
    ],
)
@needs_cxx
def test_what_the_script_cannot_build_is_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    code = runpy.run_path(str(SCRIPT))["main"]()
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1


@needs_cxx
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: a file stands where the folder should be."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError, match="the extension cannot be built in "):
        extension.build(())


@needs_cxx
def test_the_key_depends_on_sources_compilers_and_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of them changes where a build lies; nothing else does."""
    before = extension.binary(())
    extension._key.cache_clear()
    assert extension.binary(()) == before
    for name in ("route.h", "ops.cpp"):
        (tmp_path / name).write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr(extension, "sources", lambda: tmp_path)
        extension._key.cache_clear()
        other = extension.binary(())
        (tmp_path / "route.h").write_text("changed")
        extension._key.cache_clear()
        assert len({before, other, extension.binary(())}) == 3
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        extension._key.cache_clear()
        assert extension.binary(()) != before
    extension._key.cache_clear()
    assert extension.binary(()) == before != extension.binary(("90",))


@pytest.mark.gpu
def test_a_gpu_is_served_by_a_build_for_it() -> None:
    """The label says for which."""
    major, minor = torch.cuda.get_device_capability()
    assert extension.visible_architectures() == (f"{major}{minor}",)
    assert extension.load() == extension.visible_architectures()
    assert extension.label(torch.device("cuda", 0)) == f"cuda_ext:sm_{major}{minor}"


SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer (of the CUDA toolkit)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_leaves_its_memory_or_races(tool: str) -> None:
    """Without torch's cache of memory, in which a neighbour would be no fault."""
    extension.load()
    command = [str(SANITIZER), "--tool", tool, sys.executable, "-m", "tests.ops.every_kernel"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0 and " calls" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "SUMMARY: 0 " in done.stdout and "Warning" not in done.stdout, done.stdout[-2000:]
