"""Times the kernels of a decoding step on a GPU: products of a few rows beside torch's, and attention of one token.

    python -m benchmarks.decode_kernels

Products are the projections of many layers one after the other, so that the L2 cache holds few of their weights, each
fed by the one before. Attention is that of many caches in turn, for the same reason. All is one CUDA graph, timed from
its first to its last kernel; a figure is the median of 30 replays. The floor is the bytes at the rate of a large copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.measure.clocks import make_step
from moe_lab.measure.roofline import measured_peaks
from moe_lab.models import Output
from moe_lab.ops import extension
from moe_lab.ops.decode_attention import cached_attention, rope_append
from moe_lab.ops.gemv import gemv
from moe_lab.ops.one_token_attention import one_token_attention

PRODUCTS = {
    "olmoe_1b_7b, q k v and o of 16 layers": [(6144, 2048), (2048, 2048)] * 16,
    "qwen3_30b_a3b, q k v and o of 12 layers": [(5120, 2048), (2048, 4096)] * 12,
    "mixtral_8x7b, q k v and o of 8 layers": [(6144, 4096), (4096, 4096)] * 8,
    "qwen3_30b_a3b, head": [(151936, 2048)],
}
"""[N, K] of the weights."""
ATTENTION = {"olmoe_1b_7b": (16, 16, 128), "qwen3_30b_a3b": (32, 4, 128), "mixtral_8x7b": (32, 8, 128)}
"""Heads of queries, heads of keys, width of a head."""
ROWS = (1, 2, 8)
SEQUENCES, POSITIONS = (1, 8, 64), (128, 2048, 8192)
"""Positions are those before the token."""
AT_ONCE = 5e8
"""Bytes of caches in a graph, ten times the L2 cache of an H200, in at least 2 of them and in at most 512."""
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


class Chain(nn.Module):
    """`call` of a copy of x. The copy is a kernel for the first one to depend on, for some are launched dependently."""

    def __init__(self, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Output:
        return Output(self.call(x.clone()), ())


def replay_us(call: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 30) -> float:
    """Median microseconds of a replay."""
    return float(np.median(make_step("cuda_graph", "natural", Chain(call), x).time_block(repeats).ms)) * 1e3


def multiplied(by: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], x: Tensor) -> Tensor:
    """x times all weights, of each product the first elements, as many as the next takes."""
    for weight in weights:
        x = by(x.flatten()[: len(x) * weight.shape[1]].view(len(x), -1), weight)
    return x


def products(bytes_per_us: float) -> None:
    """A line for each list of weights and number of rows."""
    for (name, shapes), rows in product(PRODUCTS.items(), ROWS):
        weights = [torch.randn(n, k, **BF16) / k**0.5 for n, k in shapes]
        x = torch.randn(rows, shapes[0][1], **BF16)
        ours, by_torch = multiplied(gemv, weights, x).float(), multiplied(F.linear, weights, x).float()
        error = float((ours - by_torch).norm() / by_torch.norm())
        assert error < 0.1, f"{name}: gemv computes something else, relative error {error:.1e}"
        torch_us = replay_us(lambda x, weights=weights: multiplied(F.linear, weights, x), x)
        gemv_us = replay_us(lambda x, weights=weights: multiplied(gemv, weights, x), x)
        floor = sum(weight.nbytes for weight in weights) / bytes_per_us
        print(f"{name}, {rows} rows: torch {torch_us:.1f} us, gemv {gemv_us:.1f} us, floor {floor:.1f} us", flush=True)


def by_triton(q: Tensor, k: Tensor, v: Tensor, *kept: Any) -> Tensor:
    """What `one_token_attention` computes, by the other kernels."""
    tables, position_1, k_BHNd, v_BHNd = kept
    q_BHd = rope_append(q, k, v, None, None, 0.0, None, tables, position_1, k_BHNd, v_BHNd)
    return cached_attention(q_BHd, k_BHNd, v_BHNd, position_1, None)


def in_one_launch(q: Tensor, k: Tensor, v: Tensor, *kept: Any) -> Tensor:
    return one_token_attention(q, k, v, None, None, 0.0, None, *kept)


def fed(way: Callable[..., Tensor], kept: Any, caches: list[Tensor], q: Tensor) -> Tensor:
    """What the last cache gives, each fed by the one before."""
    for k_BHNd, v_BHNd in caches:
        n = k_BHNd.shape[1] * k_BHNd.shape[3]
        q = way(q, q[:, :n], q[:, -n:], *kept, k_BHNd, v_BHNd).flatten(1)
    return q


def attention(bytes_per_us: float) -> None:
    """A line for each shape and size."""
    for (name, (H, H_KV, d)), B, context in product(ATTENTION.items(), SEQUENCES, POSITIONS):
        of_a_position = 4 * B * H_KV * d  # bytes: a key and a value
        n_caches = min(max(round(AT_ONCE / of_a_position / context), 2), 512)
        caches = [torch.randn(2, B, H_KV, context + 16, d, **BF16) for _ in range(n_caches)]
        kept = (torch.ones(1, d, device="cuda"), torch.zeros(1, d, device="cuda")), torch.tensor([context]).cuda()
        x = torch.randn(B, H * d, **BF16)
        us = {
            way.__name__: replay_us(partial(fed, way, kept, caches), x) / n_caches for way in (by_triton, in_one_launch)
        }
        times = ", ".join(f"{way} {time:.2f} us" for way, time in us.items())
        floor = of_a_position * (context + 1) / bytes_per_us
        print(f"{name}, batch {B}, {context} positions: {times}, floor {floor:.2f} us", flush=True)
        del caches  # before the next ones are made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    extension.load()
    bytes_per_us = measured_peaks(torch.device("cuda"), torch.bfloat16)["bytes_per_s"] / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {bytes_per_us / 1e6:.2f} TB/s")
    with torch.inference_mode():
        products(bytes_per_us)
        attention(bytes_per_us)


if __name__ == "__main__":
    main()
