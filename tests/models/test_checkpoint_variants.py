"""models/checkpoint_variants.py and checkpoint_windows.py: what is read, refused, and known to have no effect."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.checkpoint import without_weights
from moe_lab.models.checkpoint_keys import Keys
from moe_lab.models.checkpoint_windows import window, windows
from moe_lab.models.parameters import parameter_bytes
from tests.models.checkpoints import complaint
from tests.models.released import COMMON, settings_of

RELEASED: dict[str, dict[str, Any]] = {
    "granitemoe": {  # granite-3.1-3b-a800m
        **COMMON,
        "model_type": "granitemoe",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 40,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "gpt_oss": {  # gpt-oss-20b
        **COMMON,
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "phimoe": {  # Phi-3.5-MoE-instruct
        **COMMON,
        "model_type": "phimoe",
        "attention_bias": True,
        "eos_token_id": 32000,
        "hidden_size": 4096,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + i for i in range(64)],
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0 + i / 64 for i in range(64)],
            "short_mscale": 1.243163121016122,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "vocab_size": 32064,
    },
    "ernie4_5_moe": {  # ERNIE-4.5-21B-A3B
        **COMMON,
        "model_type": "ernie4_5_moe",
        "eos_token_id": 2,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
        "vocab_size": 103424,
    },
    "lfm2_moe": {  # LFM2-8B-A1B
        **COMMON,
        "model_type": "lfm2_moe",
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 7,
        "hidden_act": ...,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1792,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": ...,
        "use_expert_bias": True,
        "vocab_size": 65536,
    },
    "hunyuan_v1_moe": {  # Hunyuan-A13B, without the keys that only its training reads
        **COMMON,
        "model_type": "hunyuan_v1_moe",
        "attention_bias": False,
        "eos_token_id": 127960,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": [3072] * 32,
        "moe_layer_num_skipped": 0,
        "moe_topk": [8] * 32,
        "norm_type": "rms",
        "num_attention_heads": 32,
        "num_experts": 64,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_shared_expert": [1] * 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cla": False,
        "use_qk_norm": True,
        "vocab_size": 128167,
    },
}
"""config.json of released models, as transformers 4 wrote them."""

FULL, SLIDING = "full_attention", "sliding_attention"
kinds = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in RELEASED])
settings = partial(settings_of, RELEASED)


@kinds
def test_of_a_released_model_every_key_is_read_or_known_to_have_no_effect(kind: str, tmp_path: Path) -> None:
    """So there is no warning."""
    assert settings(tmp_path, kind).unread == ()


@pytest.mark.parametrize(
    ("kind", "billions"),
    [
        pytest.param("granitemoe", 3.3, id="granitemoe"),
        pytest.param("gpt_oss", 20.9, id="gpt_oss"),
        pytest.param("phimoe", 41.9, id="phimoe"),
        pytest.param("ernie4_5_moe", 21.8, id="ernie4_5_moe"),
        pytest.param("lfm2_moe", 8.3, id="lfm2_moe"),
        pytest.param("hunyuan_v1_moe", 80.4, id="hunyuan_v1_moe"),
    ],
)
def test_released_models_have_the_number_of_parameters_that_is_published(
    kind: str, billions: float, tmp_path: Path
) -> None:
    """To the digits that it is published with; without storage."""
    settings(tmp_path, kind)
    assert parameter_bytes(without_weights(tmp_path)) / 4e9 == pytest.approx(billions, abs=0.06)


def test_gpt_oss_is_read_off_its_configuration(tmp_path: Path) -> None:
    """Every other layer has a window, the first one included, with and without layer_types."""
    found = settings(tmp_path, "gpt_oss")
    assert found.decoder["windows"] == [128, None] * 12 and found.decoder["sinks"]
    assert found.decoder["expert_settings"] == {"bias": True, "activation": (1.702, 7.0), "gate_bias": True}
    assert found.naming.model == "gpt_oss mxfp4" and str(found.form) == "mxfp4 (of the experts)"
    assert settings(tmp_path, "gpt_oss", layer_types=...).decoder["windows"] == [128, None] * 12
    assert settings(tmp_path, "gpt_oss", sliding_window=None).decoder["windows"] == [None] * 24
    assert settings(tmp_path, "gpt_oss", quantization_config=...).naming.model == "gpt_oss"


def test_phimoe_computes_no_sequence_beyond_the_original_length(tmp_path: Path) -> None:
    """Of longrope; a model without it has all its positions."""
    assert settings(tmp_path, "phimoe").max_positions == 4096
    assert settings(tmp_path, "phimoe", rope_scaling=None).max_positions == 131072
    assert settings(tmp_path, "phimoe", router_jitter_noise=0).router["jitter_eps"] == 0


def test_lfm2_has_convolutions_in_most_layers(tmp_path: Path) -> None:
    """Its head is tied where nothing is said, under either name of the key."""
    found = settings(tmp_path, "lfm2_moe")
    conv = {"kind": "short_conv", "width": 3, "bias": False}
    assert [layer for layer, mixer in enumerate(found.decoder["mixers"]) if mixer is None] == [2, 6, 10, 14, 18, 21]
    assert found.decoder["mixers"][0] == conv and found.dense_layers == {0, 1} and found.decoder["qk_norm"] == "head"
    assert found.router["score"] == "sigmoid" and found.router["bias"] and found.router["renormalize"]
    assert found.decoder["tie_embeddings"]
    for keys in ({"tie_embedding": False}, {"tie_word_embeddings": False}):
        assert not settings(tmp_path, "lfm2_moe", **keys).decoder["tie_embeddings"]
    assert not settings(tmp_path, "lfm2_moe", use_expert_bias=False).router["bias"]


def test_ernie_has_experts_from_one_layer_to_another(tmp_path: Path) -> None:
    """-1 is the last; its head is tied where nothing is said."""
    assert settings(tmp_path, "ernie4_5_moe").dense_layers == {0}
    assert settings(tmp_path, "ernie4_5_moe", moe_layer_end_index=-1).dense_layers == {0}
    changed = settings(tmp_path, "ernie4_5_moe", moe_layer_interval=3, moe_layer_end_index=20, tie_word_embeddings=...)
    assert set(range(28)) - changed.dense_layers == {2, 5, 8, 11, 14, 17, 20}
    assert changed.decoder["tie_embeddings"]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        pytest.param({}, [None] * 4, id="none"),
        pytest.param({"sliding_window": 3}, [3, None, 3, None], id="every_other"),
        pytest.param(
            {"sliding_window": 3, "layer_types": [FULL, SLIDING, SLIDING, FULL]}, [None, 3, 3, None], id="told"
        ),
    ],
)
def test_windows_are_told_layer_by_layer(keys: dict[str, Any], wanted: list[int | None]) -> None:
    """Without `layer_types` every other layer has one; below a layer, where there is such a limit."""
    config = Keys(Path("config.json"), keys)
    assert windows(config, 4, window(config)) == wanted
    if "layer_types" not in keys:
        assert windows(config, 4, window(config), below=1) == [*wanted[:1], None, None, None]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_oss", {"head_dim": ...}, "no head_dim"),
    ("gpt_oss", {"rope_scaling": ...}, "no rope_parameters"),
    ("gpt_oss", {"experts_per_token": 3}, "num_experts_per_tok=4 and experts_per_token=3 contradict"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 23}, "layer_types="),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 24}, "layer_types="),
    ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit=-1 must be a number > 0"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quant_method=gptq"),
    ("granitemoe", {"embedding_multiplier": "x"}, "embedding_multiplier=x must be a number > 0"),
    ("granitemoe", {"logits_scaling": 0}, "logits_scaling=0 must be a number > 0"),
    ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not supported"),
    ("phimoe", {"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 must be a number from 0 to 1"),
    ("phimoe", {"rope_scaling": {"type": "longrope", "short_mscale": 1.0}}, "short_factor=None"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias=True is not supported"),
    ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1 is not supported"),
    ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval=0"),
    ("ernie4_5_moe", {"moe_k": 65}, "moe_k=65 is more than the 64 experts"),
    ("lfm2_moe", {"layer_types": ...}, "no layer_types"),
    ("lfm2_moe", {"layer_types": ["conv"] * 23}, "layer_types="),
    ("lfm2_moe", {"layer_types": ["conv"] * 23 + ["sliding_attention"]}, "layer_types="),
    ("lfm2_moe", {"layer_types": "conv"}, "layer_types=conv must have conv or full_attention per layer (24)"),
    ("lfm2_moe", {"norm_eps": ...}, "no norm_eps"),
    ("lfm2_moe", {"norm_eps": ..., "rms_norm_eps": 1e-5}, "no norm_eps"),
    ("lfm2_moe", {"conv_L_cache": 0}, "conv_L_cache=0 must be an integer >= 1"),
    ("lfm2_moe", {"conv_bias": 1}, "conv_bias=1 must be true or false"),
    ("lfm2_moe", {"use_expert_bias": "yes"}, "use_expert_bias=yes must be true or false"),
    ("lfm2_moe", {"num_dense_layers": -1}, "num_dense_layers=-1 must be an integer >= 0"),
    ("lfm2_moe", {"num_experts_per_tok": 33}, "num_experts_per_tok=33 is more than the 32 experts"),
    ("lfm2_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor=0 must be a number > 0"),
    ("lfm2_moe", {"head_dim": 63}, "head_dim"),
    ("hunyuan_v1_moe", {"moe_topk": 65}, "moe_topk=65 is more than the 64 experts"),
    ("hunyuan_v1_moe", {"moe_topk": [8] * 31 + [4]}, "moe_topk="),
    ("hunyuan_v1_moe", {"head_dim": 2}, "head_dim=2 must be at least 4 with rope_type=dynamic"),
    ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True is not supported"),
    ("hunyuan_v1_moe", {"moe_intermediate_size": 1}, "moe_intermediate_size=1 is not supported"),
    ("hunyuan_v1_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "alpha=None must be a number"),
    ("granitemoe", {"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, "rope_type=dynamic is not supported"),
    ("granitemoe", {"rope_scaling": {"type": "longrope", "short_mscale": 1.0}}, "rope_type=longrope is not supported"),
]


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        pytest.param(kind, keys, message, id=f"{kind}-{'-'.join(keys)}-{n}")
        for n, (kind, keys, message) in enumerate(REFUSED)
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(
    kind: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """In one line."""
    assert message in complaint(lambda: settings(tmp_path, kind, **keys))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"short_factor": [1.0] * 63}, id="too_few"),
        pytest.param({"short_factor": [1.0] * 63 + [0]}, id="zero"),
        pytest.param({"short_factor": 1.0}, id="no_list"),
        pytest.param({"long_factor": None}, id="no_long_factor"),
        pytest.param({"long_mscale": "x"}, id="text"),
    ],
)
def test_factors_of_longrope_are_checked(values: dict[str, Any], tmp_path: Path) -> None:
    """There is one for each pair of dimensions."""
    rope = {**RELEASED["phimoe"]["rope_scaling"], **values}
    assert next(iter(values)) in complaint(lambda: settings(tmp_path, "phimoe", rope_scaling=rope))
