"""How fast a trace is written and analysed, and in how much memory.

    python -m benchmarks.traces --token-layers 10000000

Writes a made-up trace of 16 layers with 8 of 64 experts a token (a token likes the experts of the one before; four
texts like different experts), then runs `moe-lab analyze` on it: the policies LRU, least-stale, LFU, static and Belady
at eight capacities, in caches of the layers and in one for all, unique experts, placement and ranks. With --write-only
it writes the trace and reads it back layer by layer: the memory of that does not grow with the number of layers, nor
with that of the tokens but for one layer's.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of

_L, _E, _K, _S = 16, 64, 8, 512  # layers, experts, experts of a token, tokens of a sequence
_BLOCK = 40 * _S
_ANALYSE = (
    "expert_cache.policy=lru,least_stale,lfu,static,belady",
    "expert_cache.prefetch=none",
    "expert_cache.capacity=8,12,16,24,32,40,48,56",
    "analysis/specialisation=null",
)


def _block(rng: np.random.Generator) -> np.ndarray:
    """Routes of some tokens of one layer, int16 [T, K]; the sequences are of four texts in turn."""
    text_T = np.arange(_BLOCK) // _S % 4
    scores_TE = rng.gumbel(size=(_BLOCK, _E)).astype(np.float32)
    scores_TE[1:] += scores_TE[:-1] / 2
    scores_TE += rng.normal(size=(4, _E)).astype(np.float32)[text_T]
    return np.argpartition(-scores_TE, _K, axis=1)[:, :_K].astype(np.int16)


def write(path: Path, token_layers: int) -> int:
    """Write the trace; returns its tokens. Blocks after the first are the first, begun elsewhere."""
    rng = np.random.default_rng(0)
    blocks, n = [_block(rng) for _ in range(_L)], 0
    with TraceWriter(path, [Layer(layer, _E, _K, 12_582_912) for layer in range(_L)], domains=list("abcd")) as writer:
        while n * _L < token_layers:
            sequence = (n + np.arange(_BLOCK)) // _S
            tokens = tokens_of(sequence, np.arange(_BLOCK) % _S, "prefill", domain=sequence % 4)
            shift = 4 * _S * int(rng.integers(_BLOCK // (4 * _S)))
            writer.add(tokens, [np.roll(block, shift, axis=0) for block in blocks])
            n += _BLOCK
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-layers", type=int, default=10_000_000)
    parser.add_argument("--write-only", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, begun = Path(folder) / "x.trace", time.perf_counter()
        n = write(path, given.token_layers)
        wall = time.perf_counter() - begun
        print(f"{n * _L:,} token-layers written in {wall:.0f} s, {path.stat().st_size / 1e6:,.0f} MB")
        if given.write_only:
            begun = time.perf_counter()
            with Trace(path) as trace:
                used = sum(int((trace.ids(index) >= 0).sum()) for index in range(_L))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"{used:,} slots read in {time.perf_counter() - begun:.0f} s; this process had {peak:.2f} GB at most")
            return
        begun = time.perf_counter()
        command = [sys.executable, "-m", "moe_lab", "analyze", str(path), *_ANALYSE]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        wall, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
        print(f"analysed in {wall:.0f} s ({cpu:.0f} s of CPU); the largest process had {peak:.2f} GB at most")


if __name__ == "__main__":
    main()
