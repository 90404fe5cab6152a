"""Measures the overhead per cell of an optimum-benchmark sweep, for comparison with benchmarks.sweep_overhead.

    python -m benchmarks.optimum_overhead --cells 10

It needs its own environment:

    python3 -m venv .venv-optimum  # it needs an older transformers
    .venv-optimum/bin/pip install -c <(grep ^torch== constraints.txt) '.[optimum]'
    .venv-optimum/bin/python -m benchmarks.optimum_overhead --cells 10

A generated model with one layer runs over batch sizes with the launcher that isolates cells (`process`, the default).
The overhead is the wall time of the sweep minus the time of loading, warm-up and timing in its reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

_CONFIG = """
defaults: [benchmark, {scenario: inference}, {launcher: process}, {backend: pytorch}, _self_]
name: tiny
backend: {device: cpu, model: MODEL, task: text-generation, library: transformers}
scenario:
  latency: true
  memory: false
  warmup_runs: 1
  iterations: 5
  duration: 0
  input_shapes: {batch_size: 1, sequence_length: 8}
  generate_kwargs: {max_new_tokens: 2, min_new_tokens: 2}
"""
_TIMED = ("load_model", "first_generate", "prefill", "generate")  # decode and per_token are parts of generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=97, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(model).save_pretrained(folder / "model")
        (folder / "tiny.yaml").write_text(_CONFIG.replace("MODEL", str(folder / "model")))
        axis = ",".join(str(1 + batch) for batch in range(cells))
        command = [
            str(Path(sys.executable).parent / "optimum-benchmark"),
            "--config-dir",
            name,
            "--config-name",
            "tiny",
        ]
        command += ["-m", f"scenario.input_shapes.batch_size={axis}", "hydra.sweep.dir=out", "hydra.job.chdir=true"]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        wall_s = time.perf_counter() - start
        reports = [json.loads(path.read_text()) for path in folder.glob("out/*/benchmark_report.json")]
    assert len(reports) == cells
    timed_s = sum(report[step]["latency"]["total"] for report in reports for step in _TIMED)
    release = version("optimum-benchmark")
    print(f"optimum-benchmark {release}, {cells} cells: {wall_s:.1f} s, {timed_s:.1f} s of it measured")
    print(f"overhead: {1e3 * (wall_s - timed_s) / cells:.0f} ms a cell")


if __name__ == "__main__":
    main()
