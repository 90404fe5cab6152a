"""The same architectures in transformers, tiny, with the weights of a model of ours."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from torch import nn

from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.transformer_decoder import TransformerDecoder

_PREFIXES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "dots1": "Dots1",
    "solar_open": "SolarOpen",
    "minimax_m2": "MiniMaxM2",
    "granitemoe": "GraniteMoe",
    "gpt_oss": "GptOss",
    "phimoe": "Phimoe",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "lfm2_moe": "Lfm2Moe",
    "gemma4_text": "Gemma4",
    "gemma4": "Gemma4",
    "mistral4": "Mistral4",
    "qwen3_next": "Qwen3Next",
    "qwen3_5_moe_text": "Qwen3_5Moe",
    "qwen3_5_moe": "Qwen3_5Moe",
}


def decoder_settings(model: TransformerDecoder) -> dict[str, Any]:
    """The keys of a transformers configuration that every decoder has."""
    attention = model.layers[0].attention
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp_hidden_dim,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.q.weight.shape[0] // model.head_dim,
        "num_key_value_heads": attention.k.weight.shape[0] // model.head_dim,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": model.head.weight is model.embed.weight,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.ropes[0].theta},
        "attn_implementation": "eager",
        "pad_token_id": None,
    }


def peer_model(kind: str, **settings: Any) -> nn.Module:
    """A model of transformers in evaluation mode; skips the test where transformers is not installed."""
    pytest.importorskip("transformers")
    prefix, module = _PREFIXES[kind], kind.removesuffix("_text")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = getattr(configuration, f"{prefix}{'TextConfig' if kind != module else 'Config'}")(**settings)
    of_images = hasattr(config, "vision_config")
    model: nn.Module = getattr(modeling, f"{prefix}For{'ConditionalGeneration' if of_images else 'CausalLM'}")(config)
    return model.eval().requires_grad_(False)


def copy_decoder(mine: TransformerDecoder, other: Any) -> None:
    """Copy every parameter of `mine` into `other`; one left over on either side is an error."""
    filled: set[str] = set()
    names = {id(parameter): name for name, parameter in other.named_parameters()}

    def fill(parameter: Any, values: Any) -> None:
        parameter.copy_(values)
        filled.add(names[id(parameter)])

    fill(other.model.embed_tokens.weight, mine.embed.weight)
    fill(other.lm_head.weight, mine.head.weight)
    fill(other.model.norm.weight, mine.norm.weight)
    for block, layer in zip(mine.layers, other.model.layers, strict=True):
        fill(layer.input_layernorm.weight, block.attention_norm.weight)
        fill(layer.post_attention_layernorm.weight, block.mlp_norm.weight)
        for name in ("q", "k", "v", "o"):
            projection = getattr(layer.self_attn, f"{name}_proj")
            fill(projection.weight, getattr(block.attention, name).weight)
            if projection.bias is not None:
                fill(projection.bias, 0 * projection.bias)
        for name in ("q_norm", "k_norm"):
            norm = getattr(block.attention, name)
            if norm is not None:
                fill(getattr(layer.self_attn, name).weight, norm.weight)
        if isinstance(block.mlp, MoELayer):
            _fill_moe(fill, block.mlp, layer.mlp)
        else:
            _fill_dense(fill, block.mlp, layer.mlp)
    left = set(names.values()) - filled
    assert not left, f"the peer has parameters that were not copied: {sorted(left)}"


def _fill_dense(fill: Any, mine: Any, other: Any) -> None:
    gate, up = mine.gate_up.weight.chunk(2)
    fill(other.gate_proj.weight, gate)
    fill(other.up_proj.weight, up)
    fill(other.down_proj.weight, mine.down.weight)


def _fill_moe(fill: Any, mine: MoELayer, other: Any) -> None:
    fill(other.gate.weight, mine.weights.gate_ED)
    fill(other.experts.gate_up_proj, mine.weights.w_gate_up_E2FD)
    fill(other.experts.down_proj, mine.weights.w_down_EDF)
    if mine.shared is not None:
        _fill_dense(fill, mine.shared.mlp, other.shared_expert)
        if mine.shared.gate is not None:
            fill(other.shared_expert_gate.weight, mine.shared.gate.weight)
