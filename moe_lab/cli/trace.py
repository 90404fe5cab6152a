"""`moe-lab trace`: record which experts a model chooses for each token of texts; or write a trace as another format."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.cli.arguments import Parser
from moe_lab.records.trace import MOST_ROUTES

if TYPE_CHECKING:
    from omegaconf import DictConfig

_READ = ("model.*", "router.*", "experts.*", "workload.*", "device", "dtype", "batch", "seq_len", "seed")


def main(arguments: list[str]) -> int:
    """`moe-lab trace`. Returns the exit code."""
    parser = Parser(
        prog="moe-lab trace",
        description="Record the routes of a model over texts into a trace, or write a trace as another format.",
    )
    parser.add_argument(
        "words", nargs="+", metavar="KEY=VALUE | FILE", help="model.path=DIR workload.path=TEXTS ...; or a trace"
    )
    parser.add_argument("--out", "-o", type=Path, required=True, help="the file to write, for example olmoe.trace")
    parser.add_argument("--tokens", type=int, help="about so many tokens, spread over the texts (default: all)")
    parser.add_argument("--logits", action="store_true", help="record the router's logits too: E floats a token, layer")
    parser.add_argument(
        "--guesses", action="store_true", help="record what routers would choose one layer ahead, and before attention"
    )
    parser.add_argument(
        "--routes",
        type=int,
        default=0,
        metavar="N",
        help="try N other routes of each token, at the same cost; N passes",
    )
    parser.add_argument("--predicted", action="store_true", help="record the likeliest next token of each token too")
    parser.add_argument("--to", choices=("parquet", "vllm"), help="write the trace FILE in this format")
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files")
    given = parser.parse_intermixed_args(arguments)
    if given.tokens is not None and given.tokens < 1:
        raise ValueError(f"--tokens {given.tokens}: must be an integer >= 1.")
    if not 0 <= given.routes <= MOST_ROUTES:
        raise ValueError(f"--routes {given.routes}: must be an integer of 0 to {MOST_ROUTES}.")
    if given.out.is_dir():
        raise ValueError(f"--out {given.out}: is a folder; give the path of a file.")
    if given.to is not None:
        asked = (given.logits, given.guesses, given.routes, given.predicted, given.tokens is not None, given.config_dir)
        if any(asked):
            raise ValueError("--to: takes a trace and --out; remove the other options.")
        return _write_as(given.to, given.words, given.out)
    if files := [word for word in given.words if "=" not in word and not word.startswith("~")]:
        raise ValueError(f"trace {files[0]}: not a KEY=VALUE override; to write a trace as another format, add --to.")
    more = {name: getattr(given, name) for name in ("logits", "guesses", "routes", "predicted")}
    return _record(given.words, given.out, given.tokens, given.config_dir, more)


def compose_over_texts(
    overrides: Sequence[str], config_dir: str | None, read: Collection[str], command: str
) -> DictConfig:
    """The checked configuration of a model over texts, by default a checkpoint with its own router.

    Raises:
        ValueError: a key that `command` does not `read`, or another mistake; one line that names the key.
    """
    from moe_lab.config.checks import refuse_other_keys
    from moe_lab.config.compose import compose
    from moe_lab.config.unread import key_of, refuse_twice
    from moe_lab.records import inputs

    refuse_twice(overrides, sweeps=False)
    keys = [key_of(word) for word in overrides]
    chosen = [] if "model" in keys else ["model=checkpoint"]
    chosen += [] if "router" in keys or "model" in keys else ["router=native"]
    chosen += [] if "workload" in keys else ["workload=text"]
    cfg = compose([*chosen, *overrides], config_dir=config_dir)
    refuse_other_keys(overrides, read, command)
    inputs.require(cfg)  # before torch is loaded
    return cfg


def _record(overrides: list[str], out: Path, n_tokens: int | None, config_dir: str | None, more: dict[str, Any]) -> int:
    cfg = compose_over_texts(overrides, config_dir, _READ, "moe-lab trace")

    from rich.progress import track

    from moe_lab.runs.trace import record
    from moe_lab.terminal import Console

    console = Console(stderr=True)
    shows = console.is_terminal
    missing = record(
        cfg,
        out,
        n_tokens,
        **more,
        progress=lambda batches: track(batches, "recording", console=console, transient=True, disable=not shows),
    )
    say(out, missing)
    return 0


def _write_as(kind: str, words: list[str], out: Path) -> int:
    from moe_lab.analyses import exporters
    from moe_lab.records.trace import Trace

    if len(words) != 1:
        raise ValueError(f"--to {kind}: takes one trace, not {len(words)} words.")
    with Trace(words[0]) as trace:
        left_out = exporters.FORMATS[kind](trace, out)
        print(f"{out}: {trace.n_tokens:,} tokens of {len(trace.layers)} layers")
        print(f"not in the file: {left_out}", file=sys.stderr)
    return 0


def say(path: Path, missing: list[str]) -> None:
    """One line for the trace; what it does not have goes to standard error."""
    from moe_lab.records.trace import Trace

    with Trace(path) as trace:
        layers = trace.layers
        experts = ", ".join(sorted({f"{layer.top_k} of {layer.n_experts}" for layer in layers}))
        n_texts = len(trace.domains)
        domains = f" of {n_texts} text{'s' if n_texts > 1 else ''}" if n_texts else ""
        size = f"{path.stat().st_size / 1e6:,.1f} MB"
        print(f"{path}: {trace.n_tokens:,} tokens{domains}, {len(layers)} layers, {experts} experts, {size}")
    for text in missing:
        print(f"not in the trace: {text}", file=sys.stderr)
