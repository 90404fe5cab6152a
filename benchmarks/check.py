"""Compares every ratio that a document quotes, and that needs no GPU, with today's: `make bench-check`.

    python -m benchmarks.check                # or --only aggregate

Each benchmark is started once, with fewer rounds than for its table. A ratio is formed within one run, so it holds on
another machine; seconds do not, and are not compared. A quote stands in its document only, and is read from there. The
exit code is 1 if a ratio is beyond its tolerance or above its limit, or was not printed. Start it on an idle machine:
it takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SWEEPS, _CHECKPOINT = "docs/results/cpu/sweeps.md", "docs/results/cpu/checkpoint.md"
_NUMBER = r"(\d+(?:\.\d+)?)(?![\d.]*[eE\d])"


@dataclass(frozen=True)
class Quote:
    """A ratio: smaller is better, unless it `holds_both_ways`.

    Attributes:
        text: how it is called in the table of `main`.
        quoted, printed: patterns of the number in the document and in the output; None: both are `text: number`.
        tolerance: by how much of the quoted ratio today's may be above it.
        limit: what it must not exceed, whatever is quoted.
    """

    document: str
    text: str
    quoted: str | None = None
    printed: str | None = None
    tolerance: float = 0.3
    limit: float | None = None
    holds_both_ways: bool = False

    def find(self, pattern: str | None, text: str) -> float | None:
        """The number, if it stands there exactly once."""
        found = re.findall(pattern or re.escape(f"{self.text}: ") + _NUMBER, text, re.MULTILINE)
        return float(found[0]) if len(found) == 1 else None

    def complaint(self, quoted: float | None, today: float | None) -> str | None:
        """What is wrong, None if the quote holds."""
        if quoted is None or today is None:
            return "not quoted once" if quoted is None else "not printed"
        if today == 0:
            return "is 0: nothing was measured"
        if self.limit is not None and today > self.limit:
            return f"above its limit of {self.limit:g}"
        if today > quoted * (1 + self.tolerance):
            return f"more than {self.tolerance:.0%} above the quote"
        if self.holds_both_ways and today < quoted * (1 - self.tolerance):
            return f"more than {self.tolerance:.0%} below the quote"
        return None


def _row(head: str) -> str:
    """A line of a table that begins so; the number before its interval."""
    return rf"^\| {re.escape(head)} \|.*\| {_NUMBER} \["


def _peers(quoted: str, printed: str) -> Quote:
    return Quote(_CHECKPOINT, f"here / best, {quoted}", _row(quoted), _row(printed))


CHECKS: Mapping[str, Sequence[Quote]] = {
    "sweep_overhead --rounds 3": [
        Quote(_SWEEPS, "median overhead / no-op", limit=1.3),
        Quote(_SWEEPS, "median cell beside its timing / no-op", tolerance=0.5),
    ],
    "aggregate": [
        Quote(_SWEEPS, "all new / json", limit=6),
        Quote(_SWEEPS, "one changed / all new", limit=0.25),
        Quote(_SWEEPS, "nothing changed / all new", tolerance=0.5),
    ],
    "report --rounds 3": [Quote(_SWEEPS, "table of 2000 cells / of 100", tolerance=0.5)],
    "aa_study --pairs 2": [
        Quote(
            _SWEEPS,
            "planted 10 %: the slowed router / the first",
            rf"^\| ratio of the slowed router: median.*?\| {_NUMBER} \[",
            rf"^ratio of the slowed router: median {_NUMBER}",
            tolerance=0.03,
            holds_both_ways=True,
        )
    ],
    "experts_cpu --rounds 30": [
        Quote("docs/results/cpu/experts.md", f"ours / best, T = {tokens}", _row(str(tokens)), _row(str(tokens)), 0.15)
        for tokens in (1, 16, 256)
    ],
    "checkpoint_peers --rounds 10": [
        _peers("prefill, batch 8, 512 tokens", "prefill:8:512"),
        _peers("decode, batch 1, context 256", "decode:1:256"),
        _peers("decode, batch 8, context 256", "decode:8:256"),
    ],
    "export_pairs --only 'decoder_moe torch, large'": [
        Quote(
            "docs/results/cpu/export.md",
            "memory of an export / weights",
            rf"exported and verified with\s{_NUMBER}",
            rf"'peak_over_weights': {_NUMBER}",
            0.05,
        )
    ],
}
"""The arguments of each benchmark, and what is quoted of it."""
LEFT_OUT = {
    "cluster_kills": "counts what is lost, and starts a cluster",
    "slurm_overhead": "starts a cluster",
    "sweep_slots": "needs two CPUs for itself",
    "traces": "quotes seconds and gigabytes, not ratios",
    "add_rms_norm": "needs a GPU",
    "checkpoint_load": "needs a GPU",
    "decode_kernels": "needs a GPU",
    "energy_profiles": "needs a GPU",
    "pack_peers": "measures nothing",
    "random_checkpoint": "measures nothing",
    "router_verdicts": "needs a GPU",
    "expert_verdicts": "reads what a GPU measured",
    "routing_metrics": "its quotes are of a GPU",
    "sort_and_combine": "needs a GPU",
    "tune_experts": "needs a GPU",
    "fit_tiles": "reads what a GPU measured",
    "optimum_overhead": "needs an environment of its own",
}


def run(arguments: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, "-m", *shlex.split(f"benchmarks.{arguments}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:  # one that is slower than its own limit ends with 1, and has printed its table
        print(done.stderr, file=sys.stderr)
    return done.stdout


def main(checks: Mapping[str, Sequence[Quote]] = CHECKS, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arguments.split()[0] for arguments in checks]
    parser.add_argument("--only", nargs="+", choices=names, help=f"some of {', '.join(names)}", metavar="NAME")
    only = parser.parse_args().only
    print("| ratio | quoted | today | tolerance | |\n|---|---|---|---|---|", flush=True)
    n_wrong, begin = 0, time.perf_counter()
    for arguments, quotes in checks.items():
        if only and arguments.split()[0] not in only:
            continue
        printed = run(arguments)
        for quote in quotes:
            quoted = quote.find(quote.quoted, (root / quote.document).read_text())
            today = quote.find(quote.printed, printed)
            wrong = quote.complaint(quoted, today)
            n_wrong += wrong is not None
            numbers = " | ".join("-" if number is None else f"{number:g}" for number in (quoted, today))
            print(f"| {quote.text} | {numbers} | {quote.tolerance:.0%} | {wrong or 'holds'} |", flush=True)
    print(f"\n{n_wrong} quotes do not hold; {(time.perf_counter() - begin) / 60:.0f} minutes")
    if not only:
        print("left out: " + "; ".join(f"{name} ({why})" for name, why in LEFT_OUT.items()))
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
