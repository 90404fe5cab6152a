"""Measures the cost of the routing metrics compared with one forward pass of the layer.

    python -m benchmarks.routing_metrics          # or --device cuda --dtype bf16 --tokens 4096 16384

model=moe_layer, model/shape=olmoe_1b_7b, router=torch. `and sums` is the forward pass followed by the pass over its
logits and routing that computes the sums (ops/routing_sums.py), without a synchronisation in between. Both are repeated
back to back, in turns. The results are medians over the rounds; `sums` is the share that the sums add in each round.
`host` is the time of the remaining work on the host: the formulas, and the placements on expert-parallel ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import moe_lab
from moe_lab.measure.placement import fullest_ranks
from moe_lab.measure.routing_metrics import RoutingStats, metrics
from moe_lab.models.moe_layer import moe_layers
from moe_lab.ops.routing_sums import first_tokens, routing_sums
from moe_lab.runs import build


def per_call_ms(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Milliseconds of one call when it is repeated for about `seconds`."""
    calls, begun = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - begun < seconds:
        run()
        calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / calls * 1e3


@torch.inference_mode()
def medians_ms(tokens: int, device_name: str, dtype: str, rounds: int, seconds: float) -> list[float]:
    """Of the forward pass, of that with the sums, what the sums add (a share), and of the rest."""
    groups = ["model=moe_layer", "model/shape=olmoe_1b_7b", f"device={device_name}", f"dtype={dtype}"]
    cfg = moe_lab.compose([*groups, "batch=1", f"seq_len={tokens}"])
    device = build.resolve_device(cfg)
    model = build.build_model(cfg, device)
    x = build.build_input(cfg, model, device)
    layer, routing = moe_layers(model)[0], model(x).routings[0]
    logits_TE, starts_B1 = layer.logits(x), torch.tensor([0, tokens], device=device)

    def and_sums() -> None:
        model(x)
        first_T = first_tokens(tokens, starts_B1, device)
        routing_sums(logits_TE, routing.expert_ids_TK, routing.weights_TK, first_T)

    stats = RoutingStats.of(logits_TE, routing)
    rows = []
    for _ in range(rounds + 1):
        alone, both = per_call_ms(lambda: model(x), device, seconds), per_call_ms(and_sums, device, seconds)
        host = per_call_ms(lambda: (fullest_ranks(stats.counts_E), metrics(stats)), device, seconds)
        rows.append((alone, both, both / alone - 1, host))
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="time of each measurement in a round")
    arguments = parser.parse_args()
    print("| tokens | forward ms | and sums ms | sums | host ms |")
    print("|---|---|---|---|---|")
    for tokens in arguments.tokens:
        forward, both, share, host = medians_ms(
            tokens, arguments.device, arguments.dtype, arguments.rounds, arguments.seconds
        )
        print(f"| {tokens} | {forward:.3f} | {both:.3f} | {share:+.1%} | {host:.2f} |", flush=True)


if __name__ == "__main__":
    main()
