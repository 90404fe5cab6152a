"""Compares a checkpoint in moe-lab with the same model in transformers: prefill and decode, in alternating rounds.

    python -m benchmarks.checkpoint_peers --out docs/results/cpu
    python -m benchmarks.checkpoint_peers --path /tmp/olmoe --device cuda --dtype bf16 --execution cuda_graph \\
        --cells decode:1:2048 decode:8:2048

Compiling takes most of the time. Several such commands with the same folder `--turns` do it at once on one machine, and
each stops the others while it times a cell; what a peer's compiler measured it measured beside the others.

A cell is prefill:BATCH:TOKENS or decode:BATCH:CONTEXT. The peers:

    eager, batched_mm, grouped_mm   experts implementations of transformers, with `--attention` and, for decode, a
                                    StaticCache of the same length. Its weights and its cache are ours where both keep
                                    the same. On CUDA decode is compiled (mode reduce-overhead, which uses CUDA graphs).
    plain                           plain_decoder.py, on our weights and cache; on CUDA compiled (max-autotune) and in a
                                    CUDA graph of its own. Of the ways in which it can be written the fastest is timed;
                                    stderr has them all. A way should take some ten seconds to compile; a decode cell
                                    has two to four, of which none begins after `--limit` seconds (turns of others do
                                    not count).

The floor of a decoded token is the bytes that any implementation touches (as in a record) at the rate of a large copy.
A round times every implementation once in shuffled order; a decode round times some consecutive tokens. The ratio ours
/ peer is computed within the round; the interval is that of the median ratio. Before the timing the logits are compared
with ours. A peer that cannot run, or that computes something else, fails: its cell says so, stderr why. stderr also has
the seconds that each part took. After a CUDA error nothing more runs in a process, so it ends and says in which cell
and in whose work.

The exit code is 1 if the interval of the ratio to the fastest peer is above 1.03 in any cell, or if ours fails.
"""

from __future__ import annotations

import argparse
import csv
import gc
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import moe_lab
from benchmarks.plain_decoder import PlainDecoder, Way
from benchmarks.transformers_peer import Peer, peer_model
from benchmarks.turns import Turns
from moe_lab.measure import environment
from moe_lab.measure.clocks import Step, make_step
from moe_lab.measure.roofline import measured_peaks
from moe_lab.measure.statistics import median_interval
from moe_lab.measure.tolerances import exact_products
from moe_lab.models import Output
from moe_lab.models.parameters import shareable
from moe_lab.routers.base import unchecked
from moe_lab.runs.built import Built
from moe_lab.runs.run import Run

PEERS = ("eager", "batched_mm", "grouped_mm")
PLAIN = "plain"
LIMIT = 1.03
STEPS = 16  # decoded tokens in a round
TURNS_HELP = (
    "a folder in common with commands that are started beside this one; Ctrl-C does not reach such a command: "
    "`kill -- -PID` ends it with its compilers"
)
LEAST_S = 0.05  # a prefill is repeated in a round until it takes so long


class Cell(NamedTuple):
    """`length` is the prefill's or the context's."""

    phase: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.phase}:{self.batch}:{self.length}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        phase, *numbers = text.split(":")
        if phase not in ("prefill", "decode") or len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
            raise argparse.ArgumentTypeError(f"{text}: must be prefill:BATCH:TOKENS or decode:BATCH:CONTEXT")
        return cls(phase, *map(int, numbers))


def ours(options: argparse.Namespace, cell: Cell, weights: dict[str, Tensor]) -> Built:
    """What a run of this project executes; `weights` holds those that are loaded once for all cells."""
    sizes = [f"seq_len={cell.length}"]
    if cell.phase == "decode":
        sizes = [f"workload.context_len={cell.length}", f"seq_len={STEPS}"]
    source = ["workload=text", f"workload.path={options.text}"] if options.text else ["workload=random"]
    cfg = moe_lab.compose(
        [
            "model=checkpoint",
            "router=native",
            f"model.path={options.path}",
            f"workload.phase={cell.phase}",
            f"device={options.device}",
            f"dtype={options.dtype}",
            f"execution={options.execution}",
            f"batch={cell.batch}",
            *sizes,
            *source,
        ]
    )
    run = Run(cfg)
    run.build(weights or None)
    built = run.made()
    weights.update(shareable(built.model))
    return built


