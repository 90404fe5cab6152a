"""Architectures with a part or two of their own: Granite, gpt-oss, Phi-3.5-MoE, ERNIE 4.5, HunYuan-A13B and LFM2-MoE.

Each function takes what the file says of the attention (`decoder`) and of the routed experts (`moe`), and returns the
arguments of `Settings`, but for the model's type and what all have.
"""

from __future__ import annotations

from typing import Any

from moe_lab.config.checks import MOST_LAYERS
from moe_lab.models import checkpoint_router as routers
from moe_lab.models.checkpoint_keys import Keys, is_integer, is_number, shown
from moe_lab.models.checkpoint_windows import window, windows

_Part = dict[str, Any]


def granitemoe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Four multipliers."""
    bias = config.flag("attention_bias", default=False)
    own = {
        "qkv_bias": bias,
        "o_bias": bias,
        "embedding_scale": _multiplier(config, "embedding_multiplier"),
        "residual_scale": _multiplier(config, "residual_multiplier"),
        "logits_scale": 1 / _multiplier(config, "logits_scaling"),
        "scale": _multiplier(config, "attention_multiplier"),
    }
    return {"decoder": {**decoder, **moe, **own}, "router": routers.softmax_topk(renormalize=True)}


def _multiplier(config: Keys, key: str) -> float:
    """A factor, 1 if the file does not have it."""
    return float(config.number(key) or 1)


def gpt_oss(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Sinks, a window in every other layer, biases of gate and experts, and a clamped activation."""
    if not config.get("rope_scaling"):
        config.need("rope_parameters")  # without them transformers makes up a YaRN
    bias = config.flag("attention_bias", default=True)
    if (named := config.get("experts_per_token", default=moe["top_k"])) != moe["top_k"]:
        raise config.refuse(
            f"num_experts_per_tok={moe['top_k']} and experts_per_token={shown(named)} contradict each other; remove "
            "one of the two."
        )
    activation = (config.number("swiglu_alpha") or 1.702, config.number("swiglu_limit") or 7.0)
    own = {
        "qkv_bias": bias,
        "o_bias": bias,
        "sinks": True,
        "windows": windows(config, decoder["n_layers"], window(config, default=128)),
        "expert_settings": {"bias": True, "activation": activation, "gate_bias": True},
    }
    return {"decoder": {**decoder, **moe, **own}, "router": routers.softmax_topk(renormalize=True)}


def phimoe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """LayerNorms with biases, a bias of the head, and the sparse mixer.

    With longrope no sequence is longer than the original ones: beyond, what transformers computes is not what was
    published.
    """
    bias, seen = config.flag("attention_bias", default=False), window(config)
    routers.require(config, "num_experts_per_tok", 2)
    rivals = config.get("router_jitter_noise", default=0.01)
    if not is_number(rivals) or not 0 <= rivals <= 1:
        raise config.refuse(
            f"router_jitter_noise={shown(rivals)} must be a number from 0 to 1; download the file again."
        )
    config.get("input_jitter_noise")  # of training
    longest, scaling, pairs = config.size("max_position_embeddings"), decoder["rope_scaling"], decoder["head_dim"] // 2
    if scaling is not None and scaling["rope_type"] == "longrope":
        if len(scaling["short_factor"]) != pairs:
            raise config.refuse(
                f"short_factor has {len(scaling['short_factor'])} numbers instead of {pairs}, one per pair of "
                "dimensions of a head; download the file again."
            )
        longest = min(longest, scaling["original_max_position_embeddings"])
    own = {
        "qkv_bias": bias,
        "o_bias": bias,
        "norm": "layer",
        "head_bias": config.flag("lm_head_bias", default=False),
        "windows": [seen] * decoder["n_layers"],
    }
    router = {"_target_": "moe_lab.routers.sparse_mixer.SparseMixer", "jitter_eps": float(rivals)}
    return {"decoder": {**decoder, **moe, **own}, "router": router, "max_positions": longest}


