"""Which implementation an op takes where."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.ops import library


@pytest.fixture(params=[pytest.param(True, id="interpreter"), pytest.param(False, id="no interpreter")])
def interprets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Triton's interpreter on or off."""
    if request.param:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return bool(request.param)


@pytest.mark.usefixtures("interprets")
@pytest.mark.parametrize(
    ("asked", "device", "has_triton", "expected"),
    [
        pytest.param("auto", "cpu", True, "torch", id="auto on a cpu"),
        pytest.param("auto", "cuda", True, "triton", id="auto on cuda"),
        pytest.param("auto", "cuda", False, "torch", id="auto on cuda without triton"),
        pytest.param("torch", "cpu", True, "torch", id="torch on a cpu"),
        pytest.param("torch", "cuda", True, "torch", id="torch on cuda"),
        pytest.param("triton", "cuda", True, "triton", id="triton on cuda"),
    ],
)
def test_what_is_asked_for_is_what_runs(
    asked: str, device: str, has_triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto takes Triton on CUDA alone, interpreter or not; a named implementation is itself."""
    monkeypatch.setattr(library, "HAS_TRITON", has_triton)
    assert library.resolve_implementation(asked, torch.device(device), op="some_op") == expected


def test_triton_runs_on_a_cpu_only_under_its_interpreter(interprets: bool) -> None:
    """On a CPU a named Triton is taken with the interpreter and refused, naming op and device, without it."""
    assert library.triton_interprets() is interprets
    if interprets:
        assert library.resolve_implementation("triton", torch.device("cpu"), op="some_op") == "triton"
    else:
        with pytest.raises(UnavailableError, match=r"some_op.*device=cuda.*cpu"):
            library.resolve_implementation("triton", torch.device("cpu"), op="some_op")


@pytest.mark.usefixtures("interprets")
@pytest.mark.parametrize("device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda")])
def test_triton_that_is_not_installed_is_unavailable(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback: the error names the op and the package."""
    monkeypatch.setattr(library, "HAS_TRITON", False)
    with pytest.raises(UnavailableError, match=r"some_op.*pip install triton"):
        library.resolve_implementation("triton", torch.device(device), op="some_op")


def test_triton_is_where_importlib_finds_it() -> None:
    """The constant is importlib's answer."""
    found = importlib.util.find_spec("triton") is not None
    assert found is library.HAS_TRITON


@pytest.mark.parametrize(
    "op", [pytest.param("add_rms_norm", id="add_rms_norm"), pytest.param("segment_mm", id="segment_mm")]
)
def test_ops_are_registered_under_moe_lab(op: str) -> None:
    """Each op has a schema that mutates nothing and takes its implementation by name."""
    import moe_lab.ops.add_rms_norm
    import moe_lab.ops.segment_mm  # noqa: F401

    schema = getattr(torch.ops.moe_lab, op).default._schema
    assert not schema.is_mutable
    assert schema.arguments[-1].name == "implementation"


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    """For the compiler, which is not imported for that."""
    assert vars(library.constant_when_compiled(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1))


@pytest.mark.parametrize(
    ("execution", "expected"), [pytest.param("compile", True, id="compile"), pytest.param("eager", False, id="eager")]
)
def test_a_pass_can_be_asked_about_before_it_is_compiled(execution: str, expected: bool) -> None:
    """Inside the block alone."""
    with library.asked_of(execution):
        assert library.is_compiled() is expected
    assert not library.is_compiled()
