"""Programmatic dependent launch: a kernel is put on the GPU while the one before it still runs (CUDA, sm_90 and later).

A kernel that is launched so (`launch_pdl=True`) calls `begin` before it reads anything that a kernel ahead of it may
still write. Then all kernels ahead have ended, not only the one before it: each of them waits so before it ends. Before
that wait even kernels further ahead may still run, for the one before may let it begin before it has waited. What no
kernel behind a pass's embedding writes may be read before: weights, and for the extension's kernels also cached
positions before the step's own, the position, and the tables of RoPE. The embedding is launched as usual, after all
that is ahead of it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_lab.ops.library import capability


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Let the next kernel start, and wait until all ahead of this one have ended."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@cache
def is_dependent(device: torch.device) -> bool:
    """Whether kernels on `device` are launched so: the value of DEPENDENT and of `launch_pdl`."""
    return capability(device) >= (9, 0)
