"""Compares a checkpoint in moe-lab with the same model in transformers: prefill and decode, in alternating rounds.

    python -m benchmarks.checkpoint_peers --out docs/results/cpu
    python -m benchmarks.checkpoint_peers --path /tmp/olmoe --device cuda --dtype bf16 --execution cuda_graph \\
        --cells decode:1:2048 decode:8:2048

Both load the same folder. Every experts implementation of transformers that runs is timed (eager, batched_mm,
grouped_mm), with `--attention` and, for decode, a StaticCache of the same length. On CUDA it is compiled (mode
reduce-overhead, which uses CUDA graphs); prefill stays eager. A round times every implementation once in shuffled
order; a decode round times some consecutive tokens. The ratio ours / peer is computed within the round; the interval is
that of the median ratio. The logits are compared with those of transformers before the timing.

The exit code is 1 if the interval of the ratio to the fastest peer is above 1.03 in any cell.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import moe_lab
from moe_lab.measure import environment
from moe_lab.measure.statistics import median_interval
from moe_lab.measure.tolerances import exact_products
from moe_lab.runs.built import Built
from moe_lab.runs.run import Run

PEERS = ("eager", "batched_mm", "grouped_mm")
LIMIT = 1.03
STEPS = 16  # decoded tokens in a round
LEAST_S = 0.05  # a prefill is repeated in a round until it takes so long
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(options: argparse.Namespace, phase: str, batch: int, length: int) -> Built:
    """What a run of this project executes; `length` is the prefill's or the context's."""
    sizes = [f"workload.context_len={length}", f"seq_len={STEPS}"] if phase == "decode" else [f"seq_len={length}"]
    source = ["workload=text", f"workload.path={options.text}"] if options.text else ["workload=random"]
    cfg = moe_lab.compose(
        [
            "model=checkpoint",
            "router=native",
            f"model.path={options.path}",
            f"workload.phase={phase}",
            f"device={options.device}",
            f"dtype={options.dtype}",
            f"execution={options.execution}",
            f"batch={batch}",
            *sizes,
            *source,
        ]
    )
    run = Run(cfg)
    run.build()
    return run.made()


def peer_model(options: argparse.Namespace) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.path, dtype=DTYPES[options.dtype], attn_implementation=options.attention
    )
    return model.to(options.device).eval()


class Peer:
    """transformers' model with one experts implementation, on the ids of a run."""

    def __init__(self, model: Any, experts: str, phase: str, ids_BN: Tensor):
        self.model, self.experts, self.phase, self.ids_BN = model, experts, phase, ids_BN
        self.cache: Any = None
        self.forward: Callable[..., Any] = model
        if phase == "prefill":
            return
        self.context = ids_BN.shape[1] - STEPS
        self.model.set_experts_implementation("grouped_mm")  # the context is everybody's; batched_mm needs much memory
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=ids_BN.shape[1])
        model(ids_BN[:, : self.context], past_key_values=self.cache, logits_to_keep=1)
        if ids_BN.is_cuda:
            self.forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        self.token_B1, self.position_1 = ids_BN[:, :1].clone(), torch.tensor([self.context], device=ids_BN.device)

    def choose(self) -> None:
        self.model.set_experts_implementation(self.experts)

    def prefill(self) -> Tensor:
        cache = transformers.DynamicCache(config=self.model.config)
        return self.model(self.ids_BN, past_key_values=cache, logits_to_keep=1).logits

    def step(self, at: int) -> Tensor:
        """Decode the token at `at`; the cache's own count is set back, so that it may be decoded again."""
        self.token_B1.copy_(self.ids_BN[:, at : at + 1])
        self.position_1.fill_(at)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(at) if isinstance(layer.cumulative_length, Tensor) else setattr(
                layer, "cumulative_length", at
            )
        if self.ids_BN.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self.forward(
            self.token_B1, past_key_values=self.cache, position_ids=self.position_1.unsqueeze(0), logits_to_keep=1
        ).logits


