"""models/checkpoint_delta_net.py: config.json of Qwen3-Next and Qwen3.5, and of the text part of the latter alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.checkpoint import without_weights
from moe_lab.models.checkpoint_config import Settings, read
from moe_lab.models.checkpoint_forms import Fp8Blocks
from moe_lab.runs.run import run
from tests import tiny
from tests.models.checkpoints import (
    build,
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
from tests.models.released import COMMON
from tests.models.test_checkpoint import assert_logits, assert_same_experts, computed, decoded

_BOTH: dict[str, Any] = {
    "attention_bias": False,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}
NEXT: dict[str, Any] = {
    **COMMON,
    **_BOTH,
    "architectures": ["Qwen3NextForCausalLM"],
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "intermediate_size": 5120,
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TEXT: dict[str, Any] = {
    **COMMON,
    **_BOTH,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
    "mamba_ssm_dtype": "float32",
    "model_type": "qwen3_5_moe_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "vocab_size": 248320,
}
WHOLE: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5_moe",
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "transformers_version": "5.0.0",
    "video_token_id": 248057,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe", "patch_size": 16},
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
RELEASED = {"next": NEXT, "text": TEXT, "whole": WHOLE}
kinds = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in RELEASED])


def settings(folder: Path, kind: str, **keys: Any) -> Settings:
    """Of a released model with some keys changed, of `whole` in its text part; ... removes one."""
    content = dict(RELEASED[kind])
    part = content["text_config"] = dict(TEXT) if kind == "whole" else content
    part |= keys
    for key in [key for key, value in keys.items() if value is ...]:
        del part[key]
    if kind != "whole":
        del content["text_config"]
    (folder / "config.json").write_text(json.dumps(content))
    return read(folder)


@kinds
def test_released_models_are_read_off_their_configuration(kind: str, tmp_path: Path) -> None:
    """Every key of theirs is known."""
    found = settings(tmp_path, kind)
    decoder, n = found.decoder, 48 if kind == "next" else 40
    assert found.unread == () and found.model_type == RELEASED[kind]["model_type"]
    assert (decoder["n_layers"], decoder["n_experts"], decoder["top_k"]) == ((48, 512, 10) if n == 48 else (40, 256, 8))
    assert (decoder["head_dim"], decoder["rotary_dim"], decoder["rope_theta"]) == (256, 64, 1e7)
    assert (decoder["qk_norm"], decoder["norm"], decoder["output_gate"]) == ("head", "wide", True)
    assert (decoder["shared_expert_hidden_dim"], decoder["shared_expert_gate"]) == (512, True)
    assert [layer for layer, mixer in enumerate(decoder["mixers"]) if mixer is None] == list(range(3, n, 4))
    assert decoder["mixers"][0] == {
        "kind": "delta_net",
        "n_heads": 16,
        "head_dim": 128,
        "n_value_heads": 32,
        "value_dim": 128,
        "conv_width": 4,
    }
    assert found.router["renormalize"] is True and found.dense_layers == frozenset()
    assert found.groups == {"q": (256, 256), "qkvz": (128, 128, 256, 256), "ba": (2, 2)}
    assert found.ends == {151645 if kind == "next" else 248044} and found.max_positions == 262144
    assert found.prefix == ("model.language_model" if kind == "whole" else "model")
    assert found.only_text is (kind == "whole")


@pytest.mark.parametrize(
    ("kind", "billions"), [pytest.param("next", 79.7, id="next"), pytest.param("whole", 34.7, id="whole")]
)
def test_released_models_have_the_number_of_parameters_that_is_published(
    kind: str, billions: float, tmp_path: Path
) -> None:
    """80B and 35B, by their names."""
    settings(tmp_path, kind)
    n = sum(parameter.numel() for parameter in without_weights(tmp_path).parameters())
    assert n / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize(
    ("kind", "keys", "attention"),
    [
        pytest.param("next", {"full_attention_interval": ...}, range(3, 48, 4), id="next_by_default"),
        pytest.param("next", {"full_attention_interval": 6}, range(5, 48, 6), id="next_interval"),
        pytest.param("text", {"layer_types": ...}, range(3, 40, 4), id="text_by_the_interval"),
        pytest.param(
            "whole",
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
            [0],
            id="whole_by_type",
        ),
    ],
)
def test_which_layers_have_attention(kind: str, keys: dict[str, Any], attention: range, tmp_path: Path) -> None:
    """By type, or every so many."""
    more = {} if "layer_types" not in keys or keys["layer_types"] is ... else {"full_attention_interval": ...}
    mixers = settings(tmp_path, kind, **keys, **more).decoder["mixers"]
    assert [layer for layer, mixer in enumerate(mixers) if mixer is None] == list(attention)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        pytest.param(
            "next", {"linear_num_value_heads": 31}, "linear_num_value_heads=31 must be a multiple", id="heads"
        ),
        pytest.param("next", {"linear_key_head_dim": ...}, "has no linear_key_head_dim", id="no_width"),
        pytest.param(
            "next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0 must be an integer >= 1", id="conv"
        ),
        pytest.param("next", {"head_dim": ...}, "has no head_dim", id="no_head_dim"),
        pytest.param("next", {"use_sliding_window": True}, "use_sliding_window=True is not supported", id="window"),
        pytest.param("next", {"layer_types": ["mamba"] * 48}, "must have one of ['full_attention'", id="other_type"),
        pytest.param("next", {"layer_types": ["full_attention"] * 3}, "per layer (48)", id="too_few_types"),
        pytest.param("next", {"layer_types": ["full_attention"] * 48}, "contradict each other", id="contradiction"),
        pytest.param("next", {"layer_types": 3}, "layer_types=3 must have one of", id="types_not_a_list"),
        pytest.param("next", {"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list", id="layers_not_a_list"),
        pytest.param("next", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported", id="activation"),
        pytest.param("next", {"partial_rotary_factor": 0.001}, "turns 0 of the 256 dimensions", id="nothing_turned"),
        pytest.param("next", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section", id="mrope"),
        pytest.param("text", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported", id="dense_layers"),
        pytest.param("text", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported", id="sparse_step"),
        pytest.param("text", {"attn_output_gate": False}, "attn_output_gate=False is not supported", id="no_gate"),
        pytest.param("text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype=bfloat16 is not supported", id="state"),
        pytest.param("text", {"norm_topk_prob": False}, "norm_topk_prob=False is not supported", id="weights"),
        pytest.param(
            "whole", {"model_type": "qwen3_5_text"}, "model_type=qwen3_5_text is not supported", id="text_type"
        ),
        pytest.param("whole", {"tie_word_embeddings": True}, "text_config.tie_word_embeddings True", id="tied"),
        pytest.param("whole", {"num_experts": ...}, "has no num_experts", id="no_experts"),
        pytest.param("whole", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported", id="whole_activation"),
    ],
)
def test_what_is_not_supported_is_refused(kind: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By the key, in one line that names the file."""
    message = complaint(lambda: settings(tmp_path, kind, **keys))
    assert said in message and str(tmp_path / "config.json") in message


