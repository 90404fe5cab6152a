"""Exports of the demo's sizes, and of four gigabytes of weights: parity with ONNX Runtime, sizes, peak memory.

    python benchmarks/export_pairs.py [OUT.csv]

Each in a process of its own, into a temporary folder that is removed. Peak memory is the process's resident high-water
mark (VmHWM), the mapped `__params__` included.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [
    ("minimal", ["model=minimal", "model.hidden=4096"]),
    ("transformer_decoder", ["model=transformer_decoder"]),
    *(
        (f"decoder_moe {router}", ["model=decoder_moe", f"router={router}", *more])
        for router, *more in (
            ["torch"],
            ["sinkhorn"],
            ["expert_choice"],
            ["deepseek_v3", "router.top_groups=8"],
            ["capacity", "router.policy=next_best"],
            ["top_p"],
            ["hash"],
            ["soft"],
        )
    ),
    ("decoder_moe torch bf16", ["model=decoder_moe", "dtype=bf16"]),
    (
        "decoder_moe torch, large",
        [
            *("model=decoder_moe", "model.vocab_size=4000", "model.d_model=1024", "model.n_heads=16"),
            *("model.n_layers=5", "model.mlp_hidden_dim=1024", "model.n_experts=64", "seq_len=32"),
        ],
    ),
    (
        "decoder_moe torch, large, vocabulary 32000",
        [
            *("model=decoder_moe", "model.d_model=1024", "model.n_heads=16", "model.n_layers=4"),
            *("model.mlp_hidden_dim=1024", "model.n_experts=64", "seq_len=32"),
        ],
    ),
]
_PROGRAM = """
import json, sys
from pathlib import Path
import torch, moe_lab
from moe_lab import build
from moe_lab.export.export import export
from moe_lab.measure.memory import resident_peak_bytes
from moe_lab.models.parameters import parameter_bytes
cfg = moe_lab.compose(["export=netron", "device=cpu", "dtype=fp32", "batch=2", *sys.argv[2:]])
model = build.build_model(cfg, torch.device("cpu"))
found = export(cfg, model, Path(sys.argv[1]))
found["weights_bytes"], found["peak_bytes"] = parameter_bytes(model), resident_peak_bytes()
print(json.dumps(found))
"""


def main() -> None:
    rows = []
    for name, overrides in CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _PROGRAM, f"{folder}/pair", *overrides]
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
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/cpu/export.csv")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
