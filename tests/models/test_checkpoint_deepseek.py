"""models/checkpoint_deepseek.py: GLM-4.5, GLM-4.7-Flash, dots.llm1, MiniMax-M2, Solar Open. DeepSeek: see _latent."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.checkpoint_forms import Fp8Blocks
from tests.models.checkpoints import complaint
from tests.models.released import COMMON, SHARED, settings_of

kinds = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in SHARED])
AIR, FLASH, DOTS, M2, SOLAR = SHARED
settings = partial(settings_of, SHARED)
GROWING = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 128.0,
    "llama_4_scaling_beta": 0.1,
    "max_position_embeddings": 1048576,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8192,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
}
MISTRAL_4 = {
    **COMMON,
    "model_type": "mistral4",
    "attention_bias": False,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "kv_lora_rank": 256,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 32,
    "q_lora_rank": 1024,
    "qk_head_dim": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": GROWING,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 131072,
}
"""As transformers 5 writes it by default."""
of_mistral = partial(settings_of, {"mistral4": MISTRAL_4}, kind="mistral4")


@kinds
def test_released_models_are_read_off_their_configuration(kind: str, tmp_path: Path) -> None:
    """Every key of theirs is known."""
    found, content = settings(tmp_path, kind), SHARED[kind]
    decoder = found.decoder
    assert found.unread == () and found.model_type == content["model_type"]
    assert decoder["rope_theta"] == content["rope_theta"] and decoder["rope_scaling"] is None
    assert decoder["mlp_hidden_dim"] == (1536 if kind in (M2, FLASH) else content["moe_intermediate_size"])
    assert decoder["shared_expert_hidden_dim"] == {AIR: 1408, FLASH: 1536, DOTS: 2816, M2: 0, SOLAR: 1280}[kind]
    assert decoder["shared_expert_gate"] is False
    assert decoder["dense_hidden_dim"] == {AIR: 10944, FLASH: 10240, DOTS: 10944}.get(kind)
    assert found.dense_layers == (frozenset() if kind in (M2, SOLAR) else {0})
    assert decoder.get("rotary_dim") == {AIR: 64, M2: 64}.get(kind)
    assert decoder["qk_norm"] == {DOTS: "head", M2: "full"}.get(kind, "none")
    assert decoder.get("qkv_bias", False) is (kind == AIR) and not decoder.get("o_bias", False)
    assert ("latent" in decoder) is (kind == FLASH) and found.interleaved is (kind == FLASH)
    assert found.extra_layers == {AIR: 1, FLASH: 1, M2: 3}.get(kind, 0)
    assert found.form == (Fp8Blocks(128, 128) if kind == M2 else None)
    assert set(decoder.get("windows", [None])) == {None}
    router = found.router
    assert (router["score"], router["bias"], router["renormalize"]) == ("sigmoid", True, True)
    assert router["scale"] == content.get("routed_scaling_factor", 1.0)
    assert (router["n_groups"], router["top_groups"]) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "keys", "rotary_dim"),
    [
        pytest.param(AIR, {"partial_rotary_factor": ...}, 64, id="glm_by_default"),
        pytest.param(AIR, {"partial_rotary_factor": 0.25}, 32, id="glm_beside"),
        pytest.param(
            AIR, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 128, id="glm_inside"
        ),
        pytest.param(M2, {"rotary_dim": ...}, 128, id="minimax_by_default"),
        pytest.param(M2, {"rotary_dim": 32}, 32, id="minimax_rotary_dim"),
        pytest.param(M2, {"partial_rotary_factor": 0.25}, 32, id="minimax_share_before_rotary_dim"),
    ],
)
def test_how_much_of_a_head_is_turned(kind: str, keys: dict[str, Any], rotary_dim: int, tmp_path: Path) -> None:
    """Inside the parameters of RoPE, beside them, or by the architecture's own key or default."""
    assert settings(tmp_path, kind, **keys).decoder["rotary_dim"] == rotary_dim


