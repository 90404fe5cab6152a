"""The custom ops: one record of each (`OPS`), and which kernels can run where."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from moe_lab.errors import UnavailableError

library = torch.library.Library("moe_lab", "FRAGMENT")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """As torch.compiler.assume_constant_result, which imports the compiler: more than a second of every process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_IS_ASKED_OF_COMPILED = ContextVar("is_asked_of_compiled", default=False)


@contextmanager
def asked_of(execution: str) -> Iterator[None]:
    """Inside, who says what computes a pass says it of a pass of this execution (`is_compiled`)."""
    token = _IS_ASKED_OF_COMPILED.set(execution == "compile")
    try:
        yield
    finally:
        _IS_ASKED_OF_COMPILED.reset(token)


def is_compiled() -> bool:
    """Whether the pass that is computed, or asked about, is a compiled one."""
    return torch.compiler.is_compiling() or _IS_ASKED_OF_COMPILED.get()


@dataclass(frozen=True)
class Op:
    """One op `torch.ops.moe_lab.<name>`.

    Attributes:
        schema: torch's; ONNX's follows from it. Tensors are inputs, numbers and bools attributes, and a string (who
            computes it) is left out.
        compute: on CPU and CUDA tensors; with an argument `implementation` it says which kernel.
        fake: output shapes and dtypes of fake tensors.
        reference: the same in plain torch, where `compute` may be something else.
        onnx: the module whose `body(opset)` gives the onnxscript function that is the op in an exported graph; by name,
            for it needs onnxscript. None: the op cannot be exported.
    """

    name: str
    schema: torch.FunctionSchema
    compute: Callable[..., Any]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    onnx: str | None


OPS: dict[str, Op] = {}
"""Every op that has been imported, by name."""


def register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    reference: Callable[..., Any] | None = None,
    onnx: str | None = None,
) -> None:
    """Make the op of `schema` (torch's notation); the arguments are those of `Op`."""
    name = library.define(schema)
    for device in ("CPU", "CUDA"):  # on a CPU Triton's interpreter runs kernels, for tests
        library.impl(name, compute, device)
    torch.library.register_fake(f"moe_lab::{name}", fake, lib=library)
    parsed = getattr(torch.ops.moe_lab, name).default._schema
    OPS[name] = Op(name, parsed, compute, fake, reference or compute, onnx)


def call(name: str, *arguments: Any) -> Any:
    """The op `moe_lab::<name>` of `OPS`.

    An eager pass calls its Python function at once: the way through torch's dispatcher and back into Python takes 7 us
    of the host's time, more than the launch of a kernel (docs/results/h200/eager.md).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # a mode, as of fake tensors, looks on
        return getattr(torch.ops.moe_lab, name)(*arguments)
    return OPS[name].compute(*arguments)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By their names in a configuration."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A constant, so that torch.compile can trace what depends on it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def is_exporting() -> bool:
    """Whether a graph is exported, which is to hold an op as one node; torch 2.11 says so of torch.compile too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def triton_interprets() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of an NVIDIA GPU, (0, 0) of anything else."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def resolve_implementation(asked: str, device: torch.device, *, op: str) -> str:
    """`torch` or `triton`: what `asked` (auto, torch, triton) means for `op` on `device`.

    Raises:
        UnavailableError: Triton was asked for and cannot run here.
    """
    on_gpu = device.type == "cuda"
    if asked == "auto":
        return "triton" if on_gpu and HAS_TRITON else "torch"
    if asked == "triton" and not HAS_TRITON:
        raise UnavailableError(f"{op}: the Triton implementation needs the package triton (pip install triton)")
    if asked == "triton" and not (on_gpu or triton_interprets()):
        raise UnavailableError(f"{op}: the Triton implementation needs device=cuda (this run is on {device.type})")
    assert asked in ("torch", "triton"), asked
    return asked
