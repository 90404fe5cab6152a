"""Compares experts=auto with the fastest peer of each cell, from folders of sweeps and a table of peers.

    python -m benchmarks.expert_verdicts outputs/experts_1 outputs/experts_2 outputs/experts_3 --out outputs/verdicts
    python -m benchmarks.expert_verdicts docs/results/h200/experts.csv \\
        --beside docs/results/h200/experts_flashinfer.csv docs/results/h200/experts_sonic.csv

Each folder is one process of the same sweep (`experiment=expert_kernels`, whose anchor is `auto`). The medians are
taken over the folders, and the intervals cover all of theirs. In place of folders, the `experts.csv` that `--out` wrote
of them. `--beside` has more such tables, of other sweeps with their own `auto`.

A peer that ran beside `auto` is compared in its interleaved rounds. The other peers of `--peers` were measured on
another day. Those that are in both and are called in the same way (`WITNESSES`) show how much the days differ: at each
number of tokens the table is scaled by the geometric mean of their ratios there, and may be off by as much as the
largest and the smallest of them. moe-lab is ahead in a cell if the upper end of its ratio to every peer is below 1,
level if it is below 1.01, else behind; unknown if only the scale decides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

CELL = ["shape", "load", "tokens"]
OURS = ("auto", "fused", "grouped", "loop")
LEVEL = 1.01
WITNESSES = ("vllm", "transformers")
COLUMNS = {
    "config.model.shape.name": "shape",
    "config.workload.load": "load",
    "seq_len": "tokens",
    "experts": "experts",
    "implementation.experts": "computed_by",
    "implementation.tiles": "tiles",
    "latency_ms.p50": "ms",
    "latency_ms.ci95_low": "ms_low",
    "latency_ms.ci95_high": "ms_high",
    "ratio_to_anchor.p50": "ratio",
    "ratio_to_anchor.ci95_low": "ratio_low",
    "ratio_to_anchor.ci95_high": "ratio_high",
    "roofline.floor_ms": "floor_ms",
    "check.rel_error": "rel_error",
    "environment.device_name": "device",
    "environment.torch": "torch",
    "environment.driver": "driver",
    "code_id": "code_id",
}
"""Of runs.csv, and what they are called here."""


def read(paths: list[Path]) -> pd.DataFrame:
    """`joined` of folders, or the table of an earlier `--out`.

    Raises:
        ValueError: a folder has no runs.csv, or there is a table beside others.
    """
    if len(paths) == 1 and paths[0].is_file():
        return pd.read_csv(paths[0])
    return joined(pd.concat([cells(folder) for folder in paths]))


def cells(folder: Path) -> pd.DataFrame:
    """A row for each ok run of a sweep.

    Raises:
        ValueError: the folder has no runs.csv.
    """
    if not (folder / "runs.csv").is_file():
        raise ValueError(f"{folder}: has no runs.csv; give the folder of a finished sweep.")
    runs = pd.read_csv(folder / "runs.csv", low_memory=False)
    found = runs[runs.status == "ok"].reindex(columns=list(COLUMNS)).rename(columns=COLUMNS)
    return found.assign(load=found.load.astype(object).fillna("native"))


def joined(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell and implementation: over the processes the median, and the widest interval."""
    how = {"ms": "median", "ratio": "median", "rel_error": "max"}
    how |= dict.fromkeys(("ms_low", "ratio_low"), "min") | dict.fromkeys(("ms_high", "ratio_high"), "max")
    rest = [name for name in runs if name not in (*CELL, "experts", *how)]
    groups = runs.groupby([*CELL, "experts"], as_index=False)
    return groups.agg(how | dict.fromkeys(rest, "first")).merge(groups.size().rename(columns={"size": "processes"}))


def witness(ran: pd.DataFrame, peers: pd.DataFrame) -> pd.DataFrame:
    """By tokens, of what the witnesses took now over what the table says: geometric mean, least (`low`) and `high`."""
    now = ran[(ran.load == "native") & ran.experts.isin(WITNESSES)].rename(columns={"experts": "peer"})
    both = now.merge(peers, on=["shape", "tokens", "peer"])
    logs = np.log(both.ms_x / both.ms_y).groupby(both.tokens)
    return np.exp(logs.agg(mean="mean", low="min", high="max"))