def ernie4_5_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """A softmax with a selection bias, shared experts, and RoPE of neighbouring dimensions."""
    for key, value in (("use_bias", False), ("moe_gate", "topk"), ("moe_use_aux_free", True)):
        routers.require(config, key, value)
    config.get("moe_capacity")  # of training: no token is dropped
    if (least := config.number("moe_norm_min") or 1e-12) > 1e-9:
        raise config.refuse(
            f"moe_norm_min={least:g} is not supported; weights are divided by their sum, whatever it is."
        )
    first, interval = (config.size(f"moe_layer_{key}", default=1, least=0) for key in ("start_index", "interval"))
    last = config.get("moe_layer_end_index", default=-1)
    if not is_integer(last) or last < -1 or interval < 1:
        raise config.refuse(
            f"moe_layer_end_index={shown(last)} must be the number of a layer or -1, and moe_layer_interval={interval} "
            "at least 1; download the file again."
        )
    layers = range(decoder["n_layers"])
    sparse = {i for i in layers if (i + 1) % interval == 0 and i >= first and (last == -1 or i <= last)}
    n_shared = config.size("moe_num_shared_experts", default=2, least=0)
    own = {
        "tie_embeddings": config.flag("tie_word_embeddings", default=True),
        "dense_hidden_dim": config.size("intermediate_size"),
        "shared_expert_hidden_dim": n_shared * moe["mlp_hidden_dim"],
    }
    return {
        "decoder": {**decoder, **moe, **own},
        "router": routers.scored(score="softmax", bias=True, renormalize=True),
        "dense_layers": frozenset(layers) - sparse,
        "interleaved": True,
        "extra_layers": config.size("num_nextn_predict_layers", default=0, least=0, most=MOST_LAYERS),
    }


def ernie_top_k(config: Keys) -> int:
    """How many experts a token has."""
    return config.size("moe_k", "num_experts_per_tok")


def hunyuan_v1_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Norms of queries and keys after the rotation, and a shared expert as wide as the others."""
    bias, width = config.flag("attention_bias", default=False), moe["mlp_hidden_dim"]
    for name, only in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if config.get(name) is not None and _of_all_layers(config, name) != only:
            raise config.refuse(f"{name}={shown(config.get(name))} is not supported; supported: {only}.")
    for key, value in (("use_qk_norm", True), ("use_cla", False), ("moe_layer_num_skipped", 0), ("norm_type", "rms")):
        routers.require(config, key, value)
    scaling = decoder["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "dynamic" and decoder["head_dim"] < 4:
        raise config.refuse(f"head_dim={decoder['head_dim']} must be at least 4 with rope_type=dynamic.")
    own = {"shared_expert_hidden_dim": width, "qk_norm": "head", "turn_first": True, "qkv_bias": bias, "o_bias": bias}
    return {"decoder": {**decoder, **moe, **own}, "router": routers.softmax_topk(renormalize=True)}


def hunyuan_top_k(config: Keys) -> int:
    """How many experts a token has, in every layer."""
    return _of_all_layers(config, "moe_topk", "num_experts_per_tok")


def _of_all_layers(config: Keys, *names: str) -> int:
    """A size, once or once for each layer, which must be the same."""
    value = config.need(*names)
    values = value if isinstance(value, list) else [value]
    if not values or any(not is_integer(each) or each != values[0] or each < 1 for each in values):
        raise config.refuse(f"{names[0]}={shown(value)} must be one integer >= 1, the same in all layers.")
    return int(values[0])


def lfm2_moe(config: Keys, decoder: _Part, moe: _Part) -> _Part:
    """Short convolutions in place of attention in most layers. Its router adds 1e-6 to the sum of weights, ours not."""
    n_layers, kinds = decoder["n_layers"], config.need("layer_types")
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= {"conv", "full_attention"}:
        raise config.refuse(f"layer_types={shown(kinds)} must have conv or full_attention per layer ({n_layers}).")
    conv = {"kind": "short_conv", "width": config.size("conv_L_cache", default=3)}
    conv["bias"] = config.flag("conv_bias", default=False)
    n_dense = config.size("num_dense_layers", default=2, least=0)
    own = {
        "qk_norm": "head",
        "mixers": [conv if kind == "conv" else None for kind in kinds],
        "dense_hidden_dim": config.size("intermediate_size"),
        "tie_embeddings": config.flag("tie_embedding", default=config.flag("tie_word_embeddings", default=True)),
    }
    router = routers.scored(
        score="sigmoid",
        bias=config.flag("use_expert_bias", default=True),
        renormalize=config.flag("norm_topk_prob", default=True),
        scale=float(config.number("routed_scaling_factor") or 1.0),
    )
    dense = frozenset(range(min(n_dense, n_layers)))
    return {"decoder": {**decoder, **moe, **own}, "router": router, "dense_layers": dense}
