"""`moe-lab allocate`: how sensitive each MoE layer is to fewer experts per token, and the best `model.top_k`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lab.cli.arguments import Parser

if TYPE_CHECKING:  # which imports torch
    from moe_lab.runs.allocate import Sensitivity

_READ = ("model.*", "router.*", "experts.*", "workload.path", "device", "dtype", "batch", "seq_len", "seed")
_SHARES = (0.75, 0.5)
"""Of the experts that the model uses for a token: the budgets without --budget."""


def main(arguments: list[str]) -> int:
    """`moe-lab allocate`. Returns the exit code."""
    parser = Parser(
        prog="moe-lab allocate",
        description="Print how far the output of each MoE layer is from its own with fewer experts per token, on noise "
        "or on texts (workload.path). For a budget of experts, print the lists with the least sum of these distances, "
        "and with the least sum of the lost shares: the squares of the distances over those of the outputs.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="model.path=DIR workload.path=TEXTS ...")
    parser.add_argument(
        "--budget", help="experts per token in all layers together, N or N,N,...; default: 3/4 and 1/2 of the model's"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="about so many rows (default: 2048)")
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files")
    given = parser.parse_intermixed_args(arguments)
    if given.tokens < 1:
        raise ValueError(f"--tokens {given.tokens}: must be an integer >= 1.")
    budgets = None if given.budget is None else _numbers(given.budget)

    from moe_lab.config.checks import refuse_other_keys
    from moe_lab.config.compose import compose
    from moe_lab.config.unread import key_of, refuse_twice
    from moe_lab.records import inputs

    refuse_twice(given.overrides, sweeps=False)
    refuse_other_keys(given.overrides, _READ, "moe-lab allocate")
    keys = [key_of(word) for word in given.overrides]
    chosen = [] if "model" in keys else ["model=checkpoint"]
    chosen += [] if "router" in keys or "model" in keys else ["router=native"]
    has_texts = "workload.path" in keys
    cfg = compose([*chosen, *(["workload=text"] if has_texts else []), *given.overrides], config_dir=given.config_dir)
    inputs.require(cfg)  # before torch is loaded

    from rich.progress import track

    from moe_lab.runs.allocate import sensitivity
    from moe_lab.terminal import Console

    console = Console(stderr=True)
    found = sensitivity(
        cfg,
        given.tokens,
        progress=lambda batches: track(
            batches, "reading", console=console, transient=True, disable=not console.is_terminal
        ),
    )
    for name in found.left_out:
        print(f"left out: {name}: shorter than one window (seq_len tokens)", file=sys.stderr)
    _show(found, "of the texts" if has_texts else "of noise, N(0, 1)", budgets)
    return 0


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--budget {text}: must be integers with commas between them, for example 48,64.")
    return [int(word) for word in words]


def _show(found: Sensitivity, rows: str, budgets: Sequence[int] | None) -> None:
    from moe_lab.cli.table import print_table
    from moe_lab.results.numbers import short
    from moe_lab.runs.allocate import allocate

    L, K = len(found.layers), len(found.distance_LK[0])
    if K == 1:
        raise ValueError("model.top_k=1: the layers use one expert for a token, so none can have fewer.")
    for budget in budgets or ():
        if not L <= budget < L * K:
            raise ValueError(f"--budget {budget}: must be >= {L}, one for each layer, and < {L * K}, the model's.")
    print(f"|f_k(X) - f(X)|, Frobenius norm, X: what a layer reads {rows}, {found.tokens:,} tokens")
    table = [
        (str(layer), short(norm), *map(short, distances[:-1]))
        for layer, norm, distances in zip(found.layers, found.norm_L, found.distance_LK, strict=True)
    ]
    print_table(("layer", "|f(X)|", *(f"k = {k}" for k in range(1, K))), table)
    for budget in budgets or sorted({max(L, round(share * L * K)) for share in _SHARES}, reverse=True):
        print(f"{budget} of {L * K} experts")
        for what, cost_LK in (("distances", found.distance_LK), ("lost shares", found.lost_LK)):
            ks = allocate(cost_LK, budget)
            total = sum(costs[k - 1] for costs, k in zip(cost_LK, ks, strict=True))
            print(f"  least sum of {what}, {short(total)}: model.top_k=[{','.join(map(str, ks))}]")
