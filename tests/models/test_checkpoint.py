"""models/checkpoint.py: trained models in Hugging Face format against transformers, and what a loaded model is."""

from __future__ import annotations

import copy
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_lab.models import Output
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layers import GatedMLP
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.parameters import adopt, shareable
from moe_lab.models.serving import Decode, Prefill, whole_routing
from moe_lab.routers.base import Routing
from moe_lab.runs.run import Run
from tests import tiny
from tests.models import checkpoints
from tests.models.checkpoints import (
    LAYERS,
    VOCAB,
    E,
    as_written_by_4,
    build,
    checkpoint,
    edit_config,
    ids,
    kinds,
    load,
    save,
    tensors,
    trained,
    write_tensors,
)
from tests.routers.cases import make

ATOL = 2e-4
REAL = tiny.ROOT / "assets" / "tiny-olmoe"

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 0.5, "high_freq_factor": 6.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 4.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
GROWING = {**YARN, "llama_4_scaling_beta": 0.7, "mscale": 1.0, "mscale_all_dim": 1.0}
MSCALE = {"mscale": 0.8, "mscale_all_dim": 0.8}
GROUPS = {"n_routed_experts": 6, "n_group": 3, "topk_group": 1}
SLIDING, FULL = "sliding_attention", "full_attention"


ONE_OF = {"tied": "olmoe", "eps": "olmoe", "one_key_head": "olmoe", "theta": "mixtral", "all_experts": "mixtral"}
ONE_OF |= {"head_dim": "mixtral", "a_key_head_per_head": "mixtral", "yarn": "mixtral", "llama3": "mixtral"}
ONE_OF |= {"no_dense_layer": "deepseek_v3", "not_renormalized": "deepseek_v3", "scale": "deepseek_v3"}
ONE_OF |= {"one_group": "deepseek_v3", "two_groups": "deepseek_v3", "plain_queries": "deepseek_v3"}
"""What all read from the same key: fast for this architecture, slow for the others."""


def case(kind: str, name: str, **settings: Any) -> Any:
    marks = pytest.mark.slow if kind != ONE_OF.get(name, kind) else ()
    return pytest.param(kind, settings, id=f"{kind}-{name}", marks=marks)


def proportional(**of_full_layers: Any) -> dict[str, Any]:
    """RoPE of Gemma 4's layers."""
    full = {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.5, **of_full_layers}
    return {
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {key: value for key, value in full.items() if value is not ...},
    }


