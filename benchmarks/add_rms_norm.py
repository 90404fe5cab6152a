"""Compares add_rms_norm's Triton kernel with the rate of a large copy, on a CUDA device.

    python -m benchmarks.add_rms_norm --out outputs/add_rms_norm.csv

Timed as CUDA graphs: hot (20 calls in one graph, divided by 20) and cold (L2 flushed before each call). The kernel
reads two tensors and writes two. `share` is its rate divided by the rate of a 1 GiB copy (bytes read and written).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import triton
from torch import Tensor, nn

from moe_lab.measure.clocks import make_step
from moe_lab.models import Output
from moe_lab.ops.add_rms_norm import add_rms_norm

SHAPES = [(4096, 4096), (16384, 2048), (16384, 4096), (16384, 7168), (65536, 2880)]


class AddRMSNorm(nn.Module):
    """y = RMSNorm(x + residual) of one shape."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.residual = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        self.weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Output:
        """One call of the op."""
        y, *_ = add_rms_norm(x, self.residual, self.weight, 1e-6, implementation="triton")
        return Output(y, ())


def copy_rate() -> float:
    """Bytes read and written in a second."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    ms = triton.testing.do_bench(lambda: y.copy_(x), return_mode="median")
    return 2 * x.numel() / (ms * 1e-3)


def main() -> None:
    """Print a row for each shape and state of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    rate, rows = copy_rate(), []
    for shape in SHAPES:
        model, x = AddRMSNorm(*shape), torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for cache in ("hot", "cold"):
            ms = float(np.median(make_step("cuda_graph", cache, model, x).time_block(40).ms))
            n_bytes = model(x).y.numel() * 2 * 4
            rows.append((*shape, "bf16", cache, ms * 1e3, n_bytes / (ms * 1e-3) / rate, rate / 1e12))
    found = pd.DataFrame(rows, columns=["rows", "width", "dtype", "cache", "us", "share_of_copy", "copy_TB_per_s"])
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    print(found.round(3).to_string(index=False))
    if args.out:
        found.assign(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__).round(
            4
        ).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
