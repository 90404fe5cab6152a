"""routers/base.py, `compute_on`: who computes a router on a device, and what auto means there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config  # reads $CXX when it is first imported: not while a test has changed it

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.ops import extension, library
from moe_lab.routers import base
from moe_lab.routers.base import Router, fastest
from tests import quick
from tests.routers import cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine with one H200, Triton and compilers, where nothing was built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(extension, "visible_architectures", lambda: ("90",))
    monkeypatch.setattr(extension, "find_nvcc", lambda: "/bin/true")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(library, "HAS_TRITON", True)


def chosen(router: Router, device: torch.device = CUDA) -> str:
    return router.compute_on(device, load=False).implementation()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["torch", "sinkhorn", "deepseek_v3", "loss_free"])
def test_auto_is_the_extension_where_it_can_be_built(name: str) -> None:
    """The name of the option fixes nothing here: every router with kernels of all three."""
    router = cases.make(name, 16, 2, impl="auto")
    assert chosen(router) == "cuda_ext:sm_90" and router.impl == "cuda_ext" and router.fallback is None
    assert fastest(CUDA) == "cuda_ext"
    assert chosen(router, CPU) == "torch"


@pytest.mark.usefixtures("hopper")
def test_auto_takes_the_next_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc Triton, without Triton torch; for more experts than its kernels take not the extension."""
    assert chosen(cases.make("torch", 1025, 2, impl="auto")) == "triton"
    monkeypatch.setattr(extension, "find_nvcc", lambda: None)
    router = cases.make("torch", 16, 2, impl="auto")
    assert chosen(router) == fastest(CUDA) == "triton" and router.fallback is None
    monkeypatch.setattr(library, "HAS_TRITON", False)
    assert chosen(router) == fastest(CUDA) == "torch"


@pytest.mark.usefixtures("hopper")
def test_what_did_not_compile_is_said() -> None:
    """Auto goes on to Triton and knows why; who asks for the extension gets the error."""
    marker = extension.binary(("90",)).with_suffix(".failed")
    marker.parent.mkdir(parents=True)
    marker.write_text("the extension does not compile: sorrow")
    router = cases.make("torch", 16, 2, impl="auto")
    assert chosen(router) == "triton" and "does not compile: sorrow" in str(router.fallback)
    assert fastest(CUDA) == "triton"
    with pytest.raises(UnavailableError, match="does not compile: sorrow"):
        cases.make("torch", 16, 2, impl="cuda_ext").compute_on(CUDA)


def test_a_kernel_computes_nothing_before_it_was_decided() -> None:
    """It is not replaced by torch in silence."""
    router = cases.make("torch", 5, 2, impl="triton")
    with pytest.raises(AssertionError, match="undecided"):
        router.select(torch.zeros(3, 5))


def test_a_router_of_ones_own_says_the_order() -> None:
    """The first of its implementations."""

    class Mine(Router):
        implementations = ("mine", "torch")

    assert Mine(7, 3).compute_on(CPU).implementation() == "mine"
    assert Mine(7, 3, impl="torch").compute_on(CPU).implementation() == "torch"


@pytest.mark.parametrize("option", ["router=mixtral", "router=sinkhorn", "router=capacity"])
def test_the_api_gives_the_router_of_a_run(option: str) -> None:
    """The same implementation, whatever the process's default device is."""
    cfg = quick.compose("decoder_moe", option)
    with torch.device("meta"):
        router = moe_lab.build_router(cfg)
    (layer, *_) = (module for module in moe_lab.build_model(cfg).modules() if isinstance(module, Router))
    assert router.implementation() == layer.implementation() == "torch"
    assert all(tensor.device == CPU for tensor in router.state_dict().values())


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["mixtral", "sinkhorn", "deepseek_v3"])
def test_on_a_gpu_the_api_gives_the_router_of_a_run(option: str) -> None:
    """On the device of the configuration, by the extension, with its fused gate."""
    cfg = moe_lab.compose(["model=decoder_moe", "model.n_experts=8", f"router={option}", "device=cuda", "dtype=bf16"])
    if option == "deepseek_v3":
        cfg.router.n_groups = cfg.router.top_groups = 1
    router = moe_lab.build_router(cfg)
    (layer, *_) = (module for module in moe_lab.build_model(cfg).modules() if isinstance(module, Router))
    assert router.implementation() == layer.implementation() == extension.label(CUDA)
    gate_ED = torch.zeros(8, 512, device="cuda", dtype=torch.bfloat16)
    assert router.multiplies_gate(1, gate_ED, gate_ED.dtype) == layer.multiplies_gate(1, gate_ED, gate_ED.dtype)


def test_a_run_whose_extension_does_not_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its row, which names who computed instead."""
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho sorrow >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "visible_architectures", lambda: ())
    monkeypatch.setattr(base, "FASTEST_FIRST", {"cpu": ("cuda_ext", "torch")})
    monkeypatch.setattr("moe_lab.routers.selection.FASTEST_FIRST", {"cpu": ("cuda_ext", "torch")})
    extension._load.cache_clear()
    try:
        record = moe_lab.run(quick.compose("decoder_moe", "router=mixtral"), tmp_path / "run")
    finally:
        extension._load.cache_clear()
    assert record.status == "ok" and record.implementation["router"] == "torch"
    (warning,) = (text for text in record.warnings if "router.impl=auto" in text)
    assert warning.startswith("router.impl=auto uses torch: ") and "does not compile: sorrow" in warning
