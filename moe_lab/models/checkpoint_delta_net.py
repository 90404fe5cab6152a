"""Qwen3-Next and Qwen3.5: gated delta nets between layers of attention, whose output has a gate.

Each function takes what the file says of the attention (`decoder`) and of the routed experts (`moe`), and returns the
arguments of `Settings`, but for the model's type and what all have.
"""

from __future__ import annotations

from typing import Any

from moe_lab.models import checkpoint_router as routers
from moe_lab.models.checkpoint_keys import Keys, shown
from moe_lab.models.checkpoint_plain import dense_layers

_Part = dict[str, Any]
_KINDS = ["full_attention", "linear_attention"]
_FURTHER_TOKENS = {"mtp.": "what predicts further tokens"}
_VISION = {"model.visual.": "the part that reads images"}


def qwen3_next(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Its layers may be dense, as those of Qwen3."""
    dense = dense_layers(config, decoder["n_layers"])
    if not dense:
        config.get("intermediate_size")  # of dense layers
    parts = _delta_net(config, decoder, moe)
    parts["decoder"]["dense_hidden_dim"] = config.size("intermediate_size") if dense else None
    router = routers.softmax_topk(config.flag("norm_topk_prob", default=True))
    return {**parts, "router": router, "dense_layers": dense, "others": _FURTHER_TOKENS}


def qwen3_5_moe_text(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """The text part of Qwen3.5; all its layers have experts."""
    fixed = {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1, "attn_output_gate": True}
    for key, value in fixed.items():
        routers.require(config, key, value)
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        config.get(key)  # how what predicts further tokens is
    router = routers.softmax_topk(renormalize=True)
    return {**_delta_net(config, decoder, moe), "router": router, "others": _FURTHER_TOKENS}


def qwen3_5_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """As above, in the files of a model that also reads images."""
    others = {**_FURTHER_TOKENS, **_VISION}
    return {
        **qwen3_5_moe_text(config, decoder, moe),
        "others": others,
        "prefix": "model.language_model",
        "only_text": True,
    }


def _delta_net(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """What both have: `decoder`, and the groups of rows in the files."""
    routers.require(config, "mamba_ssm_dtype", "float32")  # the state's
    routers.require(config, "use_sliding_window", False)
    bias, d = config.flag("attention_bias", default=False), decoder["head_dim"]
    net: _Part = {
        "kind": "delta_net",
        "n_heads": config.size("linear_num_key_heads"),
        "head_dim": config.size("linear_key_head_dim"),
        "n_value_heads": config.size("linear_num_value_heads"),
        "value_dim": config.size("linear_value_head_dim"),
        "conv_width": config.size("linear_conv_kernel_dim"),
    }
    shared, over = divmod(net["n_value_heads"], net["n_heads"])
    if over:
        raise config.refuse(
            f"linear_num_value_heads={net['n_value_heads']} must be a multiple of linear_num_key_heads="
            f"{net['n_heads']}; download the file again."
        )
    values = shared * net["value_dim"]
    own = {
        "qk_norm": "head",
        "qkv_bias": bias,
        "o_bias": bias,
        "norm": "wide",
        "output_gate": True,
        "shared_expert_hidden_dim": config.size("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        "mixers": [net if linear else None for linear in _linear_layers(config, decoder["n_layers"])],
    }
    groups = {
        "q": (d, d),
        "qkvz": (net["head_dim"], net["head_dim"], values, values),
        "ba": (shared, shared),
    }
    return {"decoder": {**decoder, **moe, **own}, "groups": groups}


def _linear_layers(config: Keys, n_layers: int) -> list[bool]:
    """Which layers have a gated delta net: as `layer_types` says; without it all but every fourth, or so."""
    interval = config.size("full_attention_interval", default=4)
    by_interval = [_KINDS[bool((layer + 1) % interval)] for layer in range(n_layers)]
    kinds = config.get("layer_types", default=by_interval)
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= {*_KINDS}:
        raise config.refuse(f"layer_types={shown(kinds)} must have one of {_KINDS} per layer ({n_layers}).")
    if config.get("full_attention_interval") is not None and kinds != by_interval:
        raise config.refuse(
            f"full_attention_interval={interval} and layer_types contradict each other; remove one of the two."
        )
    return [kind == "linear_attention" for kind in kinds]
