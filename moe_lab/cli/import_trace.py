"""`moe-lab import FORMAT FILE --out TRACE`: another program's recording of routes as a trace."""

from __future__ import annotations

from pathlib import Path

from moe_lab.cli.arguments import Parser
from moe_lab.cli.trace import say


def main(arguments: list[str]) -> int:
    """`moe-lab import`. Returns the exit code."""
    from moe_lab.analyses import importers

    parser = Parser(prog="moe-lab import", description="Convert another program's recording of routes to a trace.")
    parser.add_argument("format", help=", ".join(importers.FORMATS))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the files of one recording, in order")
    parser.add_argument("--out", "-o", type=Path, required=True, help="the trace to write")
    parser.add_argument("--top-k", type=int, help="experts that a token uses, where the format does not say")
    parser.add_argument("--n-experts", type=int, help="experts of a layer, where the format does not say")
    given = parser.parse_intermixed_args(arguments)
    for name, value in (("top-k", given.top_k), ("n-experts", given.n_experts)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be an integer >= 1.")
    if given.out.is_dir():
        raise ValueError(f"--out {given.out}: is a folder; give the path of a file.")
    say(
        given.out,
        importers.convert(given.format, given.files, given.out, importers.Asked(given.top_k, given.n_experts)),
    )
    return 0
