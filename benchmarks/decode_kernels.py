"""Times the kernels of a decoding step on a GPU: products of one row beside torch's, and attention of one token.

    python -m benchmarks.decode_kernels

Products are the projections of many layers one after the other, so that the L2 cache holds few of their weights, each
fed by the one before. Attention is that of several caches in turn. All is captured in a CUDA graph and replayed; a
figure is the median of 30 replays. The floor is the bytes at the rate of a large copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.measure.roofline import measured_peaks
from moe_lab.ops.decode_attention import cached_attention
from moe_lab.ops.gemv import gemv

PRODUCTS = {
    "olmoe_1b_7b, q k v and o of 16 layers": [(6144, 2048), (2048, 2048)] * 16,
    "qwen3_30b_a3b, q k v and o of 12 layers": [(5120, 2048), (2048, 4096)] * 12,
    "mixtral_8x7b, q k v and o of 8 layers": [(6144, 4096), (4096, 4096)] * 8,
    "qwen3_30b_a3b, head": [(151936, 2048)],
}
"""[N, K] of the weights."""
ATTENTION = {"olmoe_1b_7b": (16, 16, 128), "qwen3_30b_a3b": (32, 4, 128), "mixtral_8x7b": (32, 8, 128)}
"""Heads of queries, heads of keys, width of a head."""
SIZES = ((1, 128), (1, 2048), (1, 8192), (8, 2048), (64, 2048))
"""Sequences, positions before the token."""
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def replay_us(run: Callable[[], Tensor], repeats: int = 30) -> float:
    """Median microseconds of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[repeats // 2]


def products(bytes_per_us: float) -> None:
    """A line for each list of weights."""
    for name, shapes in PRODUCTS.items():
        weights = [torch.randn(n, k, **BF16) / k**0.5 for n, k in shapes]
        x = torch.randn(1, max(k for _, k in shapes), **BF16)

        def chain(product: Callable[..., Tensor], weights: list[Tensor] = weights, x: Tensor = x) -> Tensor:
            y = x
            for weight in weights:
                y = product(y[:, : weight.shape[1]], weight)
            return y

        floor = sum(weight.nbytes for weight in weights) / bytes_per_us
        by_torch, ours = replay_us(lambda: chain(F.linear)), replay_us(lambda: chain(gemv))
        print(f"{name}: torch {by_torch:.1f} us, gemv {ours:.1f} us, floor {floor:.1f} us", flush=True)


def attention(bytes_per_us: float) -> None:
    """A line for each shape and size."""
    for name, (H, H_KV, d) in ATTENTION.items():
        for B, context in SIZES:
            N = context + 16
            n_caches = max(1, min(16, int(6e9 / (4 * B * H_KV * N * d))))
            caches = [torch.randn(2, B, H_KV, N, d, **BF16) for _ in range(n_caches)]
            q, position = torch.randn(B, H, d, **BF16), torch.tensor([context], device="cuda")

            def run(caches: list[Tensor] = caches, q: Tensor = q, position: Tensor = position) -> Tensor:
                return torch.stack([cached_attention(q, *cache, position, None) for cache in caches])

            us, floor = replay_us(run) / n_caches, 4 * B * H_KV * (context + 1) * d / bytes_per_us
            print(f"{name}, batch {B}, {context} positions: {us:.2f} us, floor {floor:.2f} us", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    bytes_per_us = measured_peaks(torch.device("cuda"), torch.bfloat16)["bytes_per_s"] / 1e6
    products(bytes_per_us)
    attention(bytes_per_us)


if __name__ == "__main__":
    main()
