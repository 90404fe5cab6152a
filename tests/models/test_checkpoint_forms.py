"""models/checkpoint_forms.py: quantised checkpoints, dequantised as they are loaded, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.models import checkpoint_forms
from moe_lab.models.checkpoint_forms import Fp8Blocks, OnePlus, Regrouped, Times
from moe_lab.runs.run import run
from tests import tiny
from tests.models.checkpoints import (
    checkpoint,
    complaint,
    edit_config,
    ids,
    load,
    save,
    tensors,
    trained,
    write_tensors,
)
from tests.models.test_checkpoint import assert_logits, computed

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}
SCALE = "_scale_inv"


def expanded(scale: Tensor, shape: torch.Size, rows: int, columns: int) -> Tensor:
    """[blocks, blocks] -> [rows, columns], element by element."""
    y = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y[i, j] = scale[i // rows, j // columns]
    return y


def quantized(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(fp8 values, scales): the largest of each block becomes 448."""
    pieces = [block.split(columns, 1) for block in weight.split(rows)]
    scale = torch.tensor([[float(piece.abs().max()) / 448 for piece in of_row] for of_row in pieces])
    return (weight / expanded(scale, weight.shape, rows, columns)).to(torch.float8_e4m3fn), scale


def is_quantized(key: str) -> bool:
    """As in DeepSeek-V3: projections, and neither the gate nor the embedding nor norms."""
    return key.endswith("_proj.weight") or "kv_a_proj_with_mqa.weight" in key


def quantize(folder: Path, config: Any = CONFIG) -> dict[str, Tensor]:
    """Make a checkpoint one of fp8; the values that it then has, in fp32."""
    content, meant = {}, {}
    rows, columns = CONFIG["weight_block_size"]
    for key, weight in tensors(folder).items():
        content[key] = meant[key] = weight
        if is_quantized(key):
            content[key], content[key + SCALE] = quantized(weight, rows, columns)
            meant[key] = content[key].float() * expanded(content[key + SCALE], weight.shape, rows, columns)
    write_tensors(folder, content)
    edit_config(folder, quantization_config=config)
    return meant


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("deepseek_v3", "qwen3_moe")])
def test_fp8_blocks_give_the_logits_of_transformers_on_dequantized_weights(kind: str, tmp_path: Path) -> None:
    """Sizes that no block divides; of any architecture."""
    folder = checkpoint(kind, tmp_path / "fp8", seed=4)
    meant = quantize(folder)
    other = checkpoint(kind, tmp_path / "plain", seed=4)
    write_tensors(other, meant)
    got = load(folder)
    want = dict(load(other).named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in got.named_parameters())
    assert str(got.form) == "fp8 with a scale per 16x8 block"
    peer = trained(kind, seed=4).__class__.from_pretrained(other, dtype=torch.float32, attn_implementation="eager")
    assert_logits(got(ids(2, 9)).y, computed(peer.eval(), ids(2, 9)).logits)


def test_fp8_is_rounded_once_to_bf16(tmp_path: Path) -> None:
    """The product with the scale is computed in fp32."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder)
    narrow, wide = dict(load(folder, torch.bfloat16).named_parameters()), load(folder)
    assert all(torch.equal(narrow[n], p.to(narrow[n].dtype)) for n, p in wide.named_parameters())


@pytest.mark.parametrize("at_once", [pytest.param(n, id=f"{n}_values_at_once") for n in (1, 90, 1 << 22)])
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.bfloat16)])
def test_a_matrix_is_dequantized_in_pieces(at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole blocks of rows, however small they have to be."""
    monkeypatch.setattr(checkpoint_forms, "_VALUES_AT_ONCE", at_once)
    weight = torch.randn(37, 21, generator=torch.Generator().manual_seed(0))
    values, scale = quantized(weight, 4, 5)
    form, target = Fp8Blocks(4, 5), torch.full((37, 21), torch.nan, dtype=dtype)
    assert form.scale_shape(weight.shape) == tuple(scale.shape) == (10, 5)
    form.put(target, values, scale)
    assert torch.equal(target, (values.float() * expanded(scale, weight.shape, 4, 5)).to(dtype))


