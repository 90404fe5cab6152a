"""cli/inspect.py: what a checkpoint is, by its config.json and the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lab.cli import inspect
from moe_lab.models import architectures
from tests import quick
from tests.models.checkpoints import checkpoint, edit_config, kinds, tensors, write_tensors
from tests.models.released import LATENT, SHARED
from tests.models.test_checkpoint_forms import quantize
from tests.models.test_checkpoint_gemma import WHOLE as GEMMA

_TWO_LAYERS = ["sliding_attention", "full_attention"]


def shown(folder: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, str]:
    """The lines by name; the exit code is `code`."""
    assert inspect.main([str(folder)]) == code
    lines = capsys.readouterr().out.splitlines()
    width = lines[0].index(lines[0].split()[1]) if lines else 0
    return {line[:width].strip(): line[width:] for line in lines}


@kinds
def test_a_tiny_checkpoint_of_each_architecture_is_supported(kind: str, tmp_path: Path) -> None:
    """Every tensor has its place; the architecture is the one that is listed."""
    facts = inspect.facts_of(checkpoint(kind, tmp_path))
    architecture = architectures.of_type(kind)
    assert architecture is not None
    assert facts["supported"] == "yes" and facts["unusual"] == architecture.unusual
    assert facts["family"] == f"{kind} ({architecture.models})" and facts["tested"] == architecture.tested
    assert facts["keys_not_used"] is None  # of all that transformers writes


def test_the_lines_of_the_small_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """What a person reads."""
    lines = shown(quick.TINY_OLMOE, capsys)
    assert lines["layers"] == "4 of width 128"
    assert lines["experts"] == "16 of width 128, 2 for each token"
    assert lines["attention"] == "4 heads of 32, 4 of keys and values, norm of all heads"
    assert lines["router"].startswith("SoftmaxTopK (renormalize=False")
    assert lines["on disk"].endswith(" GB in 1 file") and lines["supported"] == "yes"
    assert lines["cache"] == f"{4 * 2 * 128 * 2:,} bytes for each token in bf16"
    assert "not loaded" not in lines and "weights" not in lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(
            LATENT["deepseek_v2_lite"],
            {
                "family": "deepseek_v2 (DeepSeek-V2, V2-Lite)",
                "layers": "27 of width 2048, 1 of them dense (width 10944): 0",
                "attention": "latent of rank 512 with 64 turned; 16 heads of 128 + 64, values of 128",
                "experts": "64 of width 1408, 6 for each token; a shared one of width 2816 without a gate",
                "positions": "163,840, RoPE stretched by yarn",
                "parameters": "15.71 billion",
                "in_memory": "31.4 GB in bf16, 62.8 GB in fp32",
                "cache": "31,104 bytes for each token in bf16",
                "weights": None,
            },
            id="deepseek_v2_lite",
        ),
        pytest.param(
            LATENT["deepseek_v3"],
            {
                "attention": "latent of rank 512 with 64 turned, queries of rank 1536; 128 heads of 128 + 64, "
                "values of 128",
                "weights": "fp8 with a scale per 128x128 block; dequantised as they are loaded",
                "not_loaded": "1 layer that predict further tokens, if the files have them",
                "parameters": "671 billion",
                "cache": "70,272 bytes for each token in bf16",
            },
            id="deepseek_v3",
        ),
        pytest.param(LATENT["kimi_k2"], {"family": "kimi_k2 (Kimi-K2)"}, id="kimi_k2"),
        pytest.param(
            SHARED["glm_4_5_air"],
            {"attention": "96 heads of 128, 8 of keys and values, 64 of a head turned"},
            id="glm_4_5_air",
        ),
        pytest.param(
            GEMMA,
            {
                "family": "gemma4 (Gemma-4-26B-A4B)",
                "attention": "16 heads of 256, 8 of keys and values, norm of each head, a window of 1024 in 25 layers; "
                "in 5 layers heads of 512, 2 of keys that are values too",
                "experts": "128 of width 704, 8 for each token; a shared one of width 2112 without a gate; gate, "
                "experts and the shared one with norms of their own",
                "not_loaded": "the parts that read images and sound, if the files have them",
            },
            id="gemma4",
        ),
        pytest.param(
            GEMMA | {"text_config": GEMMA["text_config"] | {"num_hidden_layers": 2, "layer_types": _TWO_LAYERS}},
            {
                "attention": "16 heads of 256, 8 of keys and values, norm of each head, a window of 1024 in 1 layer; "
                "in 1 layer heads of 512, 2 of keys that are values too",
            },
            id="two_layers_of_gemma4",
        ),
    ],
)
def test_released_models_without_their_weights(content: Any, said: dict[str, Any], tmp_path: Path) -> None:
    """The numbers follow from config.json; without files it cannot be run, and which are missing is said."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    facts = inspect.facts_of(tmp_path)
    assert {key: facts[key] for key in said} == said
    assert facts["supported"].startswith("no: ") and "model.safetensors" in facts["supported"]
    assert facts["on_disk"] == "0 GB in 0 files"


def test_of_another_architecture_the_usual_numbers_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And why it is not supported."""
    content = {"model_type": "jamba", "hidden_size": 8, "num_hidden_layers": 3, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(content))
    lines = shown(tmp_path, capsys, code=1)
    assert lines["family"] == "jamba" and "model_type=jamba is not supported" in lines["supported"]
    assert lines["config"] == "num_hidden_layers=3, hidden_size=8, num_experts=4"


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that is missing, keys that nobody reads; no value is looked at."""
    folder = checkpoint("deepseek_v3", tmp_path)
    edit_config(folder, index_topk=4)
    content = tensors(folder)
    content["model.norm.weight"] *= float("nan")
    write_tensors(folder, content)
    lines = shown(folder, capsys)
    assert (lines["keys not used"], lines["supported"]) == ("index_topk", "yes")
    del content["model.layers.1.self_attn.kv_b_proj.weight"]
    write_tensors(folder, content)
    lines = shown(folder, capsys, code=1)
    assert "1 missing: model.layers.1.self_attn.kv_b_proj.weight" in lines["supported"]


def test_quantized_files_are_said(tmp_path: Path) -> None:
    """Their scales have their place, too."""
    folder = checkpoint("deepseek_v3", tmp_path)
    quantize(folder)
    facts = inspect.facts_of(folder)
    assert facts["supported"] == "yes" and facts["weights"].startswith("fp8 with a scale per 16x8 block")


def test_a_folder_without_a_configuration_is_a_mistake(tmp_path: Path) -> None:
    """As for a run."""
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        inspect.main([str(tmp_path)])


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """One document."""
    assert inspect.main([str(quick.TINY_OLMOE), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.pop("schema") == 1
    assert content == inspect.facts_of(quick.TINY_OLMOE)
