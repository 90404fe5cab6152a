"""Grouped matrix product: rows sorted by segment, each segment times a matrix of its own.

    y[n] = x[n] @ w[e].T    for offsets[e] <= n < offsets[e + 1]

Rows after the last offset belong to no segment; what stands in their results is unspecified (finite or not).

Who computes it: on a CPU a loop over the segments in use, on CUDA CUTLASS through torch.nn.functional.grouped_mm for
bf16 (widths that are a multiple of 8), else a Triton kernel. On CUDA none reads the offsets on the host, and none
copies weights anywhere.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops.library import call, register, resolve_implementation

_WHOLE = 8  # rows that MKL's product by a transposed matrix takes at once
_SMALL = 1 << 17  # elements of a matrix: up to here x @ w.T is the fastest, also of a single row


@dataclass(frozen=True)
class _Transposed:
    """Where MKL's (w @ x.T).T is quicker than its x @ w.T in fp32: from `least` rows to `most`, above `small` elements.

    It is at its best for a multiple of 8 rows. So a segment takes the rows beside it along and drops their results,
    from `padded` rows on. In bf16 (oneDNN) x @ w.T is never slower.
    """

    least: int
    most: int
    padded: int
    small: int


# MKL 2024.2 takes other products on other processors. Two EPYC cores, 2048 x 2048: 1.0 ms against 2.6 at 3 rows, 2.2
# against 3.3 at 31, 6.0 against 6.3 at 127. Two Xeon cores, 2048 x 2048: 1.18 ms against 0.61 at 3 rows, 1.17 against
# 1.15 at 6, 1.17 against 1.75 at 12, 1.37 against 1.57 at 24, 2.55 against 2.35 at 64; one core, 1024 x 512: slower.
_TRANSPOSED = {
    "AuthenticAMD": _Transposed(least=2, most=255, padded=6, small=_SMALL),
    "GenuineIntel": _Transposed(least=7, most=48, padded=7, small=1 << 20),
}


@cache
def _transposed() -> _Transposed | None:
    """This processor's; None where nothing was measured."""
    info = Path("/proc/cpuinfo")
    names = info.read_text() if info.exists() else platform.processor()
    return next((found for vendor, found in _TRANSPOSED.items() if vendor in names), None)


def implementation_for(device: torch.device, dtype: torch.dtype, *widths: int) -> str:
    """`loop`, `grouped_mm` or `triton`: who computes `segment_mm` here, for matrices of these widths (D and F).

    grouped_mm is taken where it reads nothing on the host: in bf16, rows of a multiple of 16 bytes.

    Raises:
        UnavailableError: a CUDA run that needs the Triton kernel, without Triton.
    """
    if device.type != "cuda":
        return "loop"
    whole_16_bytes = all(width % 8 == 0 for width in widths)
    if dtype == torch.bfloat16 and whole_16_bytes and torch.cuda.get_device_capability(device) >= (8, 0):
        return "grouped_mm"
    if resolve_implementation("auto", device, op="segment_mm") == "triton":
        return "triton"
    raise UnavailableError(
        f"experts=grouped on CUDA in {dtype} with widths {', '.join(map(str, widths))} needs the package triton "
        "(pip install triton)"
    )


def segment_mm(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor, implementation: str) -> Tensor:
    """[N, F] in x's dtype; fp32 accumulation.

    Args:
        x_ND: [N, D], contiguous, rows sorted by segment.
        w_EFD: [E, F, D], contiguous, of x's dtype.
        offsets_E1: [E + 1] int32, non-decreasing from 0 to at most N.
        implementation: as `implementation_for` gives.

    Raises:
        ValueError: the shapes or dtypes do not match.
    """
    return call("segment_mm", x_ND, w_EFD, offsets_E1, implementation)  # type: ignore[no-any-return]


def reference(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor) -> Tensor:
    """Plain torch, one segment at a time; rows of no segment are 0."""
    y_NF = x_ND.new_zeros(x_ND.shape[0], w_EFD.shape[1])
    bounds = offsets_E1.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            y_NF[start:stop] = x_ND[start:stop] @ w_EFD[expert].T
    return y_NF


def _loop(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor) -> Tensor:
    bounds = offsets_E1.tolist()
    rows = {expert: stop - start for expert, (start, stop) in enumerate(pairwise(bounds)) if start < stop}
    return segment_loop(x_ND, w_EFD, rows)


def segment_loop(x_ND: Tensor, w_EFD: Tensor, rows: Mapping[int, int]) -> Tensor:
    """`segment_mm` on a CPU, where it is known on the host how many `rows` each segment in use has.

    Raises:
        ValueError: as `segment_mm`.
    """
    _check(x_ND, w_EFD)
    (N, D), F_ = x_ND.shape, w_EFD.shape[1]
    y_NF, w_EDF, start = x_ND.new_empty(N, F_), w_EFD.mT, 0
    is_large = x_ND.dtype == torch.float32 and D * F_ > _SMALL
    transposed = _transposed() if is_large else None
    for expert, n in rows.items():
        stop = start + n
        if n == 1 and is_large:
            torch.mv(w_EFD[expert], x_ND[start], out=y_NF[start])
        elif transposed is None or transposed.small >= D * F_ or not transposed.least <= n <= transposed.most:
            torch.mm(x_ND[start:stop], w_EDF[expert], out=y_NF[start:stop])
        else:
            whole = n if n < transposed.padded else min(-(-n // _WHOLE) * _WHOLE, N)
            first = min(start, N - whole)
            product_Fn = torch.mm(w_EFD[expert], x_ND[first : first + whole].T)
            y_NF[start:stop] = product_Fn[:, start - first : stop - first].T
        start = stop
    if start < N:
        y_NF[start:] = 0
    return y_NF


def _check(x_ND: Tensor, w_EFD: Tensor) -> None:
    if x_ND.dim() != 2 or w_EFD.dim() != 3 or x_ND.shape[1] != w_EFD.shape[2] or x_ND.dtype != w_EFD.dtype:
        raise ValueError(
            f"segment_mm: x {tuple(x_ND.shape)} {x_ND.dtype} does not match w {tuple(w_EFD.shape)} {w_EFD.dtype}"
        )


def _check_offsets(offsets_E1: Tensor, w_EFD: Tensor) -> None:
    if offsets_E1.shape != (w_EFD.shape[0] + 1,) or offsets_E1.dtype != torch.int32:
        raise ValueError(f"segment_mm: offsets {tuple(offsets_E1.shape)} {offsets_E1.dtype} must be int32 [E + 1]")


def _compute(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor, implementation: str) -> Tensor:
    _check_offsets(offsets_E1, w_EFD)
    if implementation == "loop":  # which checks the others
        return _loop(x_ND, w_EFD, offsets_E1)
    _check(x_ND, w_EFD)
    if implementation == "grouped_mm":
        return F.grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=offsets_E1[1:])
    assert implementation == "triton", implementation
    from moe_lab.ops.segment_mm_triton import launch

    return launch(x_ND, w_EFD, offsets_E1)


def _fake(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor, implementation: str) -> Tensor:
    _check(x_ND, w_EFD)
    _check_offsets(offsets_E1, w_EFD)
    return x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])


register(
    "segment_mm(Tensor x, Tensor w, Tensor offsets, str implementation) -> Tensor", _compute, _fake, reference=reference
)
