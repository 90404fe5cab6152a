"""What a config.json says of RoPE, as arguments of `models.rope`: read as transformers 5 reads it, or refused.

Versions of transformers wrote it in different places: `rope_theta` and `rope_scaling` (4), `rope_parameters` (5). In a
file that has several of them, `rope_scaling` counts before `rope_parameters` and a base inside before one outside, as
in transformers. What would be dropped by that is refused, if it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lab.models.checkpoint_keys import LARGEST_NUMBER, Keys, is_number, shown

_LEAST = 1e-3  # less than any factor
_LENGTH = "original_max_position_embeddings"
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_READ: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": ("factor", _LENGTH),
    "longrope": (_LENGTH, "short_mscale"),
    "dynamic": ("alpha",),
}
"""The keys that each kind cannot do without."""
_ONLY_OF = {"longrope": "phimoe", "dynamic": "hunyuan_v1_moe"}
"""Kinds that transformers computes in this way for one architecture only."""
_OF_IMAGES = ("mrope_interleaved", "mrope_section")
"""Which dimensions of a picture's patch turn by its place in time, height and width; of a text all three are one."""
_READ_AS_TEXT = {"qwen3_5_moe_text"}
GROWTH = "llama_4_scaling_beta"
"""How fast queries grow with their position, in Mistral's files a key of RoPE."""
_LONG = ("short_factor", "long_factor", "long_mscale")
"""More of longrope; the last two are of sequences that are longer than the original ones, which are not computed."""
_OF_SOME_KIND = {*(key for keys in _READ.values() for key in keys), *_OPTIONAL, "truncate"}
_OF_SOME_KIND |= {
    "partial_rotary_factor",
    "attn_factor",
    "extrapolation_factor",
    "long_factor",
    "long_mscale",
    "mrope_interleaved",
}
_OF_SOME_KIND |= {"mrope_section", "short_factor", "short_mscale"}
"""What some kind of RoPE computes with, ours or another's: none is passed over."""


def read_rope(config: Keys, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None). Raises `ValueError` for what is not supported or contradicts itself."""
    theta, scaling, share = read_partial_rope(config, default_theta, 1.0)
    if share != 1.0:
        raise config.refuse(
            f"partial_rotary_factor={shown(share)} is not supported: RoPE must rotate all dimensions of a head."
        )
    return theta, scaling


def read_partial_rope(
    config: Keys, default_theta: float, default_share: float
) -> tuple[float, dict[str, Any] | None, float]:
    """As `read_rope`, and the share of a head's dimensions that is turned."""
    newer, older = config.part("rope_parameters"), config.part("rope_scaling")
    rope = older if older.content else newer
    kind, theta = _kind(rope, config.get("model_type")), _theta(rope, config, default_theta)
    if older.content and newer.content:
        _require_agreement(newer, {**older.content, "rope_type": kind, "type": kind, "rope_theta": theta})
    share = rope.get("partial_rotary_factor", default=config.get("partial_rotary_factor", default=default_share))
    if not is_number(share) or not 0 < share <= 1:
        raise config.refuse(f"partial_rotary_factor={shown(share)} must be a number > 0 and <= 1.")
    length_beside = config.size(_LENGTH) if config.get(_LENGTH) is not None else None
    scaling = _scaling(rope, kind, config.size("max_position_embeddings"), length_beside)
    if config.get("model_type") in _READ_AS_TEXT:
        for key in _OF_IMAGES:
            rope.get(key)
    if config.get("model_type") == "mistral4" and kind == "yarn":
        scaling[GROWTH] = _number(rope, kind, GROWTH, may_be_0=True)
        rope.get("max_position_embeddings")  # again
    rope.get(_LENGTH)  # how long the texts of the training were; many write it beside any kind
    _require_all_used(rope, kind)
    return theta, None if kind == "default" else scaling, float(share)


