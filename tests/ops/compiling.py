"""Compiles Triton kernels for a GPU where there is none: the interpreter runs much that does not compile.

In a process of its own, for it must start without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SM_90 = ("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes that a block may have there
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def assert_compiles(launches: Callable[[], None], folder: Path) -> None:
    """Every launch in `launches`, a function of a module, compiles for an H100; none is run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = f"from tests.ops.compiling import main; main({launches.__module__!r}, {launches.__name__!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def main(module: str, launches: str) -> None:
    """In the process: call it with launches replaced, and print how many there were."""
    from triton.runtime.jit import JITFunction

    count = 0

    def launch_on(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        nonlocal count
        count += 1
        return partial(_compile, kernel)

    JITFunction.__getitem__ = launch_on  # type: ignore[method-assign]
    getattr(importlib.import_module(module), launches)()
    print(count)


def _compile(kernel: Any, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
    """As a launch with these arguments compiles it; a 1 is a constant of the kernel then."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    if "DEPENDENT" in values:  # ops/dependent_launch.py: so they are launched on an H100, and not where they compile
        values["DEPENDENT"] = values["launch_pdl"] = True
    signature, constants = {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[parameter.name] = "i32"
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": values.get("launch_pdl", False)}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget(*SM_90), options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED_MEMORY, f"{kernel.__name__} needs {shared} bytes of shared memory"
