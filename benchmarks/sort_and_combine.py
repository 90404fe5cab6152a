"""Times the ops `sort` and `combine` of the extension beside torch's way and their floors, on a CUDA device.

    python -m benchmarks.sort_and_combine --out outputs/sort_and_combine.csv

Timed as CUDA graphs: hot (20 calls in one graph, divided by 20) and cold (L2 flushed before each call). `torch_us`
is what computes without the extension: a stable sort, or a gather and a sum. The floor is the bytes that must be read
and written at the rate of a 1 GiB copy; `share` is the floor divided by the time. Few bytes take no less than the
launch of an empty kernel, about 0.8 us.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.add_rms_norm import copy_rate
from moe_lab.config.compose import compose
from moe_lab.measure.clocks import make_step
from moe_lab.models import Output
from moe_lab.ops import combine, dispatch, extension

SHAPES = ("demo", "olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3")
TOKENS = (1, 8, 64, 512, 4096, 16384)


class Sort(nn.Module):
    """Ids [T, K] sorted by expert."""

    def __init__(self, n_experts: int, by: str):
        super().__init__()
        self.n_experts, self.by = n_experts, by

    def forward(self, ids_TK: Tensor) -> Output:
        """One call."""
        if self.by == "torch":
            return Output(dispatch.dispatch_by_torch(ids_TK, self.n_experts).perm_N, ())
        return Output(torch.ops.moe_lab.sort(ids_TK, self.n_experts)[2], ())


class Combine(nn.Module):
    """The sum of sorted rows [N, D], or of pieces of them [pieces, N, D]."""

    def __init__(self, ids_TK: Tensor, n_experts: int, by: str):
        super().__init__()
        self.ids_TK, self.by = ids_TK, by
        self.inverse_N = dispatch.dispatch_by_torch(ids_TK, n_experts).inverse_N
        self.weights_TK = torch.rand(ids_TK.shape, device="cuda")

    def forward(self, o: Tensor) -> Output:
        """One call."""
        if self.by == "torch":
            o_ND = o if o.dim() == 2 else o.sum(0)
            return Output(combine.combine_by_torch(o_ND, self.inverse_N, self.weights_TK, self.ids_TK >= 0), ())
        y_TD = torch.ops.moe_lab.combine(o, self.inverse_N, self.ids_TK, self.weights_TK, torch.bfloat16)
        return Output(y_TD, ())


def median_us(model: nn.Module, x: Tensor, cache: str) -> float:
    """Of 40 replays."""
    return float(np.median(make_step("cuda_graph", cache, model, x).time_block(40).ms)) * 1e3


def row(op: str, models: list[nn.Module], x: Tensor, cache: str, n_bytes: int, rate: float) -> dict[str, object]:
    """`models`: by the extension, by torch."""
    us, torch_us = (median_us(model, x, cache) for model in models)
    floor = n_bytes / rate * 1e6
    return {"op": op, "cache": cache, "us": us, "torch_us": torch_us, "floor_us": floor, "share": floor / us}


def rows_of(shape: str, T: int, rate: float) -> list[dict[str, object]]:
    """Both ops at one size; of few tokens also the sum of seven float32 pieces."""
    sizes = compose(["model=moe_layer", f"model/shape={shape}"]).model.shape
    E, K, D = sizes.n_experts, sizes.top_k, sizes.d_model
    ids_TK = torch.rand(T, E, device="cuda").argsort(-1)[:, :K].int()
    rows = []
    for cache in ("hot", "cold"):
        sorts = [Sort(E, by) for by in ("extension", "torch")]
        rows.append({"pieces": 0} | row("sort", sorts, ids_TK, cache, 4 * (3 * T * K + 2 * E + 1), rate))
        for pieces in (1, 7) if T <= 8 else (1,):
            o = torch.randn(T * K, D, device="cuda", dtype=torch.bfloat16)
            if pieces > 1:
                o = o.float().expand(pieces, -1, -1).contiguous()
            sums = [Combine(ids_TK, E, by) for by in ("extension", "torch")]
            n_bytes = o.numel() * o.element_size() + 2 * T * D + 12 * T * K
            rows.append({"pieces": pieces} | row("combine", sums, o, cache, n_bytes, rate))
    return [{"shape": shape, "T": T, "E": E, "K": K, "D": D} | each for each in rows]


def main() -> None:
    """Print a row for each op, size and state of the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a CSV file (default: none is written)")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="options of model/shape (default: all)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="in place of 1 to 16384")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    extension.load()
    rate = copy_rate()
    with torch.inference_mode():
        found = pd.DataFrame([each for shape in args.shapes for T in args.tokens for each in rows_of(shape, T, rate)])
    found = found.assign(copy_TB_per_s=rate / 1e12).round(3)
    print(torch.cuda.get_device_name(), torch.__version__)
    print(found.to_string(index=False))
    if args.out:
        found.assign(device=torch.cuda.get_device_name(), torch=torch.__version__).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
