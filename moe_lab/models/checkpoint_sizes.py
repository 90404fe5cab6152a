"""What a config.json says of the sizes of attention and experts, as arguments of the decoder."""

from __future__ import annotations

from typing import Any

from moe_lab.config.checks import MOST_LAYERS, head_mistake
from moe_lab.models.checkpoint_keys import Keys
from moe_lab.models.checkpoint_rope import read_partial_rope, read_rope

_PLAIN = {"qk_norm": "none", "shared_expert_hidden_dim": 0, "shared_expert_gate": False, "dense_hidden_dim": None}
_MOST_EXPERTS = 100_000


def trunk(config: Keys, theta: float, scaling: dict[str, Any] | None, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """What every decoder has, whatever its attention; `eps`: the key of the norms' epsilon."""
    return {
        "vocab_size": config.size("vocab_size"),
        "d_model": config.size("hidden_size"),
        "n_heads": config.size("num_attention_heads"),
        "n_layers": config.size("num_hidden_layers", most=MOST_LAYERS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": config.number(eps, least=1e-20, most=1) or config.need(eps),
        "tie_embeddings": config.flag("tie_word_embeddings", default=False),
    }


def partial_decoder(config: Keys, *, rope_theta: float, n_kv_heads: int | None, share: float) -> dict[str, Any]:
    """As `decoder_of`, where RoPE turns a part of each head; `share` is the architecture's default."""
    theta, scaling, share = read_partial_rope(config, rope_theta, share)
    decoder = _grouped(config, trunk(config, theta, scaling), n_kv_heads)
    rotary_dim = int(decoder["head_dim"] * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise config.refuse(
            f"partial_rotary_factor={share:g} turns {rotary_dim} of the {decoder['head_dim']} dimensions of a head; it "
            "must be an even number."
        )
    return {**decoder, "rotary_dim": rotary_dim}


def decoder_of(config: Keys, *, rope_theta: float, n_kv_heads: int | None, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """A decoder with grouped-query attention; `rope_theta` and `n_kv_heads` are the architecture's defaults."""
    return _grouped(config, trunk(config, *read_rope(config, rope_theta), eps), n_kv_heads)


def _grouped(config: Keys, trunk: dict[str, Any], n_kv_heads: int | None) -> dict[str, Any]:
    d_model, n_heads = trunk["d_model"], trunk["n_heads"]
    if n_kv_heads is None or "num_key_value_heads" in config.content:  # null: as many as there are heads
        n_kv_heads = n_heads
    head_dim = None if config.get("head_dim") is None else config.size("head_dim")
    n_kv_heads = config.size("num_key_value_heads", default=n_kv_heads)
    names = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    if mistake := head_mistake(d_model, n_heads, n_kv_heads, head_dim, lambda key: names.get(key, key)):
        raise config.refuse(mistake)
    return {**trunk, "n_kv_heads": n_kv_heads, "head_dim": head_dim or d_model // n_heads}


def experts_of(config: Keys, hidden_dim: int, top_k: int | None = None) -> dict[str, Any]:
    """The routed experts, of which each is `hidden_dim` wide; what only some architectures have is `_PLAIN`."""
    n_experts = config.size(
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", most=_MOST_EXPERTS
    )
    top_k = top_k or config.size("num_experts_per_tok")
    if top_k > n_experts:
        names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
        key = next(name for name in names if config.content.get(name) is not None)
        raise config.refuse(f"{key}={top_k} is more than the {n_experts} experts; download the file again.")
    return {"mlp_hidden_dim": hidden_dim, "n_experts": n_experts, "top_k": top_k, **_PLAIN}
