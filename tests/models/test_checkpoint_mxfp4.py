"""checkpoint_forms.Mxfp4 and Arranged: gpt-oss's 4-bit experts, dequantised as they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.models import checkpoint_forms
from moe_lab.models.checkpoint_forms import Arranged, Mxfp4
from tests import tiny
from tests.models.checkpoints import E, complaint, edit_config, ids, load, save, tensors, trained, write_tensors
from tests.models.test_checkpoint import assert_logits, computed, decoded

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
WIDTH = 64


def quantized(folder: Path, seed: int = 0) -> Any:
    """A checkpoint in `folder` whose experts are random MXFP4, and the model of transformers that it means."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    peer, generator = trained("gpt_oss", seed, intermediate_size=WIDTH), torch.Generator().manual_seed(seed)
    content = tensors(save(peer, folder))
    for layer, block in enumerate(peer.model.layers):
        for name, rows, columns in (("gate_up_proj", 2 * WIDTH, 32), ("down_proj", 32, WIDTH)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = torch.randint(256, (E, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 126, (E, rows, columns // 32), dtype=torch.uint8, generator=generator)
            content |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            del content[key]
            getattr(block.mlp.experts, name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    write_tensors(folder, content)
    edit_config(folder, quantization_config=CONFIG)
    return peer


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed{seed}") for seed in range(3)])
def test_a_quantised_checkpoint_gives_the_logits_of_transformers(seed: int, tmp_path: Path) -> None:
    """At once, and token by token."""
    pytest.importorskip("transformers")
    peer = quantized(tmp_path, seed)
    model, ids_BN = load(tmp_path), ids(2, 14, seed)
    want = computed(peer, ids_BN)
    assert_logits(model(ids_BN).y, want.logits)
    assert_logits(decoded(model, ids_BN, context_len=3)[0], want.logits[:, 3:])
    (warning,) = model.warnings()
    assert "the weights are mxfp4 (of the experts); they were dequantised as they were loaded" in warning


@pytest.mark.parametrize("at_once", [pytest.param(n, id=f"{n}_values") for n in (1, 200, 1 << 22)])
@pytest.mark.parametrize("interleaved", [pytest.param(True, id="interleaved"), pytest.param(False, id="plain")])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_each_value_is_the_table_s_times_a_power_of_two(
    dtype: torch.dtype, interleaved: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Element by element, whatever the pieces: the lower half of a byte first, the gate's rows first."""
    monkeypatch.setattr(checkpoint_forms, "_VALUES_AT_ONCE", at_once)
    generator, (experts, rows, columns) = torch.Generator().manual_seed(0), (2, 10, 64)
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, blocks.shape[:3], dtype=torch.uint8, generator=generator)
    scales[0, 0, 0], scales[1, 3, 1] = 0, 254
    target, form = torch.full((experts, rows, columns), torch.nan, dtype=dtype), Mxfp4(interleaved)
    assert (form.shape(target.shape), form.scale_shape(blocks.shape)) == (tuple(blocks.shape), tuple(scales.shape))
    form.put(target, blocks, scales)
    for e in range(experts):
        for r in range(rows):
            mine = r // 2 + (r % 2) * rows // 2 if interleaved else r
            for c in range(columns):
                byte = int(blocks[e, r, c // 32, c % 32 // 2])
                nibble = byte & 15 if c % 2 == 0 else byte >> 4
                want = torch.tensor(VALUES[nibble] * 2.0 ** (int(scales[e, r, c // 32]) - 127), dtype=torch.float64)
                assert target[e, mine, c] == want.to(dtype)


def test_a_scale_of_255_is_nan_and_the_checkpoint_refused(tmp_path: Path) -> None:
    """It is the format's NaN."""
    pytest.importorskip("transformers")
    quantized(tmp_path)
    content, key = tensors(tmp_path), "model.layers.1.mlp.experts.down_proj"
    content[f"{key}_scales"][2, 3, 0] = 255
    write_tensors(tmp_path, content)
    message = complaint(lambda: load(tmp_path))
    assert f"{key}_blocks times its scales has values that are NaN, infinite or too large" in message


@pytest.mark.parametrize("part", [pytest.param(part, id=part) for part in ("gate_up_proj", "down_proj")])
@pytest.mark.parametrize("what", [pytest.param(what, id=what) for what in ("blocks", "scales")])
def test_missing_and_unfit_blocks_and_scales_are_named(what: str, part: str, tmp_path: Path) -> None:
    """Each by its key, in one line."""
    pytest.importorskip("transformers")
    quantized(tmp_path)
    whole, key = tensors(tmp_path), f"model.layers.1.mlp.experts.{part}_{what}"

    def refusal(**change: Tensor) -> str:
        write_tensors(tmp_path, {**{k: v for k, v in whole.items() if k != key}, **change})
        return complaint(lambda: load(tmp_path))

    assert f"1 missing: {key}" in refusal()
    assert f"{key} has shape" in refusal(**{key: whole[key][:-1].clone()})
    assert f"{key} has dtype I8; supported: U8" in refusal(**{key: whole[key].view(torch.int8)})


def test_the_configuration_decides_which_tensors_are_looked_for(tmp_path: Path) -> None:
    """MXFP4 without a word of it, and the other way round, is named by the keys."""
    pytest.importorskip("transformers")
    quantized(tmp_path / "q")
    edit_config(tmp_path / "q", quantization_config=...)
    assert "down_proj_blocks" in (message := complaint(lambda: load(tmp_path / "q"))) and "unexpected" in message
    save(trained("gpt_oss", intermediate_size=WIDTH), tmp_path / "p")
    edit_config(tmp_path / "p", quantization_config=CONFIG)
    assert "missing: model.layers.0.mlp.experts" in complaint(lambda: load(tmp_path / "p"))


def test_of_other_models_mxfp4_is_refused_by_name(tmp_path: Path) -> None:
    """Their experts have no such layout."""
    folder = save(trained("mixtral"), tmp_path)
    edit_config(folder, quantization_config=CONFIG)
    assert "quantization_config.quant_method=mxfp4" in complaint(lambda: load(folder))


@pytest.mark.parametrize("key", [pytest.param(key, id=key) for key in ("hidden_size", "intermediate_size")])
def test_a_width_that_no_block_fits_is_refused(key: str, tmp_path: Path) -> None:
    """A row has whole blocks."""
    folder = save(trained("gpt_oss", intermediate_size=WIDTH), tmp_path)
    edit_config(folder, quantization_config=CONFIG, **{key: 40})
    assert f"{key}=40 must be a multiple of 32 in mxfp4" in complaint(lambda: load(folder))


def test_the_record_says_what_the_weights_were(tmp_path: Path) -> None:
    """Beside what computed them."""
    from moe_lab.runs.run import run

    pytest.importorskip("transformers")
    quantized(tmp_path / "m")
    cfg = tiny.compose("checkpoint", f"model.path={tmp_path / 'm'}", "workload=random")
    record = run(cfg, tmp_path / "out")
    assert record.status == "ok", record.reason
    assert record.implementation["weights"] == "mxfp4 (of the experts)"


@pytest.mark.parametrize("transposed", [pytest.param(True, id="transposed"), pytest.param(False, id="rows_as_ours")])
@pytest.mark.parametrize("interleaved", [pytest.param(True, id="interleaved"), pytest.param(False, id="halves")])
def test_rows_and_columns_find_their_place(transposed: bool, interleaved: bool) -> None:
    """Element by element."""
    form, target = Arranged(transposed, interleaved), torch.zeros(2, 6, 5)
    values = torch.arange(60.0).view(form.shape(target.shape))
    form.put(target, values)
    for e in range(2):
        for r in range(6):
            mine = r // 2 + (r % 2) * 3 if interleaved else r
            assert torch.equal(target[e, mine], values[e, :, r] if transposed else values[e, r])
