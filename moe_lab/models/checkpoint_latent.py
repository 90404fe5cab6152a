"""What a config.json says of multi-head latent attention, as arguments of the decoder."""

from __future__ import annotations

from typing import Any

from moe_lab.models.checkpoint_keys import Keys, shown
from moe_lab.models.checkpoint_rope import read_partial_rope, read_rope


def read_turned(config: Keys, *, whole_head: bool) -> tuple[float, dict[str, Any] | None]:
    """As `read_rope`; `whole_head`: the file says that it turns a part of a head, where others say all of that part."""
    if not whole_head:
        return read_rope(config, 1e4)
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    theta, scaling, share = read_partial_rope(config, 1e4, rope / (nope + rope))
    if round(share * (nope + rope)) != rope:
        raise config.refuse(
            f"partial_rotary_factor={share:g} must be qk_rope_head_dim={rope} of the {nope + rope} dimensions of a "
            "head; remove it."
        )
    return theta, scaling


def read_latent(config: Keys, n_heads: int, *, whole_head: bool) -> dict[str, Any]:
    """`head_dim`, `n_kv_heads` and `latent`; `whole_head`: the file's `head_dim` is of what is turned and what is not.

    Raises:
        ValueError: what is missing or contradicts itself.
    """
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    if rope % 2:
        raise config.refuse(f"qk_rope_head_dim={rope} must be even; download the file again.")
    for key, meant in (
        ("head_dim", nope + rope if whole_head else rope),
        ("qk_head_dim", nope + rope),
        ("num_key_value_heads", n_heads),
    ):
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