def read_rope_of_kind(rope: Keys, head_dim: int) -> dict[str, Any]:
    """RoPE of one kind of layers (Gemma 4), as arguments of the decoder. Raises `ValueError` as `read_rope`."""
    if not rope.content:
        raise rope.refuse(f"there is no {rope.where}; download the file again.")
    kind, rotary_dim = shown(rope.get("rope_type", default="default")), head_dim
    if kind not in ("default", "proportional"):
        raise rope.refuse(f"{rope.where}.rope_type={kind} is not supported; supported: default, proportional.")
    theta, scaling = rope.number("rope_theta", least=1) or rope.need("rope_theta"), None
    if kind == "proportional":
        share = rope.get("partial_rotary_factor", default=1.0)
        if not is_number(share) or not 0 < share <= 1 or (rotary_dim := 2 * int(share * head_dim // 2)) == 0:
            raise rope.refuse(
                f"{rope.where}.partial_rotary_factor={shown(share)} must be a number > 0 and <= 1, and turn at least 2 "
                f"of the {head_dim} dimensions of a head."
            )
        scaling = {"rope_type": kind, "head_dim": head_dim, "factor": _number(rope, kind, "factor", default=1.0)}
    _require_all_used(rope, kind)
    return {"rope_theta": float(theta), "rope_scaling": scaling, "rotary_dim": rotary_dim}


def _require_all_used(rope: Keys, kind: str) -> None:
    """Raise `ValueError` for keys that some other kind computes with."""
    not_used = [key for key in rope.unread() if key.rpartition(".")[2] in _OF_SOME_KIND]
    if not_used:
        raise rope.refuse(f"rope_type={kind} does not use {', '.join(not_used)}; set the rope_type that does.")


def _theta(rope: Keys, config: Keys, default: float) -> float:
    beside = config.number("rope_theta", least=1)
    return float(rope.number("rope_theta", least=1) or beside or default)


def _kind(rope: Keys, model_type: Any) -> str:
    for key, value in rope.content.items():
        if isinstance(value, dict):
            raise rope.refuse(f"{rope.where}.{shown(key)}: RoPE by layer type is not supported.")
    old, new = rope.get("type"), rope.get("rope_type")
    kind = shown(new or old or "default")
    if kind not in _READ or _ONLY_OF.get(kind, model_type) != model_type:
        raise rope.refuse(f"rope_type={kind} is not supported; supported: {', '.join(_READ)}.")
    if new is not None and old not in (None, "default", new):
        raise rope.refuse(f"rope_type={kind} and type={shown(old)} contradict each other; remove one of the two.")
    return kind


def _require_agreement(newer: Keys, meant: Mapping[str, Any]) -> None:
    """`rope_scaling` is what counts, so `rope_parameters` must not say anything else."""
    for key in newer.content:
        value = newer.get(key)
        if value not in (None, meant.get(key)) and (key, value) != ("rope_type", "default"):
            raise newer.refuse(
                f"rope_parameters.{shown(key)}={shown(value)} and rope_scaling contradict each other; remove one of "
                "the two."
            )


def _scaling(rope: Keys, kind: str, longest: int, length_beside: float | None) -> dict[str, Any]:
    """The keys of this kind, checked; lengths that are not said follow from the longest sequence."""
    scaling: dict[str, Any] = {"rope_type": kind}
    if _LENGTH in _READ[kind]:
        scaling[_LENGTH] = length_beside or rope.size(_LENGTH, default=longest)
    for key in [key for key in _READ[kind] if key != _LENGTH]:
        implied = longest / scaling[_LENGTH] if key == "factor" and kind == "yarn" else None
        scaling[key] = _number(rope, kind, key, default=implied)
    if kind == "longrope":
        scaling["short_factor"] = rope.get("short_factor")
        for key in _LONG:
            _require_factors(rope, key)
    if kind == "dynamic":  # with an alpha it computes nothing of these
        for key in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            rope.get(key)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise rope.refuse("rope_type=llama3: high_freq_factor must be more than low_freq_factor.")
    if kind == "yarn":
        present = [key for key in _OPTIONAL if rope.get(key) is not None]
        scaling |= {key: _number(rope, kind, key, may_be_0=key != "attention_factor") for key in present}
        if rope.get("truncate") is not None:
            scaling["truncate"] = rope.flag("truncate", default=True)
    return scaling


def _require_factors(rope: Keys, key: str) -> None:
    """Of longrope: a number for each pair of dimensions; `frequencies` needs as many as there are."""
    values = rope.get(key)
    numbers = [values] if key == "long_mscale" else values
    if not isinstance(numbers, list) or not all(
        is_number(each) and _LEAST <= each <= LARGEST_NUMBER for each in numbers
    ):
        raise rope.refuse(
            f"rope_type=longrope: {key}={shown(values)} must be a number >= {_LEAST:g}, or a list of them."
        )


def _number(rope: Keys, kind: str, key: str, *, default: float | None = None, may_be_0: bool = False) -> float:
    value = rope.get(key, default=default)
    least = 0 if may_be_0 else _LEAST
    if not is_number(value) or not least <= value <= LARGEST_NUMBER:
        wanted = f"a number >= {least:g} and <= {LARGEST_NUMBER:g}"
        raise rope.refuse(f"rope_type={kind}: {key}={shown(value)} must be {wanted}.")
    return value  # type: ignore[no-any-return]