@pytest.mark.slow
def test_a_scale_may_be_in_another_file(tmp_path: Path) -> None:
    """As where a shard ends between a matrix and its scales."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder)
    want, content = load(folder), tensors(folder)
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": lambda key: not key.endswith(SCALE), "b.safetensors": lambda key: key.endswith(SCALE)}
    weight_map = {}
    for file, belongs in parts.items():
        of_file = {key: value for key, value in content.items() if belongs(key)}
        save_file(of_file, folder / file)
        weight_map |= dict.fromkeys(of_file, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load(folder)(ids(1, 5)).y, want(ids(1, 5)).y)


@pytest.mark.slow
def test_some_matrices_may_be_left_in_bf16(tmp_path: Path) -> None:
    """What is quantised says the dtype in the file."""
    folder = checkpoint("deepseek_v3", tmp_path)
    meant, content = quantize(folder), tensors(folder)
    key = "model.layers.1.self_attn.kv_b_proj.weight"
    content[key] = meant[key].bfloat16()
    del content[key + SCALE]
    write_tensors(folder, content)
    edit_config(folder, quantization_config={**CONFIG, "modules_to_not_convert": ["kv_b_proj"]})
    assert torch.equal(load(folder).layers[1].attention.kv_up.weight, content[key].float())


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda c: c.pop(O_PROJ + SCALE), ["1 missing", O_PROJ + SCALE], id="no_scale"),
        pytest.param(
            lambda c: c.update({O_PROJ + SCALE: torch.ones(1, 1)}),
            [O_PROJ + SCALE, "has shape [1, 1] instead of [2, 5]"],
            id="shape_of_a_scale",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c.update({O_PROJ + SCALE: torch.ones(2, 5, dtype=torch.int32)}),
            [O_PROJ + SCALE, "has dtype I32"],
            id="dtype_of_a_scale",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c.update({O_PROJ + SCALE: torch.full((2, 5), torch.nan)}),
            [O_PROJ, "times its scales", "NaN"],
            id="nan_in_a_scale",
        ),
        pytest.param(
            lambda c: c.update({O_PROJ: torch.full_like(c[O_PROJ].float(), torch.nan).to(torch.float8_e4m3fn)}),
            [O_PROJ, "NaN"],
            id="nan_in_a_matrix",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c.update({"model.norm.weight_scale_inv": torch.ones(1)}),
            ["1 unexpected", "model.norm.weight_scale_inv"],
            id="a_scale_of_nothing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c.update({O_PROJ: c[O_PROJ].float()}),
            ["1 unexpected", O_PROJ + SCALE],
            id="a_scale_too_many",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda c: c.update({O_PROJ: c[O_PROJ].float().to(torch.float8_e5m2)}),
            [O_PROJ, "has dtype F8_E5M2"],
            id="another_fp8",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_named(change: Any, said: list[str], tmp_path: Path) -> None:
    """In one line, with the tensor."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder)
    content = tensors(folder)
    change(content)
    write_tensors(folder, content)
    message = complaint(lambda: load(folder))
    assert all(text in message for text in said), message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param({"quant_method": "gptq", "bits": 4}, "quant_method=gptq", id="gptq"),
        pytest.param({"quant_method": "awq"}, "quant_method=awq", id="awq"),
        pytest.param({"quant_method": "compressed-tensors"}, "quant_method=compressed-tensors", id="compressed"),
        pytest.param({**CONFIG, "fmt": "e5m2"}, "fmt=e5m2", id="another_fp8"),
        pytest.param({**CONFIG, "weight_block_size": None}, "weight_block_size=None", id="no_blocks"),
        pytest.param({**CONFIG, "weight_block_size": [128]}, "weight_block_size=[128]", id="one_size"),
        pytest.param({**CONFIG, "weight_block_size": [128, 0]}, "weight_block_size=[128, 0]", id="size_of_0"),
        pytest.param({**CONFIG, "weight_block_size": [128, True]}, "weight_block_size=[128, True]", id="flag"),
        pytest.param({"bits": 4}, "quant_method=None", id="no_method"),
        pytest.param("fp8", "quantization_config=fp8", id="text"),
    ],
)
def test_a_format_that_is_not_supported_is_named(config: Any, said: str, tmp_path: Path) -> None:
    """With what is."""
    folder = checkpoint("deepseek_v3", tmp_path)
    edit_config(folder, quantization_config=config)
    assert said in complaint(lambda: load(folder))


