"""What the tensors of a Hugging Face checkpoint are called, and where each belongs in our parameters.

Which layout a checkpoint has is read off its keys: experts one by one (`experts.3.up_proj`, or Mixtral's w1, w2, w3) or
stacked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
_ATTENTION |= {"q_down": "q_a_proj", "q_down_norm": "q_a_layernorm", "q_up": "q_b_proj"}
_ATTENTION |= {"kv_down": "kv_a_proj_with_mqa", "kv_down_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.shared.gate.weight": "mlp.shared_expert_gate.weight",
}
WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_SHARED = ("mlp.shared_expert", "mlp.shared_experts")
_GATE_UP = {"mlp.gate_up.weight": ("mlp",), "mlp.shared.mlp.gate_up.weight": _SHARED}
_BIAS = ("mlp.gate", "block_sparse_moe", "mlp", "mlp.moe_statics")
"""What has the `e_score_correction_bias` of a router."""
_EXPERTS = (  # the MoE block, and how it calls gate, up and down of one expert
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ("block_sparse_moe", ("w1", "w3", "w2")),
)


BIAS = "e_score_correction_bias"


class Source(NamedTuple):
    """The tensor `key` of the checkpoint belongs into `parameter[place]`."""

    key: str
    place: tuple[Any, ...] = ()


def sources(name: str, shape: Sequence[int]) -> list[list[Source]]:
    """For each known layout, the checkpoint tensors that make up our parameter `name`."""
    if name in WHOLE:
        return [[Source(WHOLE[name])]]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        return []
    prefix, rest = f"model.layers.{match[1]}", match[2]
    if rest in _LAYER:
        return [[Source(f"{prefix}.{_LAYER[rest]}")]]
    if rest.startswith("attention."):
        _, part, kind = rest.split(".")
        return [[Source(f"{prefix}.self_attn.{_ATTENTION[part]}.{kind}")]]
    if rest in _GATE_UP:
        half = shape[0] // 2
        gate, up = slice(0, half), slice(half, None)
        blocks = [f"{prefix}.{block}" for block in _GATE_UP[rest]]
        return [
            [Source(f"{block}.gate_proj.weight", (gate,)), Source(f"{block}.up_proj.weight", (up,))] for block in blocks
        ]
    if rest == "mlp.shared.mlp.down.weight":
        return [[Source(f"{prefix}.{block}.down_proj.weight")] for block in _SHARED]
    if rest in ("mlp.router.bias_E", "mlp.router.inner.bias_E"):
        return [[Source(f"{prefix}.{block}.{BIAS}")] for block in _BIAS]
    return _expert_sources(rest, prefix, shape)


def _expert_sources(rest: str, prefix: str, shape: Sequence[int]) -> list[list[Source]]:
    if rest == "mlp.weights.gate_ED":
        return [[Source(f"{prefix}.{block}.gate.weight")] for block, _ in _EXPERTS]
    experts = range(shape[0])
    if rest == "mlp.weights.w_gate_up_E2FD":
        gate, up = slice(0, shape[1] // 2), slice(shape[1] // 2, None)
        return [
            *(
                [
                    Source(f"{prefix}.{block}.experts.{expert}.{name}.weight", (expert, half))
                    for expert in experts
                    for name, half in ((names[0], gate), (names[1], up))
                ]
                for block, names in _EXPERTS
            ),
            [Source(f"{prefix}.mlp.experts.gate_up_proj")],
        ]
    if rest == "mlp.weights.w_down_EDF":
        return [
            *(
                [Source(f"{prefix}.{block}.experts.{expert}.{names[2]}.weight", (expert,)) for expert in experts]
                for block, names in _EXPERTS
            ),
            [Source(f"{prefix}.mlp.experts.down_proj")],
        ]
    return []


def is_unused(key: str, n_layers: int, extra_layers: int, has_bias: bool) -> bool:
    """Whether a model may leave this tensor in the file.

    Args:
        extra_layers: after the `n_layers`: they predict further tokens (MTP), and the logits do not depend on them.
        has_bias: whether routers have a bias, which one that was swapped in does not read.
    """
    if key.endswith("rotary_emb.inv_freq"):  # computed anew
        return True
    match = re.match(r"model\.layers\.(\d{1,9})\.", key)
    if match is None:
        return False
    return n_layers <= int(match[1]) < n_layers + extra_layers or (has_bias and key.endswith(f".{BIAS}"))