def test_mistral_4_is_read_off_its_configuration(tmp_path: Path) -> None:
    """Its head is what is turned and what is not, and its queries grow with their position."""
    found = of_mistral(tmp_path)
    assert found.unread == () and found.interleaved and found.dense_layers == frozenset()
    assert found.decoder["head_dim"] == 64 and found.decoder["latent"]["growth"] == (0.1, 8192)
    assert found.decoder["shared_expert_hidden_dim"] == 2048
    router = found.router
    assert (router["score"], router["bias"], router["group_score"], router["scale"]) == ("softmax", False, "top2", 1.0)
    without = {key: value for key, value in GROWING.items() if key != "partial_rotary_factor"}
    assert of_mistral(tmp_path, rope_parameters=without) == found == of_mistral(tmp_path, head_dim=..., qk_head_dim=...)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        pytest.param({"rope_parameters": ...}, "rope_parameters must have rope_type=yarn", id="no_rope"),
        pytest.param({"rope_parameters": {"rope_type": "default"}}, "must have rope_type=yarn", id="plain_rope"),
        pytest.param(
            {"rope_parameters": {**GROWING, "llama_4_scaling_beta": ...}}, "llama_4_scaling_beta", id="no_beta"
        ),
        pytest.param(
            {"rope_parameters": {**GROWING, "llama_4_scaling_beta": -1}}, "llama_4_scaling_beta=-1", id="negative_beta"
        ),
        pytest.param(
            {"rope_parameters": {**GROWING, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25", id="share"
        ),
        pytest.param({"head_dim": 64}, "head_dim=64 must be 128", id="head_dim"),
        pytest.param({"n_group": 3}, "n_group=3", id="groups"),
        pytest.param({"first_k_dense_replace": ...}, "first_k_dense_replace", id="no_dense_key"),
        pytest.param({"rope_interleave": "no"}, "rope_interleave=no", id="interleave_as_text"),
    ],
)
def test_what_would_be_another_mistral_4_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By the key."""
    if isinstance(rope := keys.get("rope_parameters"), dict):
        keys = {"rope_parameters": {key: value for key, value in rope.items() if value is not ...}}
    assert said in complaint(lambda: of_mistral(tmp_path, **keys))


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        pytest.param({"first_k_dense_replace": ...}, {0}, id="by_default"),
        pytest.param({"first_k_dense_replace": ..., "mlp_layer_types": ["sparse"] * 47}, set(), id="none"),
        pytest.param({"mlp_layer_types": ["dense"] + ["sparse"] * 46}, {0}, id="both_keys"),
    ],
)
def test_dense_layers_of_glm_flash_are_typed(keys: dict[str, Any], dense: set[int], tmp_path: Path) -> None:
    """As in transformers the first layer, if nothing is said."""
    assert settings(tmp_path, FLASH, **keys).dense_layers == dense


def test_windows_of_dots_are_those_of_the_last_layers(tmp_path: Path) -> None:
    """From `max_window_layers` on, or by type."""
    keys: dict[str, Any] = {"num_hidden_layers": 3, "sliding_window": 9}
    assert settings(tmp_path, DOTS, **keys, max_window_layers=1).decoder["windows"] == [None, 9, 9]
    assert settings(tmp_path, DOTS, **keys).decoder["windows"] == [None] * 3
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert settings(tmp_path, DOTS, **keys, layer_types=kinds).decoder["windows"] == [9, None, None]


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        pytest.param(AIR, {"partial_rotary_factor": 0}, "partial_rotary_factor=0 must be", id="nothing_turned"),
        pytest.param(AIR, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5", id="more_than_a_head"),
        pytest.param(AIR, {"partial_rotary_factor": "half"}, "partial_rotary_factor=half", id="share_as_text"),
        pytest.param(AIR, {"partial_rotary_factor": 0.071}, "turns 9 of the 128", id="odd"),
        pytest.param(AIR, {"use_qk_norm": "no"}, "use_qk_norm=no", id="norm_as_text"),
        pytest.param(AIR, {"scoring_func": "softmax"}, "scoring_func=softmax", id="softmax"),
        pytest.param(AIR, {"first_k_dense_replace": ...}, "first_k_dense_replace", id="no_dense_key"),
        pytest.param(AIR, {"head_dim": 127}, "head_dim=127", id="odd_head"),
        pytest.param(FLASH, {"mlp_layer_types": ["dense"]}, "mlp_layer_types=", id="too_few_types"),
        pytest.param(FLASH, {"mlp_layer_types": ["odd"] * 47}, "mlp_layer_types=", id="unknown_type"),
        pytest.param(FLASH, {"first_k_dense_replace": 2}, "contradict", id="dense_keys_contradict"),
        pytest.param(FLASH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", id="flash_partial"),
        pytest.param(DOTS, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", id="dots_partial"),
        pytest.param(SOLAR, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", id="solar_partial"),
        pytest.param(SOLAR, {"first_k_dense_replace": 1}, "first_k_dense_replace=1", id="solar_dense"),
        pytest.param(SOLAR, {"use_qk_norm": True}, "use_qk_norm=True", id="solar_norm"),
        pytest.param(SOLAR, {"head_dim": ...}, "head_dim", id="solar_no_head_dim"),
        pytest.param(M2, {"use_qk_norm": False}, "use_qk_norm=False", id="m2_no_norm"),
        pytest.param(M2, {"qk_norm_type": "per_head"}, "qk_norm_type=per_head", id="m2_norm_of_heads"),
        pytest.param(M2, {"use_routing_bias": False}, "use_routing_bias=False", id="m2_no_bias"),
        pytest.param(M2, {"attn_type_list": [0, 1]}, "attn_type_list=", id="m2_lightning"),
        pytest.param(M2, {"shared_intermediate_size": 8}, "shared_intermediate_size=8", id="m2_shared"),
        pytest.param(M2, {"rotary_dim": 63}, "turns 63", id="m2_odd"),
        pytest.param(M2, {"rotary_dim": 256}, "must be a number > 0 and <= 1", id="m2_wide"),
    ],
)
def test_what_would_be_another_model_is_refused(kind: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By the key and its value."""
    assert said in complaint(lambda: settings(tmp_path, kind, **keys))
