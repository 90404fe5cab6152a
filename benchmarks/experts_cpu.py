"""Compares experts=grouped with the experts of transformers on this machine's CPU, in alternating rounds.

    python -m benchmarks.experts_cpu --rounds 60 --out docs/results/cpu    # or: make bench-experts

One OLMoE-1B-7B layer (64 experts, top-8, D 2048, F 1024) in fp32, T in {1, 16, 256}. All implementations read the same
weights, hidden states and routing, and each is checked against the float32 loop first. A round times every
implementation once, in shuffled order; the ratio ours / peer is computed within the round, so that a temporary
slowdown of the machine affects both. The interval is the 95 % interval of the median of these ratios.

batched_mm copies the weights of every (token, expert) pair; if that does not fit into memory, the table says so.

The exit code is 1 if the interval of the ratio to the fastest peer is above 1.03 for any T.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import moe_lab
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.measure import environment
from moe_lab.measure.distance import relative_error
from moe_lab.measure.statistics import median_interval
from moe_lab.models.layer_only import MoELayerModel
from moe_lab.routers.base import RouteContext
from moe_lab.runs.run import Run

TOKENS = (1, 16, 256)
PEERS = ("eager", "batched_mm", "grouped_mm")
LIMIT = 1.03
LEAST_S = 0.02  # a timed call is repeated until it takes so long


def variants(tokens: int) -> dict[str, Callable[[], Tensor]]:
    """name -> the expert MLPs of one layer on the same input; 'ours' first."""
    cfg = moe_lab.compose(["model=moe_layer", "model/shape=olmoe_1b_7b", "batch=1", f"seq_len={tokens}", "device=cpu"])
    run = Run(cfg)
    run.build()
    model, x_TD = run.made().model, run.made().x
    assert isinstance(model, MoELayerModel)
    layer = model.moe
    routing = layer.router.route(x_TD, layer.weights.gate_ED, RouteContext())
    ids_TK, weights_TK = routing.expert_ids_TK.long(), routing.weights_TK

    def peer(name: str) -> Callable[[], Tensor]:
        config = OlmoeConfig(
            hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, hidden_act="silu"
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj, experts.down_proj = layer.weights.w_gate_up_E2FD, layer.weights.w_down_EDF
        return lambda: experts(x_TD, ids_TK, weights_TK)

    found = {"ours": lambda: Grouped()(x_TD, routing, layer.weights), **{name: peer(name) for name in PEERS}}
    copied = ids_TK.numel() * layer.weights.w_gate_up_E2FD[0].numel() * x_TD.element_size()
    if copied > available_bytes() / 2:
        del found["batched_mm"]
    reference = Loop()(x_TD, routing, layer.weights)
    for name, call in found.items():
        error = relative_error(call(), reference)
        assert error < 1e-5, f"{name} computes a different result: relative error {error:.1e}"
    return found


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def time_rounds(calls: dict[str, Callable[[], Tensor]], rounds: int, seed: int) -> dict[str, np.ndarray]:
    """Milliseconds per call, one value per round for each variant."""
    order, ms = list(calls), {name: np.empty(rounds) for name in calls}
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(LEAST_S / (time.perf_counter() - start)))
    shuffle = random.Random(seed).shuffle
    for r in range(rounds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            ms[name][r] = (time.perf_counter() - start) * 1e3 / repeats[name]
    return ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds per number of tokens")
    parser.add_argument("--out", type=Path, help="output folder of experts_cpu.csv (every round)")
    options = parser.parse_args()

    env = environment.capture(torch.device("cpu"))
    print(f"command: python -m benchmarks.experts_cpu {' '.join(sys.argv[1:])}")
    print(f"machine: {env['cpu']}, {env['threads']} threads of {env['cpus']} CPUs, {env['cpu_capability']}")
    print(f"versions: torch {env['torch']}, transformers {transformers.__version__}, Python {env['python']}")
    print(
        f"rounds: {options.rounds}, code {env['git_sha'] or 'not committed'}{' (dirty)' if env['git_dirty'] else ''}\n"
    )
    print("| T | ours [ms] | " + " | ".join(f"{name} [ms]" for name in PEERS) + " | best peer | ours / best [95 %] |")
    print("|---|---|" + "---|" * (len(PEERS) + 2))

    rows, slower = [], False
    with torch.inference_mode():
        for tokens in TOKENS:
            calls = variants(tokens)
            time_rounds(calls, 3, seed=0)  # warm-up
            ms = time_rounds(calls, options.rounds, seed=tokens)
            median = {name: float(np.median(values)) for name, values in ms.items()}
            best = min((name for name in PEERS if name in median), key=lambda name: median[name])
            ratio = np.sort(ms["ours"] / ms[best])
            interval = median_interval(list(ratio))
            assert interval is not None, "at least 6 rounds"
            slower |= interval[0] > LIMIT
            times = " | ".join(f"{median[n]:.3g}" if n in median else "does not fit" for n in ("ours", *PEERS))
            print(
                f"| {tokens} | {times} | {best} | {np.median(ratio):.3f} [{interval[0]:.3f}, {interval[1]:.3f}] |",
                flush=True,
            )
            rows += [(tokens, r, name, values[r]) for name, values in ms.items() for r in range(options.rounds)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with open(options.out / "experts_cpu.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("tokens", "round", "implementation", "ms"))
            writer.writerows(rows)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