def time_cuda(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of `call` by the host's clock, the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="assets/tiny-olmoe")
    parser.add_argument("--text", default="assets/text", help="folder of texts; empty: random token ids")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--execution", default="eager")
    parser.add_argument("--cells", nargs="+", default=["prefill:8:512", "decode:1:256", "decode:8:256"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--attention", default="sdpa", help="of transformers; gpt-oss has no sdpa: eager")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="output folder of checkpoint_peers.csv (every round)")
    options = parser.parse_args()

    env = environment.capture(torch.device(options.device))
    where = env["device_name"] if options.device == "cuda" else f"{env['cpu']}, {env['threads']} threads"
    print(f"command: python -m benchmarks.checkpoint_peers {' '.join(sys.argv[1:])}")
    print(f"machine: {where}")
    print(f"versions: torch {env['torch']}, transformers {transformers.__version__}, Python {env['python']}")
    print(
        f"code: {env['git_sha'] or 'not committed'}{' (dirty)' if env['git_dirty'] else ''}, {options.rounds} rounds\n"
    )
    print(
        f"| cell | ours {options.execution} [ms] | "
        + " | ".join(f"{name} [ms]" for name in options.peers)
        + " | ours / best [95 %] |"
    )
    print("|---|" + "---|" * (len(options.peers) + 2))
    rows, slower = [], False
    model = peer_model(options)
    with torch.inference_mode(), exact_products():
        for cell in options.cells:
            phase, batch, length = cell.split(":")
            ms = time_cell(options, model, phase, int(batch), int(length))
            median = {name: float(np.median(values)) for name, values in ms.items()}
            best = min((name for name in options.peers if name in median), key=lambda name: median[name])
            ratio = np.sort(ms["ours"] / ms[best])
            interval = median_interval(list(ratio))
            assert interval is not None, "at least 6 rounds"
            slower |= interval[0] > LIMIT
            times = " | ".join(f"{median[n]:.4g}" if n in median else "fails" for n in ("ours", *options.peers))
            print(f"| {cell} | {times} | {np.median(ratio):.3f} [{interval[0]:.3f}, {interval[1]:.3f}] |", flush=True)
            rows += [(cell, r, name, value) for name, values in ms.items() for r, value in enumerate(values)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with open(options.out / "checkpoint_peers.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("cell", "round", "implementation", "ms"))
            writer.writerows(rows)
    return 1 if slower else 0


def time_cell(options: argparse.Namespace, model: Any, phase: str, batch: int, length: int) -> dict[str, np.ndarray]:
    """Milliseconds of a prefill or of one decoded token, a value per round for each."""
    built = ours(options, phase, batch, length)
    step, ids_BN = built.ready_step(), built.x.clone()
    peers: dict[str, Peer] = {}
    for name in options.peers:
        try:
            peer = Peer(model, name, phase, ids_BN)
            peer.choose()
            for i in range(3):  # the first compile
                y = peer.prefill() if phase == "prefill" else peer.step(length + i)
                if i == 0:  # later a cache of a window, whose count is set back, has other tokens: as many to read
                    theirs = y[:, -1].clone().float()
        except Exception as error:
            print(f"{name} does not run here: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            traceback.print_exc(limit=3)
            continue
        if phase == "decode":
            built.task.seek(0)
        mine = step().y[:, -1].float()
        error = float((mine - theirs).norm() / theirs.norm())
        allowed = 1e-3 if options.dtype == "fp32" else 0.25  # a near-tie may flip an expert in bf16
        assert error < allowed, f"{name} computes a different result: relative error {error:.1e}"
        peers[name] = peer

    def one_round(name: str) -> float:
        if name == "ours":
            if phase == "prefill":
                return float(np.median(step.time_block(repeats).ms))
            built.task.seek(0)
            return time_cuda(lambda: [(step(), built.task.advance()) for _ in range(STEPS)], options.device) / STEPS
        peer = peers[name]
        peer.choose()
        if phase == "prefill":
            return float(np.median([time_cuda(peer.prefill, options.device) for _ in range(repeats)]))
        return time_cuda(lambda: [peer.step(length + i) for i in range(STEPS)], options.device) / STEPS

    repeats = 1
    repeats = max(1, round(LEAST_S * 1e3 / one_round("ours")))
    order = ["ours", *peers]
    shuffle = random.Random(batch).shuffle
    ms = {name: np.empty(options.rounds) for name in order}
    for name in order:  # warm-up
        for _ in range(3):
            one_round(name)
    for r in range(options.rounds):
        shuffle(order)
        for name in order:
            ms[name][r] = one_round(name)
    return ms


if __name__ == "__main__":
    sys.exit(main())
