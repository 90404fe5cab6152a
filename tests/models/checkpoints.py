"""Checkpoints of the supported architectures, tiny: made by transformers, with weights that hide no mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.config.targets import locate
from moe_lab.experts.grouped import Grouped
from moe_lab.models import MakeRouter, checkpoint_config
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.parameters import initialize, without_storage
from tests.models.peers import peer_model

KINDS: tuple[str, ...] = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss", "phimoe")
KINDS += ("ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "gemma4_text", "gemma4")
KINDS += ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
KINDS += ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "dots1", "solar_open", "minimax_m2", "mistral4")
VOCAB, D, HEADS, LAYERS, E, K, F = 97, 32, 4, 2, 5, 2, 24
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
_LATENT = {
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": F,
    "intermediate_size": 40,
    "first_k_dense_replace": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_hidden_layers": 3,
}
_DEEPSEEK = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": F,
    "intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
}
_MROPE = {
    "rope_type": "default",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "mrope_interleaved": True,
    "mrope_section": [2, 1, 1],
}
_GATED = {
    "num_experts": E,
    "moe_intermediate_size": F,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
_GEMMA = {
    "num_experts": E,
    "num_experts_per_tok": ...,
    "top_k_experts": K,
    "moe_intermediate_size": F,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 4,
    "head_dim": 8,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 2.0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    },
}
_OF_IMAGES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": D,
    "num_position_embeddings": 16,
}
_GEMMA_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}
_WITH_IMAGES = {"qwen3_5_moe": _OF_IMAGES, "gemma4": _GEMMA_IMAGES}
_OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": _GEMMA,
    "gemma4": _GEMMA,
    "olmoe": {"num_experts": E, "intermediate_size": F},
    "mixtral": {"num_local_experts": E, "intermediate_size": F},
    "qwen2_moe": {
        "num_experts": E,
        "moe_intermediate_size": F,
        "intermediate_size": 40,
        "shared_expert_intermediate_size": 12,
    },
    "qwen3_next": {**_GATED, "intermediate_size": 40},
    "qwen3_5_moe_text": {**_GATED, "rope_parameters": _MROPE},
    "qwen3_5_moe": {**_GATED, "rope_parameters": _MROPE},
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": F, "intermediate_size": 40, "head_dim": 12},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 12},
    "glm4_moe_lite": {**_LATENT, **_DEEPSEEK, "first_k_dense_replace": ...},
    "mistral4": {
        **_LATENT,
        **_DEEPSEEK,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.7,
        },
    },
    "dots1": {**_DEEPSEEK, "head_dim": 12, "norm_topk_prob": True},
    "solar_open": {**_DEEPSEEK, "head_dim": 12, "intermediate_size": ..., "first_k_dense_replace": ...},
    "minimax_m2": {"num_local_experts": E, "intermediate_size": F, "head_dim": 12},
    "deepseek_v2": {**_LATENT, "n_routed_experts": E, "n_shared_experts": 2},
    "deepseek_v3": {**_LATENT, **_DEEPSEEK},
    "granitemoe": {
        "num_local_experts": E,
        "intermediate_size": F,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.6,
        "attention_multiplier": 0.2,
    },
    "phimoe": {
        "num_local_experts": E,
        "intermediate_size": F,
        "router_jitter_noise": 0.3,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 3.0, 4.0, 9.0],
            "short_mscale": 1.3,
            "long_mscale": 1.7,
        },
    },
    "ernie4_5_moe": {
        "moe_num_experts": E,
        "moe_k": K,
        "moe_intermediate_size": F,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "num_experts_per_tok": K,
    },
    "lfm2_moe": {
        "num_experts": E,
        "moe_intermediate_size": F,
        "intermediate_size": 40,
        "num_dense_layers": 1,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": {
        "num_experts": E,
        "moe_topk": K,
        "num_experts_per_tok": K,
        "intermediate_size": F,
        "head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": E,
        "intermediate_size": F,
        "head_dim": 12,
        "sliding_window": 4,
        "swiglu_limit": 1.5,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4.0,
            "truncate": False,
        },
    },
}

_ZERO_CENTRED = {"Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm"}

_EACH_LAYOUT = {"olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next"}
_EACH_LAYOUT |= {"qwen3_5_moe"}
"""Together they have every layout of files. For the other kinds the tests of the loader alone are slow ones."""

kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind, marks=[pytest.mark.slow] * (kind not in _EACH_LAYOUT)) for kind in KINDS]
)


def trained(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A model of transformers that stands for a trained one: norms are not 1, biases not 0, logits of size 1."""
    given = {**_COMMON, **_OWN[kind], **settings}
    keys: dict[str, Any] = {key: value for key, value in given.items() if value is not ...}
    if kind in _WITH_IMAGES:
        tied = {"tie_word_embeddings": keys.get("tie_word_embeddings", False)}
        keys = {"text_config": keys, "vision_config": _WITH_IMAGES[kind], "attn_implementation": "eager", **tied}
    model: Any = peer_model(kind, **keys)
    centred = {f"{name}.weight" for name, part in model.named_modules() if type(part).__name__ in _ZERO_CENTRED}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_factor = ("norm" in name and name not in centred) or name.endswith(("router.scale", "per_expert_scale"))
            parameter.copy_(0.3 * noise + float(is_factor))
            parameter.mul_(len(parameter) ** 0.5 if name.endswith("router.scale") else 1)
        else:
            parameter.copy_(noise * (0.5 if "embed" in name else parameter.shape[-1] ** -0.5))
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("layer_scalar"):
            buffer.copy_(0.7 + 0.6 * torch.rand(buffer.shape, generator=generator))
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """`model` in `folder` as transformers writes it: by default in the layout of the hub, a key per expert."""
    model.save_pretrained(folder, **options)
    return folder


