"""What the torch.library ops share: the namespace `moe_lab`, and which kernels can run where."""

from __future__ import annotations

import importlib.util
import os

import torch

from moe_lab.errors import UnavailableError

library = torch.library.Library("moe_lab", "FRAGMENT")


# A constant, so that torch.compile can trace what depends on it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
