"""Architectures with the experts of DeepSeek: first dense layers, then routed experts beside ungated shared ones.

Each function takes what the file says of the attention (`decoder`) and of the routed experts (`moe`), and returns the
arguments of `Settings`, but for the model's type and what all have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_lab.config.checks import MOST_LAYERS
from moe_lab.models import checkpoint_router as routers
from moe_lab.models.checkpoint_keys import Keys, shown
from moe_lab.models.checkpoint_rope import GROWTH
from moe_lab.models.checkpoint_windows import window, windows

_Part = dict[str, Any]


def deepseek_v2(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Its router is a softmax, and may be limited to groups."""
    routers.require(config, "mlp_bias", False)
    routers.require(config, "rope_interleave", True)
    routers.require(config, "moe_layer_freq", 1)
    return {**_with_shared_experts(config, decoder, moe, routers.softmax_in_groups), "interleaved": True}


def deepseek_v3(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Also Kimi-K2 and Moonlight."""
    routers.require(config, "moe_layer_freq", 1)
    return {
        **_with_shared_experts(config, decoder, moe, routers.sigmoid_with_bias),
        "interleaved": config.flag("rope_interleave", default=True),
        "extra_layers": _extra_layers(config),
    }


def mistral4(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Its queries grow with their position, and its router is a softmax."""
    scaling = decoder["rope_scaling"]
    if scaling is None or scaling["rope_type"] != "yarn":
        raise config.refuse("rope_parameters must have rope_type=yarn in mistral4; download the file again.")
    growth = (float(scaling[GROWTH]), scaling["original_max_position_embeddings"])
    parts = _with_shared_experts(config, decoder, moe, routers.softmax_in_summed_groups)
    parts["decoder"]["latent"] = {**decoder["latent"], "growth": growth}
    return {**parts, "interleaved": config.flag("rope_interleave", default=True)}


def glm4_moe_lite(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """GLM-4.7-Flash: DeepSeek-V3, but the dense layers have another key."""
    n_layers, one = decoder["n_layers"], ["dense"] + ["sparse"] * (decoder["n_layers"] - 1)
    kinds = config.get("mlp_layer_types", default=one)
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= {"dense", "sparse"}:
        raise config.refuse(f"mlp_layer_types={shown(kinds)} must have dense or sparse per layer ({n_layers}).")
    dense = frozenset(layer for layer, kind in enumerate(kinds) if kind == "dense")
    first = config.size("first_k_dense_replace", default=len(dense), least=0)
    if dense != frozenset(range(first)) and config.get("first_k_dense_replace") is not None:
        raise config.refuse(f"first_k_dense_replace={first} and mlp_layer_types contradict each other; remove one.")
    return {
        **_shared_and_routed(config, decoder, moe, routers.sigmoid_with_bias, dense),
        "interleaved": config.flag("rope_interleave", default=True),
        "extra_layers": _extra_layers(config),
    }


def glm4_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """GLM-4.5, 4.6 and 4.7: part of a head is turned; queries and keys may have a norm."""
    bias = config.flag("attention_bias", default=False)
    norm = "head" if config.flag("use_qk_norm", default=False) else "none"
    parts = _with_shared_experts(config, decoder, moe, routers.sigmoid_with_bias)
    parts["decoder"] |= {"qk_norm": norm, "qkv_bias": bias}
    return {**parts, "extra_layers": _extra_layers(config)}


def solar_open(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """As GLM-4.5, without dense layers and norms."""
    routers.require(config, "first_k_dense_replace", 0)
    routers.require(config, "use_qk_norm", False)
    bias = config.flag("attention_bias", default=False)
    parts = _shared_and_routed(config, decoder, moe, routers.sigmoid_with_bias, frozenset())
    parts["decoder"] |= {"qkv_bias": bias}
    return parts


def dots1(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """dots.llm1: every head of queries and keys has a norm, and the last layers may have a window."""
    bias, n_layers, seen = config.flag("attention_bias", default=False), decoder["n_layers"], window(config, 4096)
    first = config.size("max_window_layers", default=62, least=0)
    of_layers = [seen if layer >= first else None for layer in range(n_layers)]
    if config.get("layer_types") is not None:
        of_layers = windows(config, n_layers, seen)
    parts = _with_shared_experts(config, decoder, moe, routers.sigmoid_with_bias)
    parts["decoder"] |= {"qk_norm": "head", "qkv_bias": bias, "o_bias": bias, "windows": of_layers}
    return parts


def minimax_m2(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """No shared experts; one norm of all queries and one of all keys; part of a head is turned."""
    fixed = {"use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True}
    for key, value in {**fixed, "shared_intermediate_size": 0}.items():
        routers.require(config, key, value)
    kinds = config.get("attn_type_list", default=[])
    if not isinstance(kinds, list) or not {*map(str, kinds)} <= {"1"}:
        raise config.refuse(f"attn_type_list={shown(kinds)} is not supported; every layer must be 1 (full attention).")
    for key in ("use_mtp", "mtp_transformer_layers"):
        config.get(key)  # how the layers of further tokens are
    return {
        "decoder": {**decoder, **moe, "qk_norm": "full"},
        "router": routers.scored(score="sigmoid", bias=True, renormalize=True),
        "extra_layers": config.size("num_mtp_modules", default=0, least=0, most=MOST_LAYERS),
    }


def _extra_layers(config: Keys) -> int:
    return config.size("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, most=MOST_LAYERS)


_Router = Callable[[Keys, int, int], _Part]


def _with_shared_experts(config: Keys, decoder: _Part, moe: _Part, router: _Router) -> _Part:
    """The first layers, as many as `first_k_dense_replace` says, are dense."""
    first = config.size("first_k_dense_replace", least=0)
    dense = frozenset(range(min(first, decoder["n_layers"])))
    return _shared_and_routed(config, decoder, moe, router, dense)


def _shared_and_routed(config: Keys, decoder: _Part, moe: _Part, router: _Router, dense: frozenset[int]) -> _Part:
    shared = config.size("n_shared_experts") * moe["mlp_hidden_dim"]
    if not dense:
        config.get("intermediate_size")  # of dense layers
    width = config.size("intermediate_size") if dense else None
    return {
        "decoder": {**decoder, **moe, "dense_hidden_dim": width, "shared_expert_hidden_dim": shared},
        "router": router(config, moe["n_experts"], moe["top_k"]),
        "dense_layers": dense,
    }
