"""A model larger than what one protobuf or 32-bit offsets could hold."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moe_lab.measure.memory import available_bytes
from tests import tiny
from tests.export import pairs

SIZES = (
    "model.vocab_size=4000",
    "model.d_model=1024",
    "model.n_heads=16",
    "model.n_layers=5",
    "model.mlp_hidden_dim=1024",
    "model.n_experts=64",
    "model.top_k=2",
    "batch=2",
    "seq_len=32",
)
_PROGRAM = """
import json, sys
from pathlib import Path
import torch
import moe_lab
from moe_lab.runs import build
from moe_lab.export.export import export
from moe_lab.runs.export import make_inputs
from moe_lab.measure.memory import resident_peak_bytes
from moe_lab.models.parameters import parameter_bytes

folder = Path(sys.argv[1])
cfg = moe_lab.compose(["model=decoder_moe", "export=netron", "device=cpu", "dtype=fp32", *sys.argv[2:]])
model = build.build_model(cfg, torch.device("cpu"))
found = export(cfg, model, folder, make_inputs)
print(json.dumps({**found, "weights_bytes": parameter_bytes(model), "peak_bytes": resident_peak_bytes()}))
"""


@pytest.mark.slow
def test_four_gigabytes_of_weights(tmp_path: Path) -> None:
    """Exported and verified with less than 2.2 times the weights resident: once in torch, once in the mapped file."""
    there = available_bytes(torch.device("cpu"))
    if there is not None and there < 12 << 30:
        pytest.skip("less than 12 GiB of memory are free")
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("less than 6 GiB of disk are free")
    done = subprocess.run(
        pairs.python("-c", _PROGRAM, str(tmp_path / "pair"), *SIZES), cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights_bytes"] > 2 << 30 and found["params_bytes"] >= found["weights_bytes"]
    assert found["parity"]["status"] == "passed" and found["parity"]["rel_error"] < 1e-5
    assert found["peak_bytes"] < 2.2 * found["weights_bytes"]
    shutil.rmtree(tmp_path / "pair")
