"""What a config.json says of its router, as a node of `SoftmaxTopK` or `ScoredTopK`."""

from __future__ import annotations

from typing import Any

from moe_lab.models.checkpoint_keys import Keys, shown

_TARGET = "moe_lab.routers.scored_topk.ScoredTopK"


def softmax_topk(renormalize: bool) -> dict[str, Any]:
    """The node of `SoftmaxTopK`."""
    return {"_target_": "moe_lab.routers.softmax_topk.SoftmaxTopK", "renormalize": renormalize, "gate_bias": False}


def scored(
    *,
    score: str,
    bias: bool,
    renormalize: bool,
    groups: tuple[int, int] = (1, 1),
    group_score: str = "top2",
    scale: float = 1.0,
) -> dict[str, Any]:
    """The node; `groups`: how many there are, and of how many experts may be chosen."""
    return {
        "_target_": _TARGET,
        "score": score,
        "bias": bias,
        "n_groups": groups[0],
        "top_groups": groups[1],
        "group_score": group_score,
        "renormalize": renormalize,
        "scale": scale,
        "scales_input": False,
        "hash_layers": 0,
    }


def sigmoid_with_bias(config: Keys, n_experts: int, top_k: int) -> dict[str, Any]:
    """Of DeepSeek-V3 and those that took its router over."""
    if config.get("scoring_func") != "noaux_tc":  # so dots.llm1 calls it
        require(config, "scoring_func", "sigmoid")
    require(config, "topk_method", "noaux_tc")
    config.need("norm_topk_prob")
    return scored(
        score="sigmoid",
        bias=True,
        renormalize=config.flag("norm_topk_prob", default=True),
        groups=_groups(config, n_experts, top_k),
        scale=_scale(config),
    )


def softmax_in_groups(config: Keys, n_experts: int, top_k: int) -> dict[str, Any]:
    """Of DeepSeek-V2; under `greedy` the keys of groups have no effect."""
    require(config, "scoring_func", "softmax")
    require(config, "norm_topk_prob", False)  # which transformers does not read here, and the published code does
    method = config.get("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.refuse(f"topk_method={shown(method)} is not supported; supported: greedy, group_limited_greedy.")
    for key in ("n_group", "topk_group"):
        config.get(key)
    groups = (1, 1) if method == "greedy" else _groups(config, n_experts, top_k)
    return scored(
        score="softmax", bias=False, renormalize=False, groups=groups, group_score="max", scale=_scale(config)
    )


def softmax_in_summed_groups(config: Keys, n_experts: int, top_k: int) -> dict[str, Any]:
    """Of Mistral 4."""
    return scored(
        score="softmax",
        bias=False,
        renormalize=config.flag("norm_topk_prob", default=True),
        groups=_groups(config, n_experts, top_k),
        scale=_scale(config),
    )


def require(config: Keys, key: str, value: Any) -> None:
    """Raise `ValueError` if the file has this key with another value."""
    if (found := config.get(key, default=value)) != value or type(found) is not type(value):
        raise config.refuse(f"{key}={shown(found)} is not supported; supported: {shown(value)}.")


def _scale(config: Keys) -> float:
    return float(config.number("routed_scaling_factor") or config.need("routed_scaling_factor"))


def _groups(config: Keys, n_experts: int, top_k: int) -> tuple[int, int]:
    n_groups, top_groups = config.size("n_group"), config.size("topk_group")
    if n_experts % n_groups or top_groups > n_groups or top_groups * (n_experts // n_groups) < top_k:
        raise config.refuse(
            f"n_group={n_groups} and topk_group={top_groups} do not fit {n_experts} experts of which {top_k} are "
            "chosen; download the file again."
        )
    return n_groups, top_groups