def verdicts(
    ran: pd.DataFrame, peers: pd.DataFrame, scale: pd.DataFrame, more: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row for each cell of `auto`: the best peer that ran beside it, and the best of the table that did not.

    Args:
        scale: as `witness` gives it; where it has no such number of tokens, the table stands as it is.
        more: as `ran`, of peers whose `ratio` is to the `auto` of their own sweep. Without an interval the median
            stands for its ends.
    """
    kept = ["ms", "ms_low", "ms_high", "computed_by", "tiles", "floor_ms", "processes"]
    found = ran.loc[ran.experts == "auto", [*CELL, *kept]]
    beside = pd.concat([ran, more], ignore_index=True)
    beside = beside[~beside.experts.isin(OURS)]
    best = beside.loc[beside.groupby(CELL).ratio.idxmin(), [*CELL, "experts", "ms", "ratio"]]
    found = found.merge(best.rename(columns={"experts": "beside", "ms": "beside_ms"}), on=CELL, how="left")
    lowest = beside.ratio_low.fillna(beside.ratio).groupby([beside[key] for key in CELL]).min()  # not always the best's
    found["over_beside"] = 1 / found.pop("ratio")
    found["over_beside_high"] = 1 / found.join(lowest, on=CELL).ratio_low

    there = beside.assign(peer=beside.experts.str.removesuffix(" tuned"))[["shape", "tokens", "peer"]]
    there = pd.concat([there, there.assign(peer=there.peer + "_default_tiles")]).drop_duplicates()
    known = peers.merge(there, on=["shape", "tokens", "peer"], how="left", indicator=True)
    absent = known[known._merge == "left_only"]
    absent = absent.loc[absent.groupby(["shape", "tokens"]).ms.idxmin(), ["shape", "tokens", "peer", "ms"]]
    absent = absent.assign(load="native").rename(columns={"peer": "absent", "ms": "absent_ms"})
    found = found.merge(absent, on=CELL, how="left")
    for name, of_scale in (("over_absent", "mean"), ("over_absent_low", "high"), ("over_absent_high", "low")):
        found[name] = found.ms / (found.absent_ms * found.tokens.map(scale[of_scale]).fillna(1.0))

    high = found[["over_beside_high", "over_absent_high"]].max(axis=1)
    depends = (found.over_beside_high.fillna(0) <= LEVEL) & (found.over_absent_low <= LEVEL)
    names = np.where(high < 1, "ahead", np.where(high <= LEVEL, "level", np.where(depends, "unknown", "behind")))
    found["verdict"] = np.where(high.isna(), "no peer", names)
    found["over_floor"] = found.ms / found.floor_ms
    return found.sort_values(CELL)


def mean_of(found: pd.DataFrame) -> float:
    """The geometric mean of the faster peer's time over ours."""
    worst = found[["over_beside", "over_absent"]].max(axis=1).dropna()
    return float(np.exp(-np.log(worst).mean()))


def main() -> None:
    """Print the scale, the cells and what they come to; `--out` gets two files of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders, one for each process; or one experts.csv")
    parser.add_argument("--beside", nargs="*", type=Path, default=[], metavar="TABLE", help="of other sweeps")
    parser.add_argument("--peers", type=Path, default=Path("docs/results/h200/expert_peers.csv"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        ran = read(args.sweeps)
    except ValueError as error:
        parser.error(str(error))
    peers = pd.read_csv(args.peers)
    scale = witness(ran, peers)
    found = verdicts(ran, peers, scale, pd.concat(map(pd.read_csv, args.beside)) if args.beside else None)
    texts = [f"{row.Index} tokens {row.mean:.3f} ({row.low:.3f} to {row.high:.3f})" for row in scale.itertuples()]
    print("witnesses over the table: " + ", ".join(texts))
    print(found.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    counts = ", ".join(f"{n} {verdict}" for verdict, n in found.verdict.value_counts().items())
    real = found[(found["shape"] != "demo") & (found.load == "native")]
    print(f"{counts}; geometric mean of the faster peer's time over ours {mean_of(found):.3f},")
    print(f"of the real shapes {mean_of(real):.3f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        ran.sort_values([*CELL, "experts"]).to_csv(args.out / "experts.csv", index=False, float_format="%.5g")
        found.to_csv(args.out / "expert_verdicts.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
