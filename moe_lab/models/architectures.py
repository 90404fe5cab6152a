"""The architectures of checkpoints that can be read, for people: what each covers, and what of it is tested.

Imports no torch. `checkpoint_config` reads them; a test holds the two, and the tests' checkpoints, to each other.
"""

from __future__ import annotations

from typing import NamedTuple

_LIKE_TRANSFORMERS = "logits, experts chosen, prefill, decode and greedy tokens, against transformers"
_GATED = "gated delta nets in three layers of four, attention with an output gate, a quarter of each head turned"
_PUBLISHED = "logits as deepseek_v3; its own config.json is read in a test"


class Architecture(NamedTuple):
    """A `model_type` of config.json, the released models that have it, what is unusual, and what is tested.

    Tested are tiny models with random weights; no released weights are part of the tests.
    """

    model_type: str
    models: str
    unusual: str
    tested: str = _LIKE_TRANSFORMERS


ARCHITECTURES = (
    Architecture(
        "olmoe",
        "OLMoE-1B-7B",
        "one norm of all queries and one of all keys",
        f"{_LIKE_TRANSFORMERS}; also trained weights (assets/tiny-olmoe)",
    ),
    Architecture("mixtral", "Mixtral-8x7B, 8x22B", "may have a window"),
    Architecture("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", "shared expert with a gate, windows, biases"),
    Architecture("qwen3_moe", "Qwen3-30B-A3B, 235B-A22B", "norm of each head, dense layers"),
    Architecture("qwen3_next", "Qwen3-Next-80B-A3B", f"{_GATED}, shared expert with a gate"),
    Architecture(
        "qwen3_5_moe",
        "Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B, Qwen3.6-35B-A3B",
        "the text part only; as qwen3_next, without dense layers",
    ),
    Architecture("qwen3_5_moe_text", "Qwen3.5's text part by itself", "as qwen3_5_moe"),
    Architecture(
        "deepseek_v2", "DeepSeek-V2, V2-Lite", "latent attention, dense layers, shared experts, groups of experts"
    ),
    Architecture(
        "deepseek_v3",
        "DeepSeek-V3, R1, Moonlight",
        "latent attention, dense layers, shared experts, sigmoid router with a bias and groups, fp8 blocks",
    ),
    Architecture("kimi_k2", "Kimi-K2", "as deepseek_v3", _PUBLISHED),
    Architecture("glm4_moe", "GLM-4.5, 4.5-Air, 4.6, 4.7", "half of each head turned, router as deepseek_v3"),
    Architecture("glm4_moe_lite", "GLM-4.7-Flash", "as deepseek_v3"),
    Architecture(
        "mistral4",
        "the text part of Mistral-Small-4, in files of its own",
        "latent attention whose queries grow with their position, softmax router",
    ),
    Architecture("dots1", "dots.llm1", "norm of each head, router as deepseek_v3"),
    Architecture("solar_open", "Solar-Open-100B", "router as deepseek_v3"),
    Architecture("minimax_m2", "MiniMax-M2", "half of each head turned, sigmoid router with a bias, fp8 blocks"),
    Architecture("granitemoe", "Granite-3.x MoE", "multipliers of embedding, attention, residual and logits"),
    Architecture(
        "gpt_oss", "gpt-oss-20b, 120b", "attention sinks, windows, experts with biases and a clamped gate, MXFP4"
    ),
    Architecture("phimoe", "Phi-3.5-MoE", "LayerNorm with a bias, LongRoPE, sparse mixer as the router"),
    Architecture("ernie4_5_moe", "ERNIE-4.5-21B-A3B", "interleaved RoPE, softmax router with a bias, shared experts"),
    Architecture(
        "lfm2_moe",
        "LFM2-8B-A1B",
        "short convolutions in most layers, dense layers, sigmoid router with a bias",
    ),
    Architecture(
        "gemma4",
        "Gemma-4-26B-A4B",
        "the text part only; a dense MLP beside the experts, both GeGLU, norms before and after each part, two kinds "
        "of heads, values that are the keys, a scale of each expert",
    ),
    Architecture("gemma4_text", "Gemma 4's text part by itself", "as gemma4"),
    Architecture("hunyuan_v1_moe", "Hunyuan-A13B", "norm of each head after RoPE, a shared expert"),
)

_BY_TYPE = {each.model_type: each for each in ARCHITECTURES}


def of_type(model_type: str) -> Architecture | None:
    """The architecture of this `model_type`; None for one that cannot be read."""
    return _BY_TYPE.get(model_type)
