"""Measures ONNX exports of the demo's sizes and of 4 GB of weights: parity in ONNX Runtime, file sizes, peak memory.

    python -m benchmarks.export_pairs --out docs/results/cpu/export.csv

Each export runs in its own process and writes to a temporary folder. Peak memory is the peak resident memory of the
process (VmHWM), including the mapped `__params__`.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_LARGE = "model=decoder_moe model.d_model=1024 model.n_heads=16 model.mlp_hidden_dim=1024 model.n_experts=64 seq_len=32"
CASES = {
    "minimal": "model=minimal model.hidden=4096",
    "transformer_decoder": "model=transformer_decoder",
    "decoder_moe torch": "model=decoder_moe router=torch",
    "decoder_moe sinkhorn": "model=decoder_moe router=sinkhorn",
    "decoder_moe expert_choice": "model=decoder_moe router=expert_choice",
    "decoder_moe deepseek_v3": "model=decoder_moe router=deepseek_v3 router.top_groups=8",
    "decoder_moe capacity": "model=decoder_moe router=capacity router.policy=next_best",
    "decoder_moe top_p": "model=decoder_moe router=top_p",
    "decoder_moe hash": "model=decoder_moe router=hash",
    "decoder_moe soft": "model=decoder_moe router=soft",
    "decoder_moe torch bf16": "model=decoder_moe dtype=bf16",
    "decoder_moe torch, large": f"{_LARGE} model.vocab_size=4000 model.n_layers=5",
    "decoder_moe torch, large, vocabulary 32000": f"{_LARGE} model.n_layers=4",
}
_PROGRAM = """
import json, sys
from pathlib import Path
import torch, moe_lab
from moe_lab.measure.memory import resident_peak_bytes
from moe_lab.models.parameters import parameter_bytes
from moe_lab.runs import build, export
cfg = moe_lab.compose(["export=netron", "device=cpu", "batch=2", *sys.argv[2:]])
model = build.build_model(cfg, torch.device("cpu"))
record = export.exporter().export(cfg, model, Path(sys.argv[1]), export.make_inputs)
record["weights_bytes"], record["peak_bytes"] = parameter_bytes(model), resident_peak_bytes()
print(json.dumps(record))
"""


def main() -> None:
    """Print a row for each case, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/cpu/export.csv"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="print these rows; nothing is written")
    given = parser.parse_args()
    rows = []
    for name, overrides in CASES.items():
        if given.only and name not in given.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _PROGRAM, f"{folder}/pair", *overrides.split()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            cases = json.loads(Path(folder, "pair", "parity.json").read_text())["cases"]
        parity = found["parity"]
        rows.append(
            {
                "model": name,
                "status": parity["status"],
                "cases": len(cases),
                "rel_error": f"{parity['rel_error']:.2e}",
                "max_abs_error": f"{parity['max_abs_error']:.2e}",
                "mean_abs_error": f"{parity['mean_abs_error']:.2e}",
                "argmax_agreement": parity["argmax_agreement"],
                "id_agreement": min(parity["id_agreement"].values(), default=None),
                "near_ties": parity["near_ties"],
                "nodes": found["nodes"],
                "functions": found["functions"],
                "model_kb": round(found["model_bytes"] / 1e3, 1),
                "params_mb": round(found["params_bytes"] / 1e6, 1),
                "peak_over_weights": round(found["peak_bytes"] / found["weights_bytes"], 3),
                "seconds": round(found["seconds"], 1),
            }
        )
        print(rows[-1], flush=True)
    if given.only:
        return
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
