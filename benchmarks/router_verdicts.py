"""Compares router kernels with the fastest peer of each cell, from folders of sweeps and a table of peers.

    python -m benchmarks.router_verdicts outputs/route_1 outputs/route_2 outputs/gate_1 --out outputs/verdicts
    python -m benchmarks.router_verdicts docs/results/h200/routers.csv

Each folder is one process of the same sweep. The medians are taken over the folders, and the intervals cover all of
theirs. In place of folders, the `routers.csv` that `--out` wrote of them.

A peer that ran in the sweep itself is compared in its interleaved rounds (the sweep's anchor must be `cuda_ext`). The
other peers of the table were measured on another day. The peers that are in both (the witnesses) show how much the days
differ: the table is scaled by the geometric mean of their ratios, and may be off by as much as the least and the
largest of them. moe-lab is ahead in a cell if the upper end of the ratio to each of the two fastest peers is below 1.

The verdict is of hot replays. Cold ones have medians only and get no verdict; the table has their ratio to the peer of
the sweep that is the fastest when cold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

CELL = ["table", "dtype", "d_model", "n_experts", "top_k", "tokens"]
SAME = {"vllm_topk_softmax": "vllm", "vllm_grouped_topk": "vllm", "cublas+vllm_topk": "vllm", "sglang_triton": "sglang"}
"""Peers of the table that a sweep may run as router.impl."""


def us(ms: float | None) -> float:
    """Microseconds; unknown is NaN."""
    return np.nan if ms is None else ms * 1e3


def cells(folder: Path) -> pd.DataFrame:
    """A row for each ok run of a sweep: its cell, who ran, microseconds, the ratio to cuda_ext in its rounds."""
    rows = []
    for path in sorted(folder.glob("*/result.json")):
        record = json.loads(path.read_text())
        if record["status"] != "ok":
            continue
        config, latency, ratio = record["config"], record["latency_ms"], record["ratio_to_anchor"] or {}
        model, router, environment = config["model"], config["router"], record["environment"]
        sizes = model.get("shape", model)  # older records: sizes beside `sort`, a d_model where there is a gate
        d_model = sizes["d_model"] if model.get("gate", sizes["d_model"]) else None
        table = "gate" if d_model else "route_and_sort" if model["sort"] else router["name"]
        rows.append(
            {
                "table": {"mixtral": "route"}.get(table, table),
                "dtype": config["dtype"]["name"],
                "d_model": float(d_model or np.nan),
                "n_experts": sizes["n_experts"],
                "top_k": sizes["top_k"],
                "tokens": config["batch"] * config["seq_len"],
                "impl": router["impl"],
                "ran": record["implementation"]["router"],
                "gate": record["implementation"].get("gate"),
                "us": us(latency["p50"]),
                "us_low": us(latency["ci95_low"]),
                "us_high": us(latency["ci95_high"]),
                "replicates": len(latency["replicate_p50"] or [0]),
                "us_cold": us(record["latency_cold_ms"]),
                "ratio": ratio.get("p50"),
                "ratio_low": ratio.get("ci95_low"),
                "ratio_high": ratio.get("ci95_high"),
                "floor_us": us((record["roofline"] or {}).get("floor_ms")),
                "rel_error": record["check"]["rel_error"],
                "near_ties": record["check"]["near_ties"],
                **{key: environment[key] for key in ("device_name", "driver", "torch", "triton", "cuda", "python")},
                "cell_id": record["cell_id"],
                "code_id": record["code_id"],
            }
        )
    return pd.DataFrame(rows)


def joined(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell and implementation: over the processes the median, and the widest interval."""
    how = {"us_low": "min", "us_high": "max", "ratio_low": "min", "ratio_high": "max", "replicates": "sum"}
    how |= {"us": "median", "us_cold": "median", "ratio": "median", "rel_error": "max", "near_ties": "max"}
    rest = [name for name in runs if name not in (*CELL, "impl", *how)]
    return runs.groupby([*CELL, "impl"], dropna=False, as_index=False).agg(how | dict.fromkeys(rest, "first"))


