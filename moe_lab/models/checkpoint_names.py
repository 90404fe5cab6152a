"""What the tensors of a Hugging Face checkpoint are called, and where each belongs in our parameters.

Which layout a checkpoint has is read off its keys: experts one by one (`experts.3.up_proj`, or Mixtral's w1, w2, w3) or
stacked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.shared.mlp.down.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared.gate.weight": "mlp.shared_expert_gate.weight",
}
WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_GATE_UP = {"mlp.gate_up.weight": "mlp", "mlp.shared.mlp.gate_up.weight": "mlp.shared_expert"}
_EXPERTS = (  # the MoE block, and how it calls gate, up and down of one expert
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ("block_sparse_moe", ("w1", "w3", "w2")),
)


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
        block = f"{prefix}.{_GATE_UP[rest]}"
        return [[Source(f"{block}.gate_proj.weight", (gate,)), Source(f"{block}.up_proj.weight", (up,))]]
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
