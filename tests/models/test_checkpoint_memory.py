"""Loading a checkpoint holds the pages of one file beside the parameters, in whatever form the file has its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.models.checkpoint import Checkpoint, without_weights
from moe_lab.models.checkpoint_forms import Form, Fp8Blocks, Mxfp4
from moe_lab.models.checkpoint_names import BIAS, layouts
from tests import tiny
from tests.models.checkpoints import F, checkpoint, edit_config

MEMORY = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from moe_lab.models.parameters import initialize
from tests.models.checkpoints import build

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

model = build(Path(sys.argv[1]), torch.bfloat16)
for parameter in model.parameters():
    parameter.fill_(1)  # its pages are there
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = status("VmRSS")
initialize(model, 0)
peak = status("VmHWM") - before
assert float(model.layers[-1].mlp.weights.w_down_EDF.double().mean()) == 0.5
print(peak)
"""
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
_LARGE = {"hidden_size": 512, "num_hidden_layers": 2, "n_group": 1, "topk_group": 1, "layer_types": ...}
_WIDTH = 1024
_WIDE_HEADS = {"linear_key_head_dim": 256, "linear_value_head_dim": 512, "full_attention_interval": 2, "head_dim": 512}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "n_experts", "keys"),
    [
        pytest.param("olmoe", 13, {}, id="experts_one_by_one"),
        pytest.param("granitemoe", 13, {}, id="stacked", marks=pytest.mark.slow),
        pytest.param("gpt_oss", 13, {}, id="transposed", marks=pytest.mark.slow),
        pytest.param(
            "gpt_oss", 140, {"quantization_config": {"quant_method": "mxfp4"}}, id="mxfp4", marks=pytest.mark.slow
        ),
        pytest.param("deepseek_v3", 72, {"quantization_config": _FP8}, id="fp8", marks=pytest.mark.slow),
        pytest.param("glm4_moe", 13, {}, id="partial_rope", marks=pytest.mark.slow),
        pytest.param("gemma4_text", 13, {}, id="two_kinds_of_heads", marks=pytest.mark.slow),
        pytest.param("qwen3_next", 13, _WIDE_HEADS, id="rows_in_groups", marks=pytest.mark.slow),
    ],
)
def test_loading_holds_no_more_than_one_file_beside_the_parameters(
    kind: str, n_experts: int, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Peak memory of a fresh process, mapped pages of files included, over two files of 40 MB and more, or 115."""
    folder = _shards(tmp_path, kind, n_experts, keys)
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    peak = int(tiny.python(MEMORY, folder))
    assert peak < 1.2 * largest


def _shards(folder: Path, kind: str, n_experts: int, keys: dict[str, Any]) -> Path:
    """A checkpoint with a file per layer and the rest in the last; every value is 0.5."""
    content = json.loads((checkpoint(kind, folder) / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = {key: n_experts for key in counts if key in content}
    widths = {key: _WIDTH for key in content if content[key] == F}
    edit_config(folder, **_LARGE, **experts, **widths, **keys)
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(without_weights(folder)).items():
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else 1
        files.setdefault(f"model-{layer}.safetensors", {})[key] = tensor
    for name, of_file in files.items():
        save_file(of_file, folder / name)
    weight_map = {key: name for name, of_file in files.items() for key in of_file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _tensors(model: Checkpoint) -> dict[str, Tensor]:
    settings = model._settings
    tensors: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, sources in layouts(shapes, (), settings.naming).items():
        for source in sources:
            target = torch.empty(shapes[name], device="meta")[source.place]
            is_matrix = source.key.endswith("proj.weight") and target.dim() == 2
            form = settings.blocks if settings.blocks is not None and is_matrix else source.form
            tensors |= _of_form(form, source.key, tuple(target.shape))
    return tensors


def _of_form(form: Form, key: str, target: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensor, and its scales, of which every value is 0.5."""
    shape = form.shape(target)
    if isinstance(form, Mxfp4):
        scales = torch.full(form.scale_shape(shape), 127, dtype=torch.uint8)
        return {key: torch.full(shape, 0x11, dtype=torch.uint8), form.scale_key(key): scales}
    if isinstance(form, Fp8Blocks):
        return {
            key: torch.ones(shape).to(torch.float8_e4m3fn),
            form.scale_key(key): torch.full(form.scale_shape(shape), 0.5),
        }
    return {key: torch.full(shape, 0.5, dtype=torch.float32 if key.endswith(BIAS) else torch.bfloat16)}