PLAIN = [pytest.param(kind, {}, id=f"{kind}-plain") for kind in checkpoints.KINDS]
CHANGED = [
    case("olmoe", "renormalized", norm_topk_prob=True),
    case("olmoe", "clipped", clip_qkv=0.6),
    case("olmoe", "biases", attention_bias=True),
    case("olmoe", "biases_clipped_renormalized", attention_bias=True, clip_qkv=0.9, norm_topk_prob=True),
    case("olmoe", "a_key_head_per_head", num_key_value_heads=4),
    case("olmoe", "one_key_head", num_key_value_heads=1),
    case("olmoe", "tied", tie_word_embeddings=True),
    case("olmoe", "eps", rms_norm_eps=0.3),
    case("olmoe", "yarn", rope_parameters=YARN),
    case("mixtral", "window", sliding_window=4),
    case("mixtral", "window_of_one", sliding_window=1),
    case("mixtral", "head_dim", head_dim=12),
    case("mixtral", "a_key_head_per_head", num_key_value_heads=4),
    case("mixtral", "one_key_head", num_key_value_heads=1),
    case("mixtral", "tied", tie_word_embeddings=True),
    case("mixtral", "eps", rms_norm_eps=0.3),
    case("mixtral", "all_experts", num_experts_per_tok=E),
    case("mixtral", "one_of_the_experts", num_experts_per_tok=1),
    case("mixtral", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("mixtral", "linear", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    case("mixtral", "llama3", rope_parameters=LLAMA3),
    case("mixtral", "yarn", head_dim=8, rope_parameters=YARN),
    case(
        "mixtral", "yarn_defaults", head_dim=8, rope_parameters={key: YARN[key] for key in YARN if key != "beta_fast"}
    ),
    case("mixtral", "yarn_beta_slow", head_dim=16, rope_parameters={**YARN, "beta_slow": 0.25}),
    case("mixtral", "yarn_attention_factor", head_dim=8, rope_parameters={**YARN, "attention_factor": 1.7}),
    case("mixtral", "yarn_mscale", head_dim=8, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 2.5}),
    case("mixtral", "yarn_not_truncated", head_dim=16, rope_parameters={**YARN, "truncate": False}),
    case("mixtral", "yarn_no_factor", head_dim=8, rope_parameters={**YARN, "factor": None}),
    case("qwen2_moe", "renormalized", norm_topk_prob=True),
    case("qwen2_moe", "no_biases", qkv_bias=False),
    case("qwen2_moe", "wide_shared_expert", shared_expert_intermediate_size=33),
    case("qwen2_moe", "named_dense_layers", num_hidden_layers=4, mlp_only_layers=[0, 2]),
    case("qwen2_moe", "every_other_layer_dense", num_hidden_layers=4, decoder_sparse_step=2),
    case("qwen2_moe", "dense_both_ways", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]),
    case("qwen2_moe", "windows", num_hidden_layers=4, use_sliding_window=True, sliding_window=4),
    case(
        "qwen2_moe",
        "windows_below_a_layer",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    ),
    case(
        "qwen2_moe",
        "windows_by_layer_types",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    case("qwen2_moe", "head_dim", head_dim=12),
    case("qwen2_moe", "tied", tie_word_embeddings=True),
    case("qwen2_moe", "llama3", rope_parameters=LLAMA3),
    case("qwen2_moe", "one_key_head", num_key_value_heads=1),
    case("qwen3_moe", "renormalized", norm_topk_prob=True),
    case("qwen3_moe", "biases", attention_bias=True),
    case("qwen3_moe", "window", use_sliding_window=True, sliding_window=4),
    case("qwen3_moe", "head_dim_by_default", head_dim=8),
    case("qwen3_moe", "named_dense_layers", num_hidden_layers=3, mlp_only_layers=[1]),
    case("qwen3_moe", "every_third_layer_sparse", num_hidden_layers=3, decoder_sparse_step=3),
    case("qwen3_moe", "one_key_head", num_key_value_heads=1),
    case("qwen3_moe", "tied", tie_word_embeddings=True),
    case("qwen3_moe", "yarn", rope_parameters=YARN),
    case("deepseek_v2", "plain_queries", q_lora_rank=None),
    case("deepseek_v2", "biases", attention_bias=True),
    case("deepseek_v2", "groups", **GROUPS, topk_method="group_limited_greedy"),
    case("deepseek_v2", "scaled_groups", **GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=2.5),
    case("deepseek_v2", "more_dense_layers", first_k_dense_replace=2),
    case("deepseek_v2", "no_dense_layer", first_k_dense_replace=0),
    case("deepseek_v2", "one_shared_expert", n_shared_experts=1),
    case("deepseek_v2", "tied", tie_word_embeddings=True),
    case("deepseek_v2", "eps", rms_norm_eps=0.3),
    case("deepseek_v2", "yarn", rope_parameters={**YARN, **MSCALE}),
    case("deepseek_v2", "yarn_other_mscales", rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 2.5}),
    case("deepseek_v2", "yarn_without_mscale", rope_parameters=YARN),
    case("deepseek_v3", "plain_queries", q_lora_rank=None),
    case("deepseek_v3", "plain_queries_biases", q_lora_rank=None, attention_bias=True),
    case("deepseek_v3", "biases", attention_bias=True),
    case("deepseek_v3", "one_group", n_group=1, topk_group=1),
    case("deepseek_v3", "best_group", topk_group=1, num_experts_per_tok=2),
    case("deepseek_v3", "two_groups", n_group=2, topk_group=1, num_experts_per_tok=3),
    case("deepseek_v3", "not_renormalized", norm_topk_prob=False),
    case("deepseek_v3", "scale", routed_scaling_factor=2.5),
    case("deepseek_v3", "no_dense_layer", first_k_dense_replace=0),
    case("deepseek_v3", "wide_shared_experts", n_shared_experts=3),
    case("deepseek_v3", "halves", rope_interleave=False),
    case("deepseek_v3", "halves_plain_queries", rope_interleave=False, q_lora_rank=None),
    case("deepseek_v3", "tied", tie_word_embeddings=True),
    case("deepseek_v3", "eps", rms_norm_eps=0.3),
    case("deepseek_v3", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("deepseek_v3", "yarn", rope_parameters={**YARN, **MSCALE}),
    case("deepseek_v3", "yarn_halves", rope_interleave=False, rope_parameters={**YARN, "mscale_all_dim": 0.7}),
    case("deepseek_v3", "equal_head_dims", qk_nope_head_dim=8, v_head_dim=16),
    case("mistral4", "plain_queries", q_lora_rank=None),
    case("mistral4", "biases", attention_bias=True),
    case("mistral4", "one_group", n_group=1, topk_group=1),
    case("mistral4", "two_groups", n_group=2, topk_group=1, num_experts_per_tok=3),
    case("mistral4", "not_renormalized", norm_topk_prob=False),
    case("mistral4", "scale", routed_scaling_factor=2.5),
    case("mistral4", "no_dense_layer", first_k_dense_replace=0),
    case("mistral4", "halves", rope_interleave=False),
    case("mistral4", "no_growth", rope_parameters={**YARN, **MSCALE, "llama_4_scaling_beta": 0.0}),
    case("mistral4", "growth_in_steps_of_two", rope_parameters={**GROWING, "original_max_position_embeddings": 2}),
    case("mistral4", "without_mscale", rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
    case("mistral4", "tied", tie_word_embeddings=True),
    case("mistral4", "eps", rms_norm_eps=0.3),
    case("glm4_moe", "normed", use_qk_norm=True),
    case("glm4_moe", "normed_biases", use_qk_norm=True, attention_bias=True),
    case("glm4_moe", "biases", attention_bias=True),
    case("glm4_moe", "a_third_turned", rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 0.34}),
    case("glm4_moe", "all_turned", rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 1.0}),
    case("glm4_moe", "yarn", head_dim=16, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    case("glm4_moe", "llama3", head_dim=16, rope_parameters={**LLAMA3, "partial_rotary_factor": 0.5}),
    case("glm4_moe", "one_group", n_group=1, topk_group=1),
    case("glm4_moe", "not_renormalized", norm_topk_prob=False),
    case("glm4_moe", "no_dense_layer", first_k_dense_replace=0),
    case("glm4_moe", "one_key_head", num_key_value_heads=1),
    case("glm4_moe", "tied", tie_word_embeddings=True),
    case("glm4_moe_lite", "dense_in_between", mlp_layer_types=["sparse", "dense", "sparse"]),
    case("glm4_moe_lite", "all_sparse", mlp_layer_types=["sparse"] * 3),
    case("glm4_moe_lite", "plain_queries", q_lora_rank=None),
    case("glm4_moe_lite", "halves", rope_interleave=False),
    case("glm4_moe_lite", "biases", attention_bias=True),
    case("dots1", "not_renormalized", norm_topk_prob=False),
    case("dots1", "biases", attention_bias=True),
    case("dots1", "windows", sliding_window=4, max_window_layers=1),
    case("dots1", "windows_by_layer_types", sliding_window=3, layer_types=[SLIDING, FULL, SLIDING]),
    case("dots1", "no_dense_layer", first_k_dense_replace=0),
    case("dots1", "one_key_head", num_key_value_heads=1),
    case("solar_open", "biases", attention_bias=True),
    case("solar_open", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("solar_open", "two_shared_experts", n_shared_experts=2),
    case("solar_open", "scale", routed_scaling_factor=2.5),
    case("minimax_m2", "rotary_dim", rotary_dim=8),
    case("minimax_m2", "half_turned", rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 0.5}),
    case("minimax_m2", "one_key_head", num_key_value_heads=1),
    case("minimax_m2", "eps", rms_norm_eps=0.3),
    case("minimax_m2", "three_experts", num_experts_per_tok=3),
    case("qwen3_next", "biases", attention_bias=True),
    case("qwen3_next", "every_fourth_layer_attention", layer_types=..., num_hidden_layers=4),
    case("qwen3_next", "only_attention", layer_types=["full_attention"] * 3),
    case("qwen3_next", "not_renormalized", norm_topk_prob=False),
    case("qwen3_next", "named_dense_layers", mlp_only_layers=[0, 1]),
    case("qwen3_next", "every_other_layer_sparse", decoder_sparse_step=2),
    case("qwen3_next", "a_value_head_per_head", linear_num_value_heads=2),
    case("qwen3_next", "one_head_of_four_value_heads", linear_num_key_heads=1),
    case("qwen3_next", "equal_widths_of_keys_and_values", linear_value_head_dim=6),
    case("qwen3_next", "convolution_of_one_token", linear_conv_kernel_dim=1),
    case("qwen3_next", "wide_convolution", linear_conv_kernel_dim=8),
    case("qwen3_next", "all_turned", rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 1.0}),
    case("qwen3_next", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("qwen3_next", "yarn", rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    case("qwen3_next", "one_key_head", num_key_value_heads=1),
    case("qwen3_next", "all_experts", num_experts_per_tok=E),
    case("qwen3_next", "wide_shared_expert", shared_expert_intermediate_size=40),
    case("qwen3_next", "eps", rms_norm_eps=0.3),
    case("qwen3_next", "tied", tie_word_embeddings=True),
    case("qwen3_5_moe_text", "biases", attention_bias=True),
    case("qwen3_5_moe_text", "other_layers", layer_types=["full_attention", "linear_attention", "linear_attention"]),
    case("qwen3_5_moe_text", "a_value_head_per_head", linear_num_value_heads=2),
    case("qwen3_5_moe_text", "wide_convolution", linear_conv_kernel_dim=5),
    case("qwen3_5_moe_text", "a_quarter_turned", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("qwen3_5_moe_text", "one_key_head", num_key_value_heads=1),
    case("qwen3_5_moe_text", "eps", rms_norm_eps=0.3),
    case("qwen3_5_moe", "tied", tie_word_embeddings=True),
    case("qwen3_5_moe", "biases", attention_bias=True),
    case("qwen3_5_moe", "every_fourth_layer_attention", layer_types=..., num_hidden_layers=4),
    case("granitemoe", "embedding_multiplier", embedding_multiplier=1.0),
    case("granitemoe", "residual_multiplier", residual_multiplier=1.0),
    case("granitemoe", "logits_scaling", logits_scaling=0.5),
    case("granitemoe", "attention_multiplier", attention_multiplier=1.0),
    case("granitemoe", "biases", attention_bias=True),
    case("granitemoe", "all_experts", num_experts_per_tok=E),
    case("granitemoe", "one_key_head", num_key_value_heads=1),
    case("granitemoe", "tied", tie_word_embeddings=True),
    case("granitemoe", "eps", rms_norm_eps=0.3),
    case("granitemoe", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("gpt_oss", "no_attention_biases", attention_bias=False),
    case("gpt_oss", "wide_window", sliding_window=9),
    case("gpt_oss", "windows_by_layer_types", layer_types=[FULL, SLIDING, SLIDING]),
    case("gpt_oss", "limit", swiglu_limit=0.4),
    case("gpt_oss", "alpha", swiglu_alpha=3.0),
    case("gpt_oss", "all_experts", num_experts_per_tok=E),
    case("gpt_oss", "one_key_head", num_key_value_heads=1),
    case("gpt_oss", "a_key_head_per_head", num_key_value_heads=4),
    case("gpt_oss", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("gpt_oss", "truncated_yarn", rope_parameters=YARN | {"truncate": True}),
    case("gpt_oss", "tied", tie_word_embeddings=True),
    case("gpt_oss", "eps", rms_norm_eps=0.3),
    case("ernie4_5_moe", "all_layers_sparse", moe_layer_start_index=0),
    case("ernie4_5_moe", "every_other_layer_sparse", moe_layer_start_index=0, moe_layer_interval=2),
    case("ernie4_5_moe", "last_layer_dense", moe_layer_start_index=0, moe_layer_end_index=1),
    case("ernie4_5_moe", "no_shared_experts", moe_num_shared_experts=0),
    case("ernie4_5_moe", "three_shared_experts", moe_num_shared_experts=3),
    case("ernie4_5_moe", "one_key_head", num_key_value_heads=1),
    case("ernie4_5_moe", "head_dim", head_dim=12),
    case("ernie4_5_moe", "tied", tie_word_embeddings=True),
    case("ernie4_5_moe", "eps", rms_norm_eps=0.3),
    case("ernie4_5_moe", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("lfm2_moe", "biases", conv_bias=True),
    case("lfm2_moe", "wide_convolution", conv_L_cache=8),
    case("lfm2_moe", "convolution_of_one_token", conv_L_cache=1),
    case("lfm2_moe", "attention_first_and_last", layer_types=[FULL, "conv", "conv", FULL]),
    case("lfm2_moe", "only_convolutions", layer_types=["conv"] * 4, use_cache=False),
    case("lfm2_moe", "only_attention", layer_types=[FULL] * 4),
    case("lfm2_moe", "all_sparse", num_dense_layers=0),
    case("lfm2_moe", "three_dense_layers", num_dense_layers=3),
    case("lfm2_moe", "no_selection_bias", use_expert_bias=False),
    case("lfm2_moe", "not_renormalized", norm_topk_prob=False),
    case("lfm2_moe", "scaled", routed_scaling_factor=2.5),
    case("lfm2_moe", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("lfm2_moe", "yarn", rope_parameters=YARN),
    case("lfm2_moe", "one_key_head", num_key_value_heads=1),
    case("lfm2_moe", "all_experts", num_experts_per_tok=E),
    case("lfm2_moe", "tied", tie_word_embeddings=True),
    case("lfm2_moe", "norm_eps", norm_eps=0.3),
    case("gemma4_text", "keys_and_values_apart", attention_k_eq_v=False),
    case(
        "gemma4_text", "keys_and_values_apart_in_as_many_heads", attention_k_eq_v=False, num_global_key_value_heads=...
    ),
    case("gemma4_text", "equal_heads", global_head_dim=8, num_global_key_value_heads=...),
    case("gemma4_text", "four_global_key_heads", num_global_key_value_heads=4),
    case("gemma4_text", "narrow_global_heads", global_head_dim=6),
    case("gemma4_text", "biases", attention_bias=True),
    case("gemma4_text", "five_sliding_layers_of_six", layer_types=..., num_hidden_layers=7),
    case("gemma4_text", "full_attention", layer_types=[FULL] * 3),
    case("gemma4_text", "wide_window", sliding_window=9),
    case("gemma4_text", "no_cap", final_logit_softcapping=None),
    case("gemma4_text", "low_cap", final_logit_softcapping=0.5),
    case("gemma4_text", "a_quarter_turned", rope_parameters=proportional(partial_rotary_factor=0.25)),
    case("gemma4_text", "all_turned", rope_parameters=proportional(partial_rotary_factor=1.0)),
    case("gemma4_text", "slower_by_a_factor", rope_parameters=proportional(factor=3.0)),
    case("gemma4_text", "other_theta_of_full_layers", rope_parameters=proportional(rope_theta=20.0)),
    case(
        "gemma4_text",
        "usual_rope_of_full_layers",
        rope_parameters=proportional(partial_rotary_factor=..., rope_type="default"),
    ),
    case(
        "gemma4_text",
        "other_theta_of_sliding_layers",
        rope_parameters=proportional() | {SLIDING: {"rope_type": "default", "rope_theta": 5.0}},
    ),
    case("gemma4_text", "wide_mlp", intermediate_size=65),
    case("gemma4_text", "all_experts", top_k_experts=E),
    case("gemma4_text", "one_expert", top_k_experts=1),
    case("gemma4_text", "one_key_head", num_key_value_heads=1),
    case("gemma4_text", "tied", tie_word_embeddings=True),
    case("gemma4_text", "eps", rms_norm_eps=0.3),
    case("gemma4", "tied", tie_word_embeddings=True),
    case("gemma4", "keys_and_values_apart", attention_k_eq_v=False),
    case("hunyuan_v1_moe", "biases", attention_bias=True),
    case(
        "hunyuan_v1_moe",
        "alpha",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 20.0, "factor": 1.0},
    ),
    case("hunyuan_v1_moe", "theta", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    case("hunyuan_v1_moe", "head_dim", head_dim=12),
    case("hunyuan_v1_moe", "all_experts", moe_topk=E, num_experts_per_tok=E),
    case("hunyuan_v1_moe", "one_key_head", num_key_value_heads=1),
    case("hunyuan_v1_moe", "tied", tie_word_embeddings=True),
    case("hunyuan_v1_moe", "eps", rms_norm_eps=0.3),
    case("phimoe", "no_attention_biases", attention_bias=False),
    case("phimoe", "no_head_bias", lm_head_bias=False),
    case("phimoe", "more_rivals", router_jitter_noise=1.0),
    case("phimoe", "no_rivals", router_jitter_noise=0.0),
    case("phimoe", "window", sliding_window=4),
    case("phimoe", "eps", rms_norm_eps=0.3),
    case("phimoe", "one_key_head", num_key_value_heads=1),
    case("phimoe", "no_scaling", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
]
"""The settings that change what an architecture computes."""

cases = pytest.mark.parametrize(("kind", "settings"), PLAIN + CHANGED)


class Computed(NamedTuple):
    """What a model of transformers gives: the logits [B, S, V], and the experts [T, K] of each MoE layer."""

    logits: Tensor
    experts: tuple[Tensor, ...]


@torch.inference_mode()
def computed(model: Any, ids_BS: Tensor) -> Computed:
    """What a model of transformers gives for these tokens; the experts are those that its own routers return."""
    chosen: list[Tensor] = []
    routers = [
        module
        for module in model.modules()
        if type(module).__name__.lower().endswith(("topkrouter", "v1gate", "textrouter"))
    ]
    handles = [router.register_forward_hook(lambda _, __, given: chosen.append(given[2])) for router in routers]
    logits = model(ids_BS).logits
    for handle in handles:
        handle.remove()
    return Computed(logits, tuple(chosen))


def assert_same_experts(routings: tuple[Routing, ...], experts: tuple[Tensor, ...]) -> None:
    """The same set of experts for each token and layer."""
    assert len(routings) == len(experts) > 0
    for routing, want_TK in zip(routings, experts, strict=True):
        assert torch.equal(routing.expert_ids_TK.sort().values, want_TK.sort().values.int())


def assert_logits(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=ATOL)  # logits of tied weights are large


@torch.inference_mode()
def decoded(model: Checkpoint, ids_BN: Tensor, context_len: int) -> tuple[Tensor, tuple[Routing, ...]]:
    """(logits [B, N - context_len, V], the routing of whole sequences), one token after the other by the cache."""
    batch, length = ids_BN.shape
    decode = Decode(model, model.make_cache(batch, length), context_len)
    context = decode.fill(ids_BN)
    steps: list[Output] = []
    for _ in range(decode.n_steps):
        steps.append(decode(ids_BN))
        decode.advance()
    routings = tuple(
        whole_routing(before, [step.routings[layer] for step in steps], batch) for layer, before in enumerate(context)
    )
    return torch.cat([step.y for step in steps], dim=1), routings


@cases
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, id=f"seed{seed}", marks=[pytest.mark.slow] * bool(seed)) for seed in range(3)]
)
def test_logits_and_routes_are_those_of_transformers(
    kind: str, settings: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    """All positions at once; then the whole at once and token by token, both through the cache.

    The last tokens are enough for a setting: a plain model is decoded from the start.
    """
    peer = trained(kind, seed, **settings)
    model, ids_BS = load(save(peer, tmp_path)), ids(2, 14, seed)
    want, got = computed(peer, ids_BS), model(ids_BS)
    assert float(want.logits.std()) > 0.3
    assert_logits(got.y, want.logits)
    assert_same_experts(got.routings, want.experts)
    prefilled = Prefill(model, model.make_cache(2, 14))(ids_BS)
    assert_logits(prefilled.y, want.logits[:, -1:])
    assert_same_experts(prefilled.routings, want.experts)
    context_len = 10 if settings else 3
    logits, routings = decoded(model, ids_BS, context_len)
    assert_logits(logits, want.logits[:, context_len:])
    assert_same_experts(routings, want.experts)


@kinds
@torch.inference_mode()
def test_twelve_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Each goes into the cache and is gone on from."""
    peer = trained(kind, 5)
    model, ids_BS = load(save(peer, tmp_path)), ids(2, 5, 5)
    want = peer.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=12, do_sample=False)
    cache = model.make_cache(2, 17)
    new = [model(ids_BS, cache=cache, last=1).y.argmax(-1)]
    for position in range(5, 16):
        new.append(model(new[-1], cache=cache, position_S=torch.tensor([position])).y.argmax(-1))
    assert torch.equal(torch.cat(new, 1), want[:, 5:])
    assert len(want[0].unique()) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CHANGED)
def test_each_setting_changes_the_logits(kind: str, settings: dict[str, Any]) -> None:
    """So a model that ignored one would be found out above: this is of transformers alone."""
    ids_BS = ids(2, 14)
    plain, changed = computed(trained(kind), ids_BS).logits, computed(trained(kind, **settings), ids_BS).logits
    assert float((plain - changed).abs().max()) > 100 * ATOL


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"beta_slow": 0.25}, id="beta_slow"),
        pytest.param({"attention_factor": 1.7}, id="attention_factor"),
        pytest.param({"mscale": 0.7, "mscale_all_dim": 2.5}, id="mscale"),
        pytest.param({"truncate": False}, id="truncate"),
        pytest.param({"factor": 2.0}, id="factor"),
    ],
)
def test_each_key_of_yarn_changes_the_logits(keys: dict[str, Any]) -> None:
    """As above, with the other keys in place."""
    ids_BS = ids(2, 14)
    one, other = (
        computed(trained("mixtral", head_dim=16, rope_parameters=rope), ids_BS).logits for rope in (YARN, YARN | keys)
    )
    assert float((one - other).abs().max()) > 10 * ATOL


@kinds
def test_stacked_experts_on_disk_give_the_same_model(kind: str, tmp_path: Path) -> None:
    """The layout that transformers has in memory, bit for bit what the hub's layout gives."""
    peer = trained(kind)
    one = save(peer, tmp_path / "hub")
    other = save(peer, tmp_path / "stacked", save_original_format=False)
    assert not any(".experts.0." in key for key in tensors(other))
    assert torch.equal(load(one)(ids(2, 9)).y, load(other)(ids(2, 9)).y)


@pytest.mark.thinned(1)
@kinds
@pytest.mark.parametrize("stacked", [pytest.param(False, id="by_expert"), pytest.param(True, id="stacked")])
def test_shards_give_the_same_model(kind: str, stacked: bool, tmp_path: Path) -> None:
    """However the tensors are spread over files, those of one layer included."""
    peer = trained(kind)
    single, folder = save(peer, tmp_path / "single"), tmp_path / "shards"
    save(peer, folder, max_shard_size="15KB", save_original_format=not stacked)
    assert len(list(folder.glob("*.safetensors"))) > 3
    got, want = dict(load(folder).named_parameters()), dict(load(single).named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@kinds
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (torch.bfloat16, torch.float16)])
def test_half_precision_on_disk_is_loaded_exactly_as_fp32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every value as it stands in the file: the logits are those of transformers in fp32 on rounded weights."""
    peer = trained(kind)
    kept = ("e_score_correction_bias", "layer_scalar")
    biases = [buffer for name, buffer in peer.named_buffers() if name.endswith(kept)]
    for tensor in (*peer.parameters(), *biases):
        tensor.copy_(tensor.to(dtype))
    model = load(save(copy.deepcopy(peer).to(dtype), tmp_path))
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.embed.weight, peer.get_input_embeddings().weight)
    assert_logits(model(ids(2, 9)).y, computed(peer, ids(2, 9)).logits)


@kinds
def test_fp32_on_disk_is_rounded_to_a_bf16_model(kind: str, tmp_path: Path) -> None:
    """Each parameter is the fp32 model's, rounded once."""
    folder = checkpoint(kind, tmp_path)
    narrow, wide = load(folder, torch.bfloat16), dict(load(folder).named_parameters())
    for name, parameter in narrow.named_parameters():
        is_wide = name.endswith(
            ("router.bias_E", "up_bias_E2F", "down_bias_ED", "a_log_H", "dt_bias_H", "scale_E")
        )  # always fp32
        is_wide |= name.endswith("gate_norm.weight")
        is_wide |= kind.startswith(("qwen3_next", "qwen3_5")) and "norm." in name and "attention.norm" not in name
        dtype = torch.float32 if is_wide else torch.bfloat16
        assert parameter.dtype == dtype
        assert torch.equal(parameter, wide[name].to(dtype))


def test_a_file_may_mix_dtypes(tmp_path: Path) -> None:
    """Norms in fp32 beside bf16 matrices, as some trainers write."""
    folder = checkpoint("olmoe", tmp_path)
    mixed = {key: value if value.dim() == 1 else value.bfloat16() for key, value in tensors(folder).items()}
    write_tensors(folder, mixed)
    model = load(folder)
    assert torch.equal(model.norm.weight, mixed["model.norm.weight"])
    assert torch.equal(model.head.weight, mixed["lm_head.weight"].float())


@kinds
@pytest.mark.parametrize("in_file", [pytest.param(False, id="without_a_key"), pytest.param(True, id="with_a_key")])
def test_a_tied_head_is_the_embedding(kind: str, in_file: bool, tmp_path: Path) -> None:
    """Some files hold the matrix twice."""
    peer = trained(kind, tie_word_embeddings=True)
    folder = save(peer, tmp_path)
    assert "lm_head.weight" not in tensors(folder)
    if in_file:
        write_tensors(folder, {**tensors(folder), "lm_head.weight": peer.lm_head.weight.clone()})
    model = load(folder)
    assert model.head.weight is model.embed.weight
    assert_logits(model(ids(2, 9)).y, computed(peer, ids(2, 9)).logits)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *(plain for plain in PLAIN if not plain.values[0].startswith(("qwen3_5", "gemma4"))),
        case("olmoe", "clipped", clip_qkv=0.6, attention_bias=True),
        case("olmoe", "linear", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        case("mixtral", "llama3", rope_parameters=LLAMA3),
        case("mixtral", "window", sliding_window=4),
        case("qwen2_moe", "large_theta", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        case("qwen2_moe", "windows", num_hidden_layers=4, use_sliding_window=True, sliding_window=4),
        case(
            "qwen2_moe",
            "windows_below_a_layer",
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=2,
        ),
        case("qwen3_moe", "yarn", rope_parameters=YARN, norm_topk_prob=True),
    ],
)
def test_a_configuration_as_transformers_4_wrote_it_gives_the_same_model(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """rope_theta and rope_scaling{type}, torch_dtype, no layer_types: the same logits, bit for bit."""
    folder = checkpoint(kind, tmp_path, **settings)
    want = load(folder)(ids(2, 9)).y
    edit_config(folder, as_written_by_4)
    assert "rope_parameters" not in (folder / "config.json").read_text()
    assert torch.equal(load(folder)(ids(2, 9)).y, want)


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        pytest.param({"mlp_only_layers": [0, 2]}, {0, 2}, id="named"),
        pytest.param({"decoder_sparse_step": 3}, {0, 1, 3}, id="stepped"),
    ],
)
def test_dense_layers_have_no_experts(settings: dict[str, Any], dense: set[int], tmp_path: Path) -> None:
    """They have an MLP of their own width, and there is a routing for each of the others."""
    model = load(checkpoint("qwen3_moe", tmp_path, num_hidden_layers=4, **settings))
    assert {index for index, block in enumerate(model.layers) if isinstance(block.mlp, GatedMLP)} == dense
    assert all(model.layers[index].mlp.down.weight.shape[1] == 40 for index in dense)
    assert len(model(ids(1, 3)).routings) == sum(isinstance(block.mlp, MoELayer) for block in model.layers)


def test_forced_with_its_own_routing_a_checkpoint_computes_the_same(tmp_path: Path) -> None:
    """Dense layers are skipped."""
    model = load(checkpoint("qwen2_moe", tmp_path, num_hidden_layers=3, mlp_only_layers=[1]))
    free = model(ids(2, 5))
    assert torch.equal(model(ids(2, 5), forced_routing=free.routings).y, free.y)


def test_a_swapped_router_starts_with_parameters_of_zero(tmp_path: Path) -> None:
    """Its own are in no file; what the checkpoint holds is loaded as before."""

    folder = checkpoint("olmoe", tmp_path)
    model = load(folder, make_router=partial(make, "olmoe", gate_bias=True))
    assert all(torch.equal(block.mlp.router.bias_E, torch.zeros(E)) for block in model.layers)
    assert torch.equal(model(ids(2, 5)).y, load(folder)(ids(2, 5)).y)


def test_a_model_that_shares_all_weights_reads_no_file(tmp_path: Path) -> None:
    """Another router on the same tensors: the router's own are filled, and the checkpoint may be gone."""

    folder = checkpoint("olmoe", tmp_path)
    donor = load(folder)
    (folder / "model.safetensors").unlink()
    model = build(folder, make_router=partial(make, "olmoe", gate_bias=True), empty=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    adopt(model, shareable(donor), torch.device("cpu"), 0)
    assert model.embed.weight is donor.embed.weight
    assert torch.equal(model(ids(2, 5)).y, donor(ids(2, 5)).y)


def test_a_model_without_storage_is_filled_from_the_files(tmp_path: Path) -> None:
    """Nothing to share: everything is loaded, a tied head stays tied."""
    folder = checkpoint("mixtral", tmp_path, tie_word_embeddings=True)
    model = build(folder, empty=True)
    adopt(model, {}, torch.device("cpu"), 0)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(ids(2, 5)).y, load(folder)(ids(2, 5)).y)


def test_a_model_may_be_made_and_loaded_in_inference_mode(tmp_path: Path) -> None:
    """Its tensors are then of that mode, in every thread that fills them."""
    folder = checkpoint("olmoe", tmp_path)
    want = load(folder)(ids(2, 5)).y
    with torch.inference_mode():
        assert torch.equal(load(folder)(ids(2, 5)).y, want)


def test_the_seed_changes_nothing(tmp_path: Path) -> None:
    """A checkpoint's parameters are those of its files."""
    folder = checkpoint("olmoe", tmp_path)
    one, other = build(folder), build(folder)
    for seed, model in enumerate((one, other)):
        adopt(model, {}, torch.device("cpu"), seed)
    assert torch.equal(one(ids(1, 5)).y, other(ids(1, 5)).y)


@pytest.mark.parametrize("there", [pytest.param(True, id="there"), pytest.param(False, id="not_there")])
def test_the_tokenizer_is_the_file_beside_the_configuration(there: bool, tmp_path: Path) -> None:
    """None without one: a model of bytes needs none."""
    folder = checkpoint("olmoe", tmp_path)
    if there:
        (folder / "tokenizer.json").write_text("{}")
    model = build(folder)
    assert model.tokenizer_file == (folder / "tokenizer.json" if there else None)
    assert (model.max_positions, model.vocab_size, len(model.layers)) == (128, VOCAB, LAYERS)


def test_what_is_at_the_tokenizers_place_is_the_tokenizer(tmp_path: Path) -> None:
    """A link that leads nowhere does not make it a model of bytes."""
    folder = checkpoint("olmoe", tmp_path)
    (folder / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    assert build(folder).tokenizer_file == folder / "tokenizer.json"


def test_a_run_names_the_keys_that_nobody_reads(tmp_path: Path) -> None:
    """All in one of its warnings; without such keys there is none."""
    folder = checkpoint("mixtral", tmp_path / "m")
    assert build(folder).warnings() == []
    edit_config(folder, logit_scale=0.5, attn_softcap=50)
    run = Run(tiny.compose("checkpoint", f"model.path={folder}", "workload=random"), tmp_path)
    run.build()
    (warning,) = [text for text in run.warnings if "config.json" in text]
    assert "has keys that moe-lab does not use: attn_softcap, logit_scale; if one changes" in warning


def test_a_folder_may_hold_other_files(tmp_path: Path) -> None:
    """Texts, tokenizers, and safetensors that model.safetensors.index.json does not name."""
    folder = checkpoint("olmoe", tmp_path)
    want = load(folder)(ids(1, 5)).y
    (folder / "README.md").write_text("about")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "adapter.safetensors").write_bytes(b"nothing")
    assert torch.equal(load(folder)(ids(1, 5)).y, want)


def test_the_small_checkpoint_in_the_repository_gives_the_logits_of_transformers() -> None:
    """Trained weights on real text: forward, prefill and decode."""
    pytest.importorskip("transformers")
    from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

    text = (tiny.ROOT / "assets" / "text" / "python.txt").read_bytes()[:400]
    ids_BN = torch.tensor(list(text)).view(2, 200)
    peer = OlmoeForCausalLM.from_pretrained(REAL, dtype=torch.float32, attn_implementation="eager").eval()
    want, model = computed(peer, ids_BN), load(REAL)
    with torch.inference_mode():
        got = model(ids_BN)
        prefilled = Prefill(model, model.make_cache(2, 200))(ids_BN)
    assert_logits(got.y, want.logits)
    assert_same_experts(got.routings, want.experts)
    assert_logits(prefilled.y, want.logits[:, -1:])
    logits, routings = decoded(model, ids_BN, context_len=120)
    assert_logits(logits, want.logits[:, 120:])
    assert_same_experts(routings, want.experts)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    """Beside safetensors, and alone: neither read nor executed."""
    folder = checkpoint("olmoe", tmp_path)
    trap = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.zeros(3)}, trap)
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).endswith(".bin"):
            opened.append(str(arguments[0]))
        if watching and event == "pickle.find_class":
            opened.append("a pickle")

    sys.addaudithook(watch)
    load(folder)
    (folder / "model.safetensors").unlink()
    message = checkpoints.complaint(lambda: load(folder))
    assert opened == []
    torch.load(trap)
    watching = False
    assert opened
    assert "pytorch_model.bin" in message and "pickle" in message and "safetensors" in message
