"""What a config.json says of multi-head latent attention, as arguments of the decoder."""

from __future__ import annotations

from typing import Any

from moe_lab.models.checkpoint_keys import Keys, shown


def read_latent(config: Keys, n_heads: int) -> dict[str, Any]:
    """`head_dim`, `n_kv_heads` and `latent`. Raises `ValueError` for what is missing or contradicts itself."""
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    if rope % 2:
        raise config.refuse(f"qk_rope_head_dim={rope} must be even; download the file again.")
    for key, meant in (("head_dim", rope), ("qk_head_dim", nope + rope), ("num_key_value_heads", n_heads)):
        if (value := config.get(key, default=meant)) != meant:
            raise config.refuse(f"{key}={shown(value)} must be {meant} in latent attention; remove it.")
    if "q_lora_rank" not in config.content:
        config.need("q_lora_rank")  # null says that queries have no latent, and no key says nothing
    q_rank = None if config.get("q_lora_rank") is None else config.size("q_lora_rank")
    latent = {
        "nope_dim": nope,
        "rope_dim": rope,
        "v_dim": config.size("v_head_dim"),
        "kv_rank": config.size("kv_lora_rank"),
        "q_rank": q_rank,
        "bias": config.flag("attention_bias", default=False),
    }
    return {"head_dim": rope, "n_kv_heads": n_heads, "latent": latent}
