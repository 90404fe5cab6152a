"""The text part of Gemma 4 with experts: layers of two kinds, each with heads and a RoPE of its own, and many norms.

The dense MLP of each layer is read as a shared expert.
"""

from __future__ import annotations

from typing import Any

from moe_lab.config.checks import head_mistake
from moe_lab.models import checkpoint_router as routers
from moe_lab.models import checkpoint_sizes as sizes
from moe_lab.models import checkpoint_windows as windows
from moe_lab.models.checkpoint_keys import Keys, shown
from moe_lab.models.checkpoint_rope import read_rope_of_kind

_Part = dict[str, Any]
_NOT_TEXT = "the parts that read images and sound"
_OTHERS = {f"model.{part}.": _NOT_TEXT for part in ("vision_tower", "embed_vision", "audio_tower", "embed_audio")}
_OF_A_LAYER = {"head_dim", "num_key_value_heads"}


def gemma4_text(config: Keys) -> _Part:
    """The arguments of `Settings` but for the type."""
    _require_supported(config)
    usual = {"head_dim": config.size("head_dim"), "n_kv_heads": config.size("num_key_value_heads")}
    decoder = sizes.trunk(config, 0.0, None)  # RoPE is each layer's own
    n_layers, bias = decoder["n_layers"], config.flag("attention_bias", default=False)
    slides = windows.sliding(config, [bool((i + 1) % 6) and i + 1 < n_layers for i in range(n_layers)])
    if slides[-1]:
        raise config.refuse("layer_types: the last layer must be full_attention; download the file again.")
    ropes, shared = config.part("rope_parameters"), config.flag("attention_k_eq_v", default=False)
    kinds = {each: ropes.part("sliding_attention" if each else "full_attention") for each in (True, False)}
    by_layer: list[_Part] = []
    for heads, each in zip(_heads(config, usual, slides), slides, strict=True):
        _require_fit(config, decoder["n_heads"], **heads)
        rope = read_rope_of_kind(kinds[each], heads["head_dim"])
        by_layer.append({**heads, **rope, "values_are_keys": shared and not each})
    own = {
        **usual,
        "tie_embeddings": config.flag("tie_word_embeddings", default=True),
        "qk_norm": "head",
        "value_norm": True,
        "scale": 1.0,
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": [config.size("sliding_window", default=512) if each else None for each in slides],
        "by_layer": by_layer,
        "embedding_scale": decoder["d_model"] ** 0.5,  # which transformers rounds to the dtype of the weights
        "logits_cap": config.number("final_logit_softcapping"),
        "norms_after": True,
        "scaled_layers": True,
        "activation": "gelu_tanh",
        "shared_expert_hidden_dim": config.size("intermediate_size"),
        "own_norms": True,
        "expert_settings": {"activation": "gelu_tanh", "scaled": True},
    }
    moe = sizes.experts_of(config, config.size("moe_intermediate_size"), config.size("top_k_experts"))
    return {"decoder": {**decoder, **moe, **own}, "router": routers.softmax_topk(renormalize=True)}


def gemma4(config: Keys) -> _Part:
    """As above, in the files of a model that also reads images and sound."""
    return {**gemma4_text(config), "others": _OTHERS, "prefix": "model.language_model", "only_text": True}


def _require_supported(config: Keys) -> None:
    """Refuse the variants of other sizes."""
    if not config.flag("enable_moe_block", default=False):
        raise config.refuse("enable_moe_block is false: the model has no experts.")
    if width := config.size("hidden_size_per_layer_input", default=256, least=0):
        raise config.refuse(f"hidden_size_per_layer_input={width}: embeddings of each layer are not supported.")
    if shared := config.size("num_kv_shared_layers", default=0, least=0):
        raise config.refuse(f"num_kv_shared_layers={shared}: keys and values of another layer are not supported.")
    for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # of what was just refused
        config.get(key)
    routers.require(config, "hidden_activation", "gelu_pytorch_tanh")
    if (both_ways := config.get("use_bidirectional_attention")) not in (None, "vision"):  # vision: of images alone
        raise config.refuse(f"use_bidirectional_attention={shown(both_ways)} is not supported; supported: vision.")
    if not config.get("rope_parameters"):
        config.need("rope_parameters")  # without them transformers makes up its own


def _heads(config: Keys, usual: _Part, slides: list[bool]) -> list[_Part]:
    """Of each layer, `head_dim` and `n_kv_heads`: as transformers 5.23 writes them, or as before, of full layers."""
    names = ("global_head_dim", "num_global_key_value_heads")
    own_heads = config.get(names[1]) is not None and config.flag("attention_k_eq_v", default=False)
    full = {"head_dim": config.size(names[0], default=512), "n_kv_heads": usual["n_kv_heads"]}
    full |= {"n_kv_heads": config.size(names[1])} if own_heads else {}
    by_kind = [usual if each else full for each in slides]
    if config.get("per_layer_config") is None:
        return by_kind
    layers = config.part("per_layer_config")
    by_layer = [_heads_of_layer(layers.part(str(layer)), usual) for layer in range(len(slides))]
    if by_layer != by_kind and any(config.get(name) is not None for name in names):
        raise config.refuse(f"per_layer_config and {' or '.join(names)} contradict each other; remove one of the two.")
    return by_layer


def _heads_of_layer(own: Keys, usual: _Part) -> _Part:
    if unknown := sorted(own.content.keys() - _OF_A_LAYER):
        raise own.refuse(f"{own.where}.{shown(unknown[0])} is not supported; a layer may differ in heads only.")
    head_dim = own.size("head_dim", default=usual["head_dim"])
    return {"head_dim": head_dim, "n_kv_heads": own.size("num_key_value_heads", default=usual["n_kv_heads"])}


def _require_fit(config: Keys, n_heads: int, head_dim: int, n_kv_heads: int) -> None:
    """Raise `ValueError` if a layer cannot have such heads."""
    names = {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    mistake = head_mistake(config.size("hidden_size"), n_heads, n_kv_heads, head_dim, lambda key: names.get(key, key))
    if mistake:
        raise config.refuse(mistake)
