"""The build of kernels/: both halves, the cache and its key, the lock, what is missing, what fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx, extension

ROOT = Path(__file__).parents[2]
needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
CPU = torch.device("cpu")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, where nothing is built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


@needs_cxx
@pytest.mark.slow
def test_without_nvcc_the_cpp_half_is_built_alone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And serves a CPU; for a GPU nvcc is named as missing."""
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    assert extension.why_unavailable(CPU) is None
    path = extension.build(())
    assert path == extension.built(()) and routes(path) == "[[1, 3], [3, 0]]"
    assert [file.name for file in path.parent.iterdir() if file.is_dir()] == []  # nothing half built is left
    with pytest.raises(UnavailableError, match="nvcc not found"):
        extension.build(("90",))


@needs_cxx
def test_without_nvcc_there_is_the_cpp_half_alone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves a CPU; for a GPU nvcc is named as missing."""
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    assert extension.why_unavailable(CPU) is None
    with pytest.raises(UnavailableError, match="nvcc not found"):
        extension.build(("90",))


def test_without_a_compiler_it_is_unavailable(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, that names what is missing; nothing is written."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert extension.why_unavailable(CPU) == "no C++ compiler found (install g++ or clang++, or set $CXX)"
    with pytest.raises(UnavailableError, match=r"cannot be built: no C.. compiler found"):
        extension.build(())
    assert not empty_cache.exists()


@needs_cxx
def test_a_compiler_that_fails_is_named_with_its_last_lines(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that it said is in a file. The next attempt fails at once, until somebody asks to try again."""
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cannot find <sorrow>' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(extension.BuildError, match="does not compile: cannot find <sorrow>") as caught:
        extension.build(())
    log = Path(re.search(r"full output: (.*?)\)", str(caught.value))[1])  # type: ignore[index]
    assert "cannot find <sorrow>" in log.read_text() and extension.built(()) is None
    log.unlink()
    assert extension.failure(()) == extension.why_unavailable(CPU) == str(caught.value)
    with pytest.raises(extension.BuildError, match="run `moe-lab build` to try again"):
        extension.build(())
    assert not log.exists()
    with pytest.raises(extension.BuildError):
        extension.build((), again=True)
    assert log.exists()


def test_products_that_wait_for_each_other_are_no_build(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the compiler, here a script, only warns."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho '(C7510) wgmma.mma_async instructions are serialized due to sorrow' >&2\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(extension.BuildError, match=r"would be slow .* install another CUDA toolkit"):
        extension.build(())
    assert extension.built(()) is None


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


@pytest.mark.parametrize(
    ("device", "is_built", "why", "loads"),
    [
        pytest.param("cuda", True, None, True, id="built"),
        pytest.param("cuda", False, None, False, id="not built"),
        pytest.param("cuda", True, "of somebody else", False, id="not usable"),
        pytest.param("cpu", True, None, False, id="a CPU"),
    ],
)
def test_a_run_on_a_gpu_loads_what_is_built(
    device: str, is_built: bool, why: str | None, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built for `dispatch` and `combine`, and what cannot be used does not stop a run."""
    calls: list[None] = []
    monkeypatch.setattr(extension, "is_built", lambda device: is_built)
    monkeypatch.setattr(extension, "why_unavailable", lambda device: why)
    monkeypatch.setattr(extension, "load", lambda: calls.append(None))
    extension.load_if_built(torch.device(device))
    assert len(calls) == loads


def test_only_a_gpu_sorts_and_sums_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the CUDA half is loaded, up to as many experts as its blocks have memory for."""
    cuda = torch.device("cuda", 0)
    for most in (0, 512, 1024):
        monkeypatch.setattr(extension, "_most_sorted", most)
        assert extension.computes(cuda) == (most > 0) and not extension.computes(CPU)
        assert [extension.sorts(cuda, E) for E in (1, 512, 513, 1024, 1025)] == [
            most >= E for E in (1, 512, 513, 1024, 1025)
        ]
        assert not extension.sorts(CPU, 1)


@pytest.mark.gpu
def test_a_gpu_is_served_by_a_build_for_it() -> None:
    """The label says for which."""
    major, minor = torch.cuda.get_device_capability()
    assert extension.visible_architectures() == (f"{major}{minor}",)
    assert extension.load() == extension.visible_architectures()
    assert extension.label(torch.device("cuda", 0)) == f"cuda_ext:sm_{major}{minor}"
    assert extension.computes(torch.device("cuda", 0)) and extension.sorts(torch.device("cuda", 0), 512)


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