def test_keys_that_nobody_reads_are_named_with_their_part(tmp_path: Path) -> None:
    """Those with a value that switches off what they are about are not."""
    found = settings(tmp_path, "whole", attn_softcap=3, logit_scale=2, mlp_bias=False, attention_dropout=0.1)
    assert found.unread == ("text_config.attn_softcap", "text_config.logit_scale")


def test_what_quantised_the_weights_stands_beside_the_text_part(tmp_path: Path) -> None:
    """As in the files in fp8."""
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps({**WHOLE, "quantization_config": quantization}))
    found = read(tmp_path)
    assert found.form == Fp8Blocks(128, 128) and found.unread == ()


def test_parts_that_are_not_loaded_may_be_in_the_files(tmp_path: Path) -> None:
    """What predicts further tokens is no part of a run; that images are not read is said."""
    folder = checkpoint("qwen3_next", tmp_path / "next")
    want = load(folder)(ids(1, 5)).y
    extra = {"mtp.fc.weight": want[0].clone(), "mtp.layers.0.input_layernorm.weight": want[0, 0].clone()}
    write_tensors(folder, {**tensors(folder), **extra})
    assert load(folder)(ids(1, 5)).y.equal(want) and build(folder).warnings() == []
    write_tensors(folder, {**tensors(folder), "model.visual.x": want[0, 0].clone()})
    assert "1 unexpected: model.visual.x." in complaint(lambda: load(folder))
    (warning,) = build(checkpoint("qwen3_5_moe", tmp_path / "whole")).warnings()
    assert "reads images too; only its text part is loaded." in warning