class Timed(NamedTuple):
    """A cell.

    Attributes:
        ms: of a prefill or of one decoded token, a value per round for each implementation.
        how: each was run: compiled or not, and the way that it is written in.
        floor_ms: of a decoded token.
    """

    ms: dict[str, np.ndarray]
    how: dict[str, str]
    floor_ms: float | None


class PlainStep(nn.Module):
    """The plain decoder, written in one way, as what a run repeats."""

    def __init__(self, decoder: PlainDecoder, position_S: Tensor, way: Way):
        super().__init__()
        self.decoder, self.position_S, self.way = decoder, position_S, way

    def forward(self, ids_BS: Tensor) -> Output:
        return Output(self.decoder(ids_BS, self.position_S, self.way), ())


class PlainPeer:
    """The plain decoder on the model, the ids and the cache of a run; on CUDA captured as a run's step is.

    Args:
        mine_BV: our logits, which each way that it can be written in must have too.
        limit_s: no way begins after so many seconds, by `clock`.
    """

    def __init__(
        self,
        cell: Cell,
        built: Built,
        mine_BV: Tensor,
        limit_s: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.ids_BN = built.x
        start, n_new = (0, cell.length) if cell.phase == "prefill" else (cell.length, 1)
        self.ids_BS = built.x[:, start : start + n_new].clone()
        self.position_S = torch.arange(start, start + n_new, device=built.x.device)
        decoder = PlainDecoder(built.model, built.task.cache, compiled=built.x.is_cuda)
        self.steps: dict[Way, Step] = {}
        self.how, self.left_out = "", list[Way]()
        begun = clock()
        for way in decoder.ways(*self.ids_BS.shape):
            if self.steps and clock() - begun > limit_s:
                self.left_out.append(way)
                print(f"{PLAIN} ({way}): left out after {limit_s:g} s", file=sys.stderr)
                continue
            name = f"{PLAIN} ({way})"
            try:
                with work_of(name, cell, built.device):
                    execution = "cuda_graph" if self.ids_BS.is_cuda else "eager"
                    step = make_step(execution, "natural", PlainStep(decoder, self.position_S, way), self.ids_BS)
                    require_same(name, step().y[:, -1].float(), mine_BV, built.dtype)
                self.steps[way] = step
            except Exception as error:  # another way may do; kept, it would hold on to the memory of its frames
                tell(name, error)
            print(f"{name}: tried after {clock() - begun:.1f} s", file=sys.stderr, flush=True)
        if not self.steps:
            raise RuntimeError("no way that it can be written in runs; why is above")
        self.run = next(iter(self.steps.values()))

    def settle(self) -> None:
        """From here on take the way that takes least time."""
        ms = {way: float(np.median(step.time_block(7).ms)) for way, step in self.steps.items()}
        for way in ms:
            print(f"{PLAIN} ({way}): {ms[way]:.4g} ms", file=sys.stderr)
        fastest = min(ms, key=lambda way: ms[way])
        self.run = self.steps[fastest]
        compiled = "compiled" if self.ids_BS.is_cuda else "not compiled"
        self.how = "; not tried: ".join([f"{compiled}: {fastest}", *map(str, self.left_out)])

    def begin(self) -> None:
        """Nothing: the way was chosen once, and nothing is counted."""

    def prefill(self) -> Tensor:
        return self.run().y

    def step(self, at: int) -> Tensor:
        """Decode the token at `at`."""
        self.ids_BS.copy_(self.ids_BN[:, at : at + 1])
        self.position_S.fill_(at)
        return self.run().y


def tell(name: str, error: Exception) -> None:
    """Why something does not run here."""
    print(f"{name} does not run here: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}", file=sys.stderr)
    traceback.print_exception(error, limit=3)


@contextmanager
def work_of(name: str, cell: Cell, device: torch.device) -> Iterator[None]:
    """Wait for what is done inside. Raises `SystemExit` after a CUDA error: every later call would fail of it too."""
    try:
        yield
        synchronize(device)
    except Exception as error:
        if is_broken(device):
            tell(f"{cell}: {name}", error)
            raise SystemExit(f"{cell}: the work of {name} ended in a CUDA error, so this process ends") from error
        raise


def is_broken(device: torch.device) -> bool:
    """Whether a CUDA error stays. One that only refuses something, as for want of memory, does not."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def told_seconds(what: str) -> Iterator[None]:
    """Say on stderr how long it took."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        print(f"{what}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


def wait_until_quiet(device: torch.device) -> None:
    """Until a GPU has done what stopped processes had launched: until then it computes for them too, by turns of ms."""
    if device.type != "cuda":
        return
    small, deadline = torch.zeros(1, device=device), time.perf_counter() + 30
    while max(time_cuda(lambda: small.add_(1), device) for _ in range(200)) > 0.5:
        if time.perf_counter() > deadline:
            raise RuntimeError("the GPU is busy with something else; no turn to time in within 30 s")


def free() -> None:
    """Give back what nobody holds any more: caches and graphs of a cell, and what a peer that failed left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_cuda(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of `call` by the host's clock, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="assets/tiny-olmoe")
    parser.add_argument("--text", default="assets/text", help="folder of texts; empty: random token ids")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--execution", default="eager")
    cells = [Cell("prefill", 8, 512), Cell("decode", 1, 256), Cell("decode", 8, 256)]
    parser.add_argument("--cells", nargs="+", type=Cell.parse, default=cells, metavar="PHASE:BATCH:LENGTH")
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), help=f"default: {' '.join(PEERS)}; also {PLAIN}; no name: ours alone"
    )
    parser.add_argument("--attention", default="sdpa", help="of transformers; gpt-oss has no sdpa: eager")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--turns", type=Path, help=TURNS_HELP)
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help=f"of {PLAIN}'s compiling")
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
    times = [f"{name} [ms]" for name in (f"ours {options.execution}", *options.peers)]
    print(f"| {' | '.join(['cell', 'floor [ms]', *times, 'ours / best [95 %]'])} |")
    print("|---|" + "---|" * (len(options.peers) + 3))
    rows: list[tuple[Any, ...]] = []
    turns, loaded, failed = Turns(options.turns), Loaded({}), False
    with torch.inference_mode(), exact_products():
        for cell in options.cells:
            try:
                timed = time_cell(options, cell, loaded, turns)
            except Exception as error:
                tell(f"{cell}: ours", error)
                timed, failed = Timed({}, {}, None), True
            text, is_slower = row(cell, timed.ms, options.peers, timed.floor_ms)
            print(text, flush=True)
            failed |= is_slower
            for name, values in timed.ms.items():
                rows += [(cell, r, name, ms, timed.floor_ms, timed.how[name]) for r, ms in enumerate(values)]
            if options.out:
                save(options.out, rows)  # so far: a machine may be taken away
    return 1 if failed else 0


def save(folder: Path, rows: list[tuple[Any, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "checkpoint_peers.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("cell", "round", "implementation", "ms", "floor_ms", "how"))
        writer.writerows(rows)


def row(cell: Cell, ms: Mapping[str, np.ndarray], peers: list[str], floor_ms: float | None) -> tuple[str, bool]:
    """(a line of the table, whether ours is slower than the fastest peer)."""
    if "ours" not in ms:
        return f"| {cell} | - |" + " fails |" * (len(peers) + 1) + " - |", False
    median = {name: float(np.median(values)) for name, values in ms.items()}
    ratios = {name: ratio(ms["ours"] / ms[name]) for name in peers if name in ms}
    times = [f"{median[name]:.4g} ({ratios[name][0]})" if name in ratios else "fails" for name in peers]
    best = min(ratios, key=lambda name: median[name], default=None)
    ours = f"{median['ours']:.4g}" if floor_ms is None else f"{median['ours']:.4g} ({floor_ms / median['ours']:.0%})"
    floor = "-" if floor_ms is None else f"{floor_ms:.4g}"
    text = " | ".join([f"| {cell}", floor, ours, *times, "-" if best is None else ratios[best][0]]) + " |"
    return text, best is not None and ratios[best][1]


def ratio(rounds: np.ndarray) -> tuple[str, bool]:
    """(the median ratio with its interval, which takes 6 rounds; whether it is above `LIMIT`)."""
    interval = median_interval(np.sort(rounds))
    known = "no interval" if interval is None else f"{interval[0]:.3f}, {interval[1]:.3f}"
    return f"{np.median(rounds):.3f} [{known}]", interval is not None and interval[0] > LIMIT


@dataclass
class Loaded:
    """What is loaded once for all cells: our weights, and transformers' model as soon as a peer needs it."""

    weights: dict[str, Tensor]
    model: Any = None


def peer_of(
    options: argparse.Namespace, name: str, cell: Cell, built: Built, loaded: Loaded, mine_BV: Tensor, turns: Turns
) -> Peer | PlainPeer:
    """The peer, compiled and warm. Raises `ValueError` if its logits are not ours."""
    if name == PLAIN:
        return PlainPeer(cell, built, mine_BV, options.limit, turns.clock)
    if loaded.model is None:
        loaded.model = peer_model(built, loaded.weights, options.attention)
    peer = Peer(loaded.model, name, built, cell.length if cell.phase == "decode" else None)
    peer.begin()
    theirs: list[Tensor] = []
    for i in range(3):  # the first compiles; what later ones read of a cache of a window, set back, are other tokens
        y = peer.prefill() if cell.phase == "prefill" else peer.step(cell.length + i)
        theirs.append(y[:, -1].clone().float())
    if cell.phase == "decode":
        peer.require_counted(cell.length + len(theirs))
        peer.require_graphs()
    require_same(name, theirs[0], mine_BV, built.dtype)
    return peer


def our_logits(cell: Cell, built: Built) -> Tensor:
    """[B, V] of a prefill, or of the first step."""
    if cell.phase == "decode":
        built.task.seek(0)
    return built.ready_step()().y[:, -1].float()


def require_same(name: str, theirs_BV: Tensor, mine_BV: Tensor, dtype: torch.dtype) -> None:
    """Raises `ValueError` if these logits, of a prefill or of the first step, are not ours."""
    allowed = 1e-3 if dtype == torch.float32 else 0.25  # a near-tie may flip an expert in bf16
    error = float((mine_BV - theirs_BV).norm() / theirs_BV.norm())
    if not error < allowed:
        raise ValueError(f"{name} computes a different result: relative error {error:.1e}")


def time_cell(options: argparse.Namespace, cell: Cell, loaded: Loaded, turns: Turns) -> Timed:
    """Raises whatever ours fails of; a peer that fails is left out."""
    torch.compiler.reset()  # else this cell's sizes are compiled as variable ones, and the last one's graphs are kept
    free()
    device = torch.device(options.device)
    with told_seconds(f"{cell}: ours"), work_of("ours", cell, device):
        built = ours(options, cell, loaded.weights)
        mine_BV = our_logits(cell, built).clone()
    peers: dict[str, Peer | PlainPeer] = {}
    for name in options.peers:
        try:
            with told_seconds(f"{cell}: {name}"), work_of(name, cell, device):
                peers[name] = peer_of(options, name, cell, built, loaded, mine_BV, turns)
        except Exception as error:
            tell(name, error)
            peers.pop(name, None)
        free()
    with work_of("ours", cell, device):  # whose weights and cache the peers had
        require_same("ours, after the peers,", our_logits(cell, built), mine_BV, built.dtype)
    with told_seconds(f"{cell}: its turn, with waiting for it"), turns.alone(), told_seconds(f"{cell}: its turn"):
        wait_until_quiet(device)
        return time_rounds(options, cell, built, peers)


def time_rounds(options: argparse.Namespace, cell: Cell, built: Built, peers: Mapping[str, Peer | PlainPeer]) -> Timed:
    """See `time_cell`."""
    step, phase, length, device = built.ready_step(), cell.phase, cell.length, built.device
    floor_ms = None
    if phase == "decode":
        floor_ms = built.least_bytes(STEPS) / measured_peaks(built.device, built.dtype)["bytes_per_s"] * 1e3
    for name, peer in peers.items():
        with work_of(name, cell, device):
            peer.settle()

    def one_round(name: str) -> float:
        if name == "ours":
            if phase == "prefill":
                return float(np.median([time_cuda(step, device) for _ in range(repeats)]))
            built.task.seek(0)
            return time_cuda(lambda: [(step(), built.task.advance()) for _ in range(STEPS)], device) / STEPS
        peer = peers[name]
        peer.begin()
        if phase == "prefill":
            return float(np.median([time_cuda(peer.prefill, device) for _ in range(repeats)]))
        return time_cuda(lambda: [peer.step(length + i) for i in range(STEPS)], device) / STEPS

    repeats = 1
    repeats = max(1, round(LEAST_S * 1e3 / one_round("ours")))
    order = ["ours", *peers]
    shuffle = random.Random(cell.batch).shuffle
    ms = {name: np.empty(options.rounds) for name in order}
    with unchecked():  # as a run is timed
        for name in order:  # warm-up
            with work_of(name, cell, device):
                for _ in range(3):
                    one_round(name)
        for r in range(options.rounds):
            shuffle(order)
            for name in order:
                with work_of(name, cell, device):
                    ms[name][r] = one_round(name)
    return Timed(ms, {"ours": options.execution} | {name: peer.how for name, peer in peers.items()}, floor_ms)


if __name__ == "__main__":
    sys.exit(main())
