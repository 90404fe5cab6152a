"""What a config.json says of attention windows: how many tokens a token sees, itself included, in which layers."""

from __future__ import annotations

from moe_lab.models.checkpoint_keys import Keys, shown

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def window(config: Keys, default: int | None = None) -> int | None:
    """How many tokens a token of a sliding layer sees; None: all before it."""
    if "sliding_window" not in config.content:
        return default
    return None if config.get("sliding_window") is None else config.size("sliding_window")


def switched_window(config: Keys) -> int | None:
    """Of the Qwen models: as `window`, if `use_sliding_window`."""
    config.get("max_window_layers")  # of Qwen3 it changes nothing
    if config.flag("use_sliding_window", default=False):
        return window(config, default=4096)
    config.get("sliding_window")  # how it would be
    return None


def windows(config: Keys, n_layers: int, window: int | None, below: int | None = None) -> list[int | None]:
    """Layer by layer, as `layer_types` says; without it of every other layer, the first one included, `below` one."""
    slides = [i % 2 == 0 and (below is None or i < below) for i in range(n_layers)]
    return [window if each else None for each in sliding(config, slides)]


def sliding(config: Keys, default: list[bool]) -> list[bool]:
    """Which layers have a window, as `layer_types` says."""
    n_layers, kinds = len(default), config.get("layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= _LAYER_TYPES:
        raise config.refuse(
            f"layer_types={shown(kinds)} must have one of {sorted(_LAYER_TYPES)} per layer ({n_layers})."
        )
    return [kind == "sliding_attention" for kind in kinds]
