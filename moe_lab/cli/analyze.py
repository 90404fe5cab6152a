"""`moe-lab analyze TRACE`: the analyses of a trace, as sentences here and as tables, plots and a page in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from moe_lab.cli.arguments import Parser
from moe_lab.config.unread import refuse_twice


def main(arguments: list[str]) -> int:
    """`moe-lab analyze`. Returns the exit code."""
    from moe_lab.analyses import analyze
    from moe_lab.analyses.page import PAGE

    parser = Parser(
        prog="moe-lab analyze",
        description="Analyse a trace: would a cache of experts help, what does a verification step load, how long is "
        "a placement good for.",
        epilog="KEY=VALUE are keys of conf/analyze.yaml (--cfg shows them): expert_cache.capacity=8,16,32, "
        "analysis/expert_cache=lru, analysis/placement=null, out=FOLDER, phase=decode, ...",
    )
    parser.add_argument("words", nargs="*", metavar="TRACE KEY=VALUE", help="the trace, and keys of the analyses")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.words if "=" in word or word.startswith("~")]
    paths = [word for word in given.words if word not in overrides]
    refuse_twice(overrides, sweeps=False)
    cfg = analyze.compose(overrides)
    if given.cfg:
        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    if len(paths) != 1:
        raise ValueError(f"analyze: takes one trace, not {len(paths)} (moe-lab analyze --help).")
    folder, found = analyze.analyze(Path(paths[0]), cfg)
    for findings in found:
        if findings.sentences:
            print(findings.title)
        for sentence in findings.sentences:
            print(f"  {sentence}")
        for note in findings.notes:
            print(f"  {note}", file=sys.stderr)
    print(f"{folder}: {PAGE}, tables and plots")
    return 0
