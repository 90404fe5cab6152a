"""Measures how often `moe-lab compare` reports a difference for the same code, and how often it finds a real one.

    python -m benchmarks.aa_study --pairs 20              # an idle machine
    python -m benchmarks.aa_study --pairs 4 --slower 0.1 0.5                # between two sweeps: twice as long
    OMP_NUM_THREADS=1 python -m benchmarks.aa_study --pairs 20 --load 2     # with 2 other busy processes

(Use one thread under load. With more, OpenMP's threads wait for each other while the busy processes use the cores, and
a pass takes up to 28 times as long.)

Each pair is two sweeps of the same code, one after the other, with 3 replicates: `compare` should call fewer than
5 % of the cells faster or slower. Every sweep also has a second router: the first one plus a wait of 10 % of a
pass. The ratio of the cell to the anchor, computed in the same rounds, should find it in at least 90 % of the cells
(interval above 1).

Then, for each share of `--slower`, a sweep in which the second router waits for that share of a pass more, as if a
change of the code had made it slower. `compare` should call its cells slower than those of the pair's first sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from moe_lab.records.store import read_record
from moe_lab.results.compare import compare

_SLOWER = '''
import time
from pathlib import Path
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Slower(SoftmaxTopK):
    """The softmax top-k router, which then waits; how long stands by the number of tokens."""

    def __init__(self, n_experts, top_k, wait_ms):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        times = float(Path(__file__).with_name("times").read_text())
        self.wait_ms = {int(tokens): times * ms for tokens, ms in wait_ms.items()}

    def select(self, logits_TE, ctx=None):
        wait_ms = self.wait_ms.get(logits_TE.shape[0], 0)  # a check of the router's properties has other tokens
        end = time.perf_counter() + wait_ms / 1e3
        routing = super().select(logits_TE, ctx)
        while time.perf_counter() < end:
            pass
        return routing
'''
_WAIT = 0.1  # of a pass
_AXES = ["model=moe_layer", "batch=1,16", "seq_len=4", "device=cpu"]
_MEASURE = ["measure.replicates=3", "measure.max_time_s=0.4", "measure.warmup_s=0.1"]
_LESS = ["measure.phases=false", "measure.roofline=false", "measure.routing=false"]


def sweep(folder: Path, name: str, routers: str = "torch,slower") -> Path:
    """One sweep over the routers and two sizes, in fresh processes."""
    command = [sys.executable, "-m", "moe_lab", "-m", "--config-dir", "mine", *_AXES, *_MEASURE, *_LESS]
    subprocess.run([*command, f"router={routers}", f"sweep.name={name}"], cwd=folder, check=True, capture_output=True)
    return folder / "outputs" / name


def plant(folder: Path) -> None:
    """A router that waits for `_WAIT` of what a pass takes here and now."""
    (folder / "mine" / "router").mkdir(parents=True)
    records = [read_record(path.parent) for path in sweep(folder, "before", "torch").glob("*/result.json")]
    waits = {r.config["batch"] * r.config["seq_len"]: _WAIT * r.latency_ms.p50 for r in records if r.latency_ms}
    print(f"waits in ms by tokens: {waits}", flush=True)
    (folder / "mine" / "slower_router.py").write_text(_SLOWER)
    slow_down(folder, 0)
    yaml = {"_target_": "slower_router.Slower", "name": "slower", "wait_ms": waits}
    (folder / "mine" / "router" / "slower.yaml").write_text(json.dumps(yaml).replace('"', ""))


def slow_down(folder: Path, share: float) -> None:
    """From now on the router waits for this share of a pass more."""
    (folder / "mine" / "times").write_text(str(1 + share / _WAIT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--load",
        type=int,
        default=0,
        help="number of single-threaded processes that multiply matrices during the study",
    )
    parser.add_argument(
        "--slower", type=float, nargs="*", default=[], metavar="SHARE", help="of a pass, between two sweeps"
    )
    given = parser.parse_args()
    noise = "import numpy as np\na = np.ones((512, 512))\nwhile True: a @ a"
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    others = [subprocess.Popen([sys.executable, "-c", noise], env=one_thread) for _ in range(given.load)]
    verdicts: Counter[str] = Counter()
    found: Counter[str] = Counter()
    ratios: list[float] = []
    between: dict[float, Counter[str]] = {share: Counter() for share in given.slower}
    try:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            plant(folder)
            for pair in range(given.pairs):
                a, b = sweep(folder, f"a{pair}"), sweep(folder, f"b{pair}")
                verdicts.update(compare(a, b)["verdict"])
                for path in [*a.glob("*slower*/result.json"), *b.glob("*slower*/result.json")]:
                    ratio = read_record(path.parent).ratio_to_anchor
                    assert ratio is not None
                    assert ratio.ci95_low is not None
                    ratios.append(ratio.p50)
                    found["found" if ratio.ci95_low > 1 else "missed"] += 1
                for share, called in between.items():
                    slow_down(folder, share)
                    rows = compare(a, sweep(folder, f"c{pair}-{share}"))
                    called.update(rows["verdict"][rows["router"] == "slower"])
                slow_down(folder, 0)
                told = {share: dict(called) for share, called in between.items()}
                print(f"pair {pair}: {dict(verdicts)}; 10 % slower: {dict(found)}; between sweeps: {told}", flush=True)
    finally:
        for other in others:
            other.kill()
    cells = sum(verdicts.values())
    wrong = verdicts["faster"] + verdicts["slower"]
    ratios.sort()
    print(
        f"\n{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"{given.load} busy processes; {given.pairs} pairs of sweeps, 3 replicates\n")
    print("| | cells | share |\n|---|---|---|")
    print(f"| same code called faster or slower | {wrong} of {cells} | {wrong / cells:.1%} |")
    for verdict in ("same", "inconclusive"):
        print(f"| same code called {verdict} | {verdicts[verdict]} of {cells} | {verdicts[verdict] / cells:.1%} |")
    print(f"| planted 10 % found | {found['found']} of {len(ratios)} | {found['found'] / len(ratios):.1%} |")
    for share, called in between.items():
        for verdict in ("slower", "same", "inconclusive", "faster"):
            what = f"another sweep {share:.0%} slower, called {verdict}"
            print(f"| {what} | {called[verdict]} of {called.total()} | {called[verdict] / called.total():.1%} |")
    low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.05, 0.5, 0.95))
    print(f"\nratio of the slowed router: median {middle:.3f}, 5 to 95 % of cells [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