def test_the_text_part_by_itself_has_no_prefix(tmp_path: Path) -> None:
    """And the files of the whole have one; each is looked for under its own names."""
    folder = checkpoint("qwen3_5_moe", tmp_path)
    content = tensors(folder)
    plain = {key.replace("model.language_model.", "model."): value for key, value in content.items()}
    want = load(folder)(ids(1, 5)).y
    write_tensors(folder, plain)
    assert "missing: model.language_model." in complaint(lambda: load(folder))

    def only_text(config: dict[str, Any]) -> None:
        text = config["text_config"]
        config.clear()
        config.update(text)

    edit_config(folder, only_text)
    write_tensors(folder, {key: value for key, value in plain.items() if "visual" not in key})
    assert load(folder)(ids(1, 5)).y.equal(want)


@pytest.mark.parametrize("length", [pytest.param(n, id=f"s{n}") for n in (1, 63, 64, 65, 128)])
@pytest.mark.parametrize("kind", ["qwen3_next", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_sequences_of_one_chunk_and_more_are_those_of_transformers(kind: str, length: int, tmp_path: Path) -> None:
    """All at once, and the last tokens by the cache."""
    peer = trained(kind, 3)
    model, ids_BN = load(save(peer, tmp_path)), ids(2, length, 3)
    want = computed(peer, ids_BN)
    assert_logits(model(ids_BN).y, want.logits)
    for context in {max(length - 2, 1), max(length - 1, 1)} - {length}:
        logits, routings = decoded(model, ids_BN, context)
        assert_logits(logits, want.logits[:, context:])
        assert_same_experts(routings, want.experts)


WIDE = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("forward", id="forward", marks=pytest.mark.slow),
        pytest.param("prefill", id="prefill", marks=pytest.mark.slow),
        pytest.param("decode", id="decode"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("qwen3_next", "bf16", id="next-bf16"),
        pytest.param("qwen3_5_moe", "fp32", id="whole-fp32", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", "bf16", id="whole-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_verified_and_says_what_it_keeps(kind: str, dtype: str, phase: str, tmp_path: Path) -> None:
    """A layer of attention with keys and values, two with states; each step against the reference."""
    folder = checkpoint(kind, tmp_path / "c", **WIDE)
    keys = [f"model.path={folder}", "router=native", "workload=random", f"workload.phase={phase}", f"dtype={dtype}"]
    keys += ["workload.context_len=70"] if phase == "decode" else []
    record = run(tiny.compose("checkpoint", *keys, "seq_len=5"), tmp_path / "run")
    assert record.status == "ok" and record.check is not None and record.memory is not None, record.reason
    size = 2 if dtype == "bf16" else 4
    kept = {
        "cache_bytes_per_token": 2 * 2 * 16 * size,
        "state_bytes_per_sequence": 2 * (256 * 2 * size + 4 * 32 * 32 * 4),
    }
    expected = dict.fromkeys(kept) if phase == "forward" else kept
    assert {key: record.memory[key] for key in kept} == expected
    assert record.implementation["delta_net"] == f"torch: {'recurrent' if phase == 'decode' else 'chunked'}"
    if phase != "forward":
        assert 0 < (record.check.cache_rel_error or 0) < (0.1 if dtype == "bf16" else 1e-4)
    said = [text for text in record.warnings if "only its text part is loaded" in text]
    assert len(said) == (kind == "qwen3_5_moe")


@pytest.mark.slow
def test_a_compiled_run_decodes(tmp_path: Path) -> None:
    """Without a graph break."""
    folder = checkpoint("qwen3_next", tmp_path / "c", **WIDE)
    keys = [f"model.path={folder}", "router=native", "workload=random", "workload.phase=decode", "execution=compile"]
    record = run(tiny.compose("checkpoint", *keys, "workload.context_len=9", "seq_len=3"), tmp_path / "run")
    assert record.status == "ok", record.reason