def witness(ran: pd.DataFrame, peers: pd.DataFrame) -> tuple[float, float, float]:
    """(geometric mean, least, largest) of what the witnesses took now over what the table says."""
    known = peers.assign(impl=peers.peer.map(SAME)).dropna(subset="impl")
    both = ran.merge(known, on=[*CELL, "impl"], suffixes=("", "_table"))
    both = both[both.table != "route_and_sort"]  # there the table's peers sort too
    ratio = both.us / both.us_table
    return float(np.exp(np.log(ratio).mean())), float(ratio.min()), float(ratio.max())


def verdicts(ran: pd.DataFrame, peers: pd.DataFrame, scale: tuple[float, float, float]) -> pd.DataFrame:
    """A row for each cell of ours: the best peer that ran beside it, and the best of the table that did not."""
    ours = ran.loc[ran.impl == "cuda_ext", [*CELL, "us", "us_low", "us_high", "us_cold", "replicates"]]
    beside = ran[ran.impl.isin([*SAME.values(), "transformers"])]
    ran_too = peers.assign(impl=peers.peer.map(SAME)).merge(
        beside[[*CELL, "impl"]], on=[*CELL, "impl"], how="left", indicator=True
    )
    absent = peers[(ran_too._merge == "left_only").to_numpy()]
    best = absent.loc[absent.groupby(CELL, dropna=False).us.idxmin(), [*CELL, "peer", "us"]]
    found = ours.merge(best.rename(columns={"us": "table_us"}), on=CELL, how="left")
    coldest = beside.groupby(CELL, dropna=False).us_cold.min().rename("beside_cold").reset_index()
    beside = beside.loc[beside.groupby(CELL, dropna=False).us.idxmin(), [*CELL, "impl", "us", "ratio", "ratio_low"]]
    found = found.merge(beside.rename(columns={"impl": "beside", "us": "beside_us"}), on=CELL, how="left")
    found["over_table"] = found.us / (found.table_us * scale[0])
    found["over_table_high"] = found.us_high / (found.table_us * scale[1])
    found["over_beside"], found["over_beside_high"] = 1 / found.pop("ratio"), 1 / found.pop("ratio_low")
    found = found.merge(coldest, on=CELL, how="left")
    found["cold_over_beside"] = found.pop("us_cold") / found.pop("beside_cold")
    highs = found[["over_table_high", "over_beside_high"]]
    found["verdict"] = np.where(
        highs.isna().all(axis=1), "no peer", np.where(highs.max(axis=1) < 1, "ahead", "not ahead")
    )
    return found.sort_values(CELL)


def main() -> None:
    """Print the witnesses' ratio, the cells, and a line for each table; `--out` gets two files of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--peers", type=Path, default=Path("docs/results/h200/peers.csv"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    is_table = len(args.sweeps) == 1 and args.sweeps[0].is_file()
    ran = pd.read_csv(args.sweeps[0]) if is_table else joined(pd.concat([cells(folder) for folder in args.sweeps]))
    peers = pd.read_csv(args.peers)
    scale = witness(ran, peers)
    found = verdicts(ran, peers, scale)
    print(f"witnesses over the table: {scale[0]:.3f}, all of them in [{scale[1]:.3f}, {scale[2]:.3f}]")
    print(found.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    for table, rows in found.groupby("table"):
        worst, cold = rows[["over_table", "over_beside"]].max(axis=1), rows.cold_over_beside.dropna()
        counts = ", ".join(f"{n} {verdict}" for verdict, n in rows.verdict.value_counts().items())
        mean = np.exp(-np.log(worst).mean())
        by_table = (rows.over_table_high.fillna(0) > rows.over_beside_high.fillna(0)).sum()
        print(f"{table}: {counts}, {by_table} by the table; geometric mean of the better peer's over ours {mean:.2f}")
        if len(cold):
            mean = np.exp(-np.log(cold).mean())
            print(f"    cold, beside the sweep's own peers: {(cold < 1).sum()} of {len(cold)} faster, {mean:.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        ran.sort_values([*CELL, "impl"]).to_csv(args.out / "routers.csv", index=False, float_format="%.5g")
        found.to_csv(args.out / "router_verdicts.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
