"""Architectures whose parts most others have too: OLMoE, Mixtral, and Qwen's before Qwen3-Next.

Each function takes what the file says of the attention (`decoder`) and of the routed experts (`moe`), and returns the
arguments of `Settings`, but for the model's type and what all have.
"""

from __future__ import annotations

from typing import Any

from moe_lab.models import checkpoint_router as routers
from moe_lab.models import checkpoint_windows as windows
from moe_lab.models.checkpoint_keys import Keys, shown

_Part = dict[str, Any]


def mixtral(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """May have a window."""
    own = {"windows": [windows.window(config)] * decoder["n_layers"]}
    return {"decoder": {**decoder, **moe, **own}, "router": routers.softmax_topk(renormalize=True)}


def olmoe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """One norm of all queries and one of all keys."""
    bias = config.flag("attention_bias", default=False)
    own = {"qk_norm": "full", "clip_qkv": config.number("clip_qkv"), "qkv_bias": bias, "o_bias": bias}
    router = routers.softmax_topk(config.flag("norm_topk_prob", default=False))
    return {"decoder": {**decoder, **moe, **own}, "router": router}


def qwen3_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """A norm of each head, and dense layers."""
    bias = config.flag("attention_bias", default=False)
    own = {
        "dense_hidden_dim": config.size("intermediate_size"),
        "qk_norm": "head",
        "qkv_bias": bias,
        "o_bias": bias,
        "windows": [windows.switched_window(config)] * decoder["n_layers"],
    }
    return {
        "decoder": {**decoder, **moe, **own},
        "router": routers.softmax_topk(config.flag("norm_topk_prob", default=False)),
        "dense_layers": dense_layers(config, decoder["n_layers"]),
    }


def qwen2_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """A shared expert with a gate, windows in some layers, and dense layers."""
    n_layers, window = decoder["n_layers"], windows.switched_window(config)
    widest = config.size("max_window_layers", default=28, least=0)
    own = {
        "dense_hidden_dim": config.size("intermediate_size"),
        "shared_expert_hidden_dim": config.size("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        "qkv_bias": config.flag("qkv_bias", default=True),
        "windows": windows.windows(config, n_layers, window, below=widest),
    }
    return {
        "decoder": {**decoder, **moe, **own},
        "router": routers.softmax_topk(config.flag("norm_topk_prob", default=False)),
        "dense_layers": dense_layers(config, n_layers),
    }


def dense_layers(config: Keys, n_layers: int) -> frozenset[int]:
    """Of the Qwen models: those named, and those between every `decoder_sparse_step`-th."""
    if not isinstance(named := config.get("mlp_only_layers", default=[]), list):
        raise config.refuse(f"mlp_only_layers={shown(named)} must be a list of layers; download the file again.")
    named, step = config.integers("mlp_only_layers"), config.size("decoder_sparse_step", default=1)
    return frozenset(layer for layer in range(n_layers) if layer in named or (layer + 1) % step)