def test_fp8_that_the_configuration_does_not_tell_of_is_refused(tmp_path: Path) -> None:
    """The size of its blocks is not known."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder)
    edit_config(folder, quantization_config=...)
    assert "has dtype F8_E4M3" in complaint(lambda: load(folder))


def test_another_key_of_the_quantization_is_warned_of(tmp_path: Path) -> None:
    """As of any key that nobody reads."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder, {**CONFIG, "hadamard": True})
    (keys, _) = load(folder).warnings()
    assert "quantization_config.hadamard" in keys


@pytest.mark.slow
def test_the_record_says_what_the_files_were(tmp_path: Path) -> None:
    """Beside who computes, and in a warning; a checkpoint in bf16 has neither."""
    for kind, said in (("fp8", "fp8 with a scale per 16x8 block"), ("plain", None)):
        folder = save(trained("deepseek_v3"), tmp_path / kind)
        if said:
            quantize(folder)
        cfg = tiny.compose("checkpoint", f"model.path={folder}", "workload=random", "router=native")
        record = run(cfg, tmp_path / "run" / kind)
        assert record.implementation.get("weights") == said
        assert any("dequantised" in text for text in record.warnings) is (said is not None)


def test_the_weight_of_a_zero_centred_norm_is_one_more_than_in_the_file() -> None:
    """In fp32 what bf16 would round away stays."""
    target, values = torch.empty(3), torch.tensor([0.0, -0.5, 2**-9]).bfloat16()
    OnePlus().put(target, values)
    assert target.tolist() == [1.0, 0.5, 1 + 2**-9]


def test_a_vector_may_be_multiplied_as_it_is_loaded() -> None:
    """In the dtype of the target: what bf16 would round stays."""
    target = torch.empty(2)
    Times(2816**-0.5).put(target, torch.tensor([1.0, 3.0]).bfloat16())
    torch.testing.assert_close(target, torch.tensor([1.0, 3.0]) * 2816**-0.5, rtol=1e-7, atol=0)


def test_rows_in_groups_are_put_part_by_part() -> None:
    """Two groups with parts of 1, 2 and 3 rows."""
    target, values = torch.empty(12, 2), torch.arange(12.0).unsqueeze(1).repeat(1, 2)
    Regrouped((1, 2, 3)).put(target, values)
    assert target[:, 0].tolist() == [0, 6, 1, 2, 7, 8, 3, 4, 5, 9, 10, 11]
    bias = torch.empty(4)
    Regrouped((1, 1)).put(bias, torch.arange(4.0))
    assert bias.tolist() == [0, 2, 1, 3]


def test_rows_in_groups_may_be_fp8() -> None:
    """Blocks of scales lie over the rows as they are in the file."""
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    values, scale = quantized(weight, 5, 3)
    form = Regrouped((1, 2)).in_blocks(Fp8Blocks(5, 3))
    assert (form.dtypes, form.scale_key("x"), form.scale_shape((12, 8))) == (("F8_E4M3",), "x_scale_inv", (3, 3))
    got, want = torch.empty(12, 8), torch.empty(12, 8)
    form.put(got, values, scale)
    Regrouped((1, 2)).put(want, values.float() * expanded(scale, weight.shape, 5, 3))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe"])
def test_gated_delta_nets_in_fp8_give_the_values_that_the_file_means(kind: str, tmp_path: Path) -> None:
    """Also where a matrix has its rows in groups."""
    folder = checkpoint(kind, tmp_path)
    content, meant = {}, {}
    for key, weight in tensors(folder).items():
        content[key] = meant[key] = weight
        if key.endswith(("in_proj_qkvz.weight", "in_proj_qkv.weight", "q_proj.weight", "out_proj.weight")):
            content[key], content[key + SCALE] = quantized(weight, 16, 8)
            meant[key] = content[key].float() * expanded(content[key + SCALE], weight.shape, 16, 8)
    write_tensors(folder, meant)
    want = load(folder)(ids(2, 9)).y
    write_tensors(folder, content)
    edit_config(folder, quantization_config=CONFIG)
    assert torch.equal(load(folder)(ids(2, 9)).y, want)
