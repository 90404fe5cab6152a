"""What every test shares: one torch thread, markers that skip with a reason, and the list of skips at the end."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts import cluster
from tests import thinning

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on CPU tensors
    torch.set_num_threads(1)  # xdist runs a process per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so for the processes that tests start
    from tests import interpreting

    interpreting.faster()

# Slots of sweeps claim CPUs for themselves (sweep/slots.py); tests that run at the same time are not to wait for them.
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="moe-lab-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)

# Hundreds of processes are started here: what they import is compiled once, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The background job of a shell ignores Ctrl-C, and so would it and the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) for torch.compile")


@pytest.fixture
def device() -> torch.device:
    """The device for kernels: CUDA where there is one, else the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension cannot be built, so router=cuda_ext is unavailable."""
    monkeypatch.setenv("CXX", "no-such-compiler")


def _started(kind: type[cluster.Cluster]) -> Iterator[cluster.Cluster]:
    """A cluster of the tests' own. Not in pytest's folder: the path of a socket has to be short."""
    if (reason := kind.lacking()) is not None:
        pytest.skip(reason)
    started = kind(Path(tempfile.mkdtemp(prefix="cluster-")))
    try:
        started.up()
    except cluster.ClusterError as error:
        pytest.skip(str(error))
    yield started
    started.down()


@pytest.fixture(scope="session")
def _slurm() -> Iterator[cluster.Cluster]:
    yield from _started(cluster.Slurm)


@pytest.fixture(scope="session")
def _ray() -> Iterator[cluster.Cluster]:
    yield from _started(cluster.Ray)


@pytest.fixture
def slurm_cluster(_slurm: cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> cluster.Cluster:
    """A Slurm cluster of two nodes with one CPU each, which this process and what it starts find."""
    for key, value in _slurm.environment().items():
        monkeypatch.setenv(key, value)
    return _slurm


@pytest.fixture
def ray_cluster(_ray: cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> cluster.Cluster:
    """A Ray cluster of two nodes with one CPU each, which this process and what it starts find."""
    for key, value in _ray.environment().items():
        monkeypatch.setenv(key, value)
    return _ray


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked so; thin out what is left; skip `gpu` tests where there is no CUDA device."""
    for item in items:
        for marker in item.iter_markers("skip_where"):
            assert isinstance(item, pytest.Function)
            if marker.args[0](item.callspec.params):
                item.add_marker(pytest.mark.skip(**marker.kwargs))
    thinning.thin(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """Every run collects garbage, and would look for a second through what pytest and the imports hold."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton's library says at the end what was not freed


@pytest.fixture(autouse=True)
def _no_leftover_defaults() -> Iterator[None]:
    """A test that changes torch's global defaults is a defect; so is code that leaves them changed."""
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == before
