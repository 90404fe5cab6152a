"""The commands of `moe-lab`, which come first in place of Hydra's language: plan, report, export, ..."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_lab.cli import typed
from moe_lab.cli.arguments import Parser
from moe_lab.config import targets
from moe_lab.config.compose import name_sweep

OK = 0
_JSON = "print one JSON document (docs/results-format.md)"


def _plan(arguments: list[str]) -> int:
    from moe_lab.cli import plan as preview

    if {"--help", "-h"} & set(arguments):
        usage = "usage: moe-lab plan [-m] [--json] OVERRIDES"
        print(f"{usage}    show what `moe-lab -m OVERRIDES` would run; nothing is run or written")
        return OK
    words = typed.read([word for word in arguments if word != "--json"], COMMANDS)
    for option in words.options:
        if option.startswith("-") and not option.startswith(("-m", "--mu", "--config-d", "-cd")):
            raise ValueError(f"plan: {option}: has no effect; plan takes overrides, -m, --json and --config-dir.")
    name_sweep(words.overrides)
    preview.show(words.overrides, words.given.config_dir, json="--json" in arguments)
    return OK


def _report(arguments: list[str]) -> int:
    from moe_lab.cli import report

    return report.main(arguments)


def _status(arguments: list[str]) -> int:
    from moe_lab.cli import status

    return status.main(arguments)


def _card(arguments: list[str]) -> int:
    from moe_lab.cli import card

    return card.main(arguments)


def _plot(arguments: list[str]) -> int:
    from moe_lab.cli import plot

    return plot.main(arguments)


def _compare(arguments: list[str]) -> int:
    from moe_lab.cli import compare as compare_cli

    return compare_cli.main(arguments)


def _list(arguments: list[str]) -> int:
    from moe_lab.cli import architectures, implementations, listing

    parser = Parser(prog="moe-lab list", description="List the options of each group.")
    parser.add_argument("group", nargs="*", help="router, model, experts, ..., architectures (default: all groups)")
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files")
    parser.add_argument("--json", action="store_true", help=_JSON)
    given = parser.parse_args(arguments)
    if len(given.group) == 1 and given.group[0] in architectures.NAMES:
        if given.config_dir:
            raise ValueError("list architectures: --config-dir: has no effect; remove it.")
        architectures.show(json=given.json)
        return OK
    described = implementations.GROUPS.get(given.group[0]) if len(given.group) == 1 else None
    if described is not None:
        if given.config_dir:
            targets.trust(given.config_dir)
        implementations.show(described, given.config_dir, json=given.json)
    else:
        listing.show(given.group, given.config_dir, json=given.json)
    return OK


def _inspect(arguments: list[str]) -> int:
    from moe_lab.cli import inspect

    return inspect.main(arguments)


def _generate(arguments: list[str]) -> int:
    parser = Parser(prog="moe-lab generate", description="Generate text with a checkpoint.")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("overrides", nargs="+", metavar="model.path=DIR", help="also router=..., dtype=..., KEY=VALUE")
    parser.add_argument("--max-tokens", type=int, default=200, help="at most this many tokens (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="TOKENS", help="tokens of the prompt in one pass (default: all)"
    )
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files")
    given = parser.parse_intermixed_args(arguments)
    from moe_lab.config.compose import compose
    from moe_lab.config.unread import refuse_twice
    from moe_lab.records import inputs

    refuse_twice(given.overrides, sweeps=False)
    for override in given.overrides:
        if override.lstrip("+").startswith("workload.prefill_chunk="):
            raise ValueError(f"{override}: give --prefill-chunk {override.partition('=')[2]} instead.")
    cfg = compose(["model=checkpoint", "router=native", *given.overrides], config_dir=given.config_dir)
    inputs.require(cfg)  # before torch is loaded

    from moe_lab.cli import generate

    generate.main(given.prompt, cfg, given.max_tokens, given.temperature, given.prefill_chunk)
    return OK


def _trace(arguments: list[str]) -> int:
    from moe_lab.cli import trace

    return trace.main(arguments)


def _stability(arguments: list[str]) -> int:
    from moe_lab.cli import stability

    return stability.main(arguments)


def _import(arguments: list[str]) -> int:
    from moe_lab.cli import import_trace

    return import_trace.main(arguments)


def _analyze(arguments: list[str]) -> int:
    from moe_lab.cli import analyze

    return analyze.main(arguments)


def _allocate(arguments: list[str]) -> int:
    from moe_lab.cli import allocate

    return allocate.main(arguments)


def _doctor(arguments: list[str]) -> int:
    parser = Parser(prog="moe-lab doctor", description="Show this machine and what runs on it.")
    parser.add_argument(
        "--noise",
        action="store_true",
        help="measure how much two processes with the same code differ, and store it for `moe-lab compare`",
    )
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="PATH",
        help="measure how fast weights are loaded: from host memory to the GPU, and from the disk that PATH is on (a "
        "checkpoint's folder, or any other); with --json for expert_cache.rates of `moe-lab analyze`",
    )
    parser.add_argument("--json", action="store_true", help=_JSON)
    given = parser.parse_args(arguments)
    if given.noise and given.json:
        raise ValueError("doctor: --json: has no effect with --noise; run moe-lab doctor --json after it.")
    if given.noise and given.rates:
        raise ValueError("doctor: --noise and --rates: give one of them at a time, so that neither disturbs the other.")
    if given.rates and not given.rates.exists():
        raise ValueError(f"doctor: --rates {given.rates}: no such file or folder; give one on the disk to be measured.")
    from moe_lab.cli import doctor

    if given.noise:
        doctor.measure_noise()
    elif given.rates:
        doctor.measure_rates(given.rates, json=given.json)
    else:
        doctor.show(json=given.json)
    return OK


def _export(arguments: list[str]) -> int:
    from moe_lab.cli import export

    return export.main(arguments)


def _clean(arguments: list[str]) -> int:
    from moe_lab.cli import clean

    return clean.main(arguments)


def _build(arguments: list[str]) -> int:
    from moe_lab.cli import build

    return build.main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "status": _status,
    "report": _report,
    "plot": _plot,
    "card": _card,
    "compare": _compare,
    "generate": _generate,
    "trace": _trace,
    "import": _import,
    "analyze": _analyze,
    "stability": _stability,
    "allocate": _allocate,
    "inspect": _inspect,
    "export": _export,
    "list": _list,
    "doctor": _doctor,
    "build": _build,
    "clean": _clean,
}
"""Each returns the exit code and raises `ValueError`, `UnavailableError` or `OSError` for what a person can fix."""