def checkpoint(kind: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """`trained`, saved."""
    return save(trained(kind, seed, **settings), folder)


def native_router(folder: Path) -> MakeRouter:
    """What makes the router that config.json tells of."""
    node = dict(checkpoint_config.read(folder).router)
    made = locate(node.pop("_target_"))
    return lambda n_experts, top_k: made(n_experts, top_k, impl="auto", **node)


def build(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    make_router: MakeRouter | None = None,
    empty: bool = False,
) -> Checkpoint:
    """Our model of the checkpoint, before it is loaded; `empty`: without storage."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with without_storage() if empty else nullcontext():
            model = Checkpoint(
                path=str(folder),
                make_router=make_router or native_router(folder),
                experts=Grouped(),
                implementation="auto",
                attention="auto",
            )
    finally:
        torch.set_default_dtype(before)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, *, make_router: MakeRouter | None = None) -> Checkpoint:
    """Our model of the checkpoint."""
    model = build(folder, dtype, make_router=make_router)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)  # what is not loaded shows
    initialize(model, 0)
    return model


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None] | None = None, **keys: Any) -> None:
    """Change config.json: by a function, by keys (... removes one), or both."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content |= keys
    content = {key: value for key, value in content.items() if value is not ...}
    if change is not None:
        change(content)
    path.write_text(json.dumps(content))


def as_written_by_4(content: dict[str, Any]) -> None:
    """Turn a config.json of transformers 5 into that of the same model by transformers 4."""
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    content["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    content["torch_dtype"] = content.pop("dtype")
    content["transformers_version"] = "4.40.0"
    if not {"linear_attention", "conv"} & {*content.get("layer_types", [])}:
        content.pop("layer_types", None)
    if content["model_type"] == "qwen3_moe" and "num_local_experts" in content:
        content["num_experts"] = content.pop("num_local_experts")


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that model.safetensors holds."""
    return load_file(folder / "model.safetensors")


def loaded_keys(keys: Iterable[str]) -> list[str]:
    """Those of the text part."""
    others = ("model.visual.", "model.vision_tower.", "model.embed_vision.")
    return [key for key in keys if not key.startswith(others)]


def write_tensors(folder: Path, content: Mapping[str, Tensor]) -> None:
    """Replace model.safetensors."""
    save_file(dict(content), folder / "model.safetensors")


def complaint(act: Callable[[], object]) -> str:
    """The message of the `ValueError` that `act` raises, which is one line and a sentence."""
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [B, S]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def writes(folder: Path, chain: Mapping[int, int], vocab_size: int = 256, **keys: Any) -> Path:
    """A checkpoint that writes chain[token] after each token: attention and experts add nothing."""
    checkpoint("mixtral", folder, vocab_size=vocab_size)
    content = tensors(folder)
    for key in content:
        if "o_proj" in key or ".w2." in key:
            content[key] = torch.zeros_like(content[key])
    content["model.norm.weight"] = torch.ones(D)
    embedding, head = content["model.embed_tokens.weight"], torch.zeros(vocab_size, D)
    for now, then in chain.items():
        head[then] += 4 * embedding[now] / embedding[now].norm()
    write_tensors(folder, {**content, "lm_head.weight": head})
    edit_config(folder, **{"eos_token_id": ..., **keys})
    return folder
