"""What the tensors of a Hugging Face checkpoint are called, and where each belongs in our parameters.

Which layout a checkpoint has is read off its keys: experts one by one (`experts.3.up_proj`, or Mixtral's w1, w2, w3) or
stacked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_lab.models.checkpoint_forms import AS_IT_IS, Arranged, Form, OnePlus, OneRow, Regrouped, Times
from moe_lab.models.checkpoint_layouts import COMMON, LAYOUTS

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
_ATTENTION |= {"q_down": "q_a_proj", "q_down_norm": "q_a_layernorm", "q_up": "q_b_proj"}
_ATTENTION |= {"kv_down": "kv_a_proj_with_mqa", "kv_down_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.down.weight": "mlp.down_proj.weight",
    "attention.sinks_H": "self_attn.sinks",
    "mlp.shared.gate.weight": "mlp.shared_expert_gate.weight",
    # Of Gemma 4, whose shared expert is the dense MLP of other models:
    "norm_after_attention.weight": "post_attention_layernorm.weight",
    "mlp.shared.norm_before.weight": "pre_feedforward_layernorm.weight",
    "mlp.shared.norm_after.weight": "post_feedforward_layernorm_1.weight",
    "mlp.norms.norm_before.weight": "pre_feedforward_layernorm_2.weight",
    "mlp.norms.norm_after.weight": "post_feedforward_layernorm_2.weight",
    "norm_after_mlp.weight": "post_feedforward_layernorm.weight",
    "mlp.weights.scale_E": "router.per_expert_scale",
    "scale_1": "layer_scalar",
}
WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "norm.bias": "model.norm.bias",
    "head.bias": "lm_head.bias",
}
_DELTA_NET = {
    "conv.weight": "conv1d.weight",
    "norm.weight": "norm.weight",
    "out.weight": "out_proj.weight",
    "a_log_H": "A_log",
    "dt_bias_H": "dt_bias",
}
_CONV = {"into": "in_proj", "conv": "conv", "out": "out_proj"}
_RENAMED: dict[str, dict[str, str]] = {
    "hunyuan_v1_moe": {".q_norm.": ".query_layernorm.", ".k_norm.": ".key_layernorm."},
    "lfm2_moe": {
        ".q_norm.": ".q_layernorm.",
        ".k_norm.": ".k_layernorm.",
        ".o_proj.": ".out_proj.",
        ".input_layernorm.": ".operator_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".mlp.": ".feed_forward.",
        ".gate_proj.": ".w1.",
        ".up_proj.": ".w3.",
        ".down_proj.": ".w2.",
        "model.norm.": "model.embedding_norm.",
    },
}
"""What models whose parts have other names call them."""
_APART = {"qkvz": ("qkv", "z"), "ba": ("b", "a")}
_ZERO_CENTRED = {"qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}
"""Models whose norms multiply by 1 plus the weight; not so the delta net's own."""
_SHARED = ("mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "mlp")
_GATE_UP = {"mlp.gate_up.weight": ("mlp",), "mlp.shared.mlp.gate_up.weight": _SHARED}
BIAS, _HAS_BIAS = "e_score_correction_bias", ("mlp.gate", "block_sparse_moe", "mlp")
"""A router's selection bias, and the modules that may have it."""
_LFM2_BIAS = "expert_bias"


class Naming(NamedTuple):
    """What of a checkpoint decides how its tensors are called.

    model: its type, with what its experts are quantised in if that changes the names.
    prefix: of all keys but the head's.
    groups: of the rows that the files have in groups: the parameter's part and the sizes of a group's parts.
    """

    model: str = ""
    prefix: str = "model"
    groups: Mapping[str, tuple[int, ...]] = MappingProxyType({})


USUAL = Naming()


class Source(NamedTuple):
    """The tensor `key` of the checkpoint belongs into `parameter[place]`; the file holds it in this form."""

    key: str
    place: tuple[Any, ...] = ()
    form: Form = AS_IT_IS


_BIASES = {
    "mlp.weights.gate_bias_E": Source("mlp.router.bias"),
    "mlp.weights.up_bias_E2F": Source("mlp.experts.gate_up_proj_bias", form=Arranged(interleaved=True)),
    "mlp.weights.down_bias_ED": Source("mlp.experts.down_proj_bias"),
}
"""Of gate and experts, in gpt-oss's files of either layout."""


def whole(name: str, naming: Naming) -> str:
    """The key of one of `WHOLE`."""
    key = WHOLE[name]
    return naming.prefix + key.removeprefix("model") if key.startswith("model.") else key


def sources(name: str, shape: Sequence[int], naming: Naming = USUAL) -> list[list[Source]]:
    """For each layout of such a model, the checkpoint tensors that make up our parameter `name`."""
    found = _sources(name, shape, naming)
    for usual, own in _RENAMED.get(naming.model, {}).items():
        found = [[source._replace(key=source.key.replace(usual, own)) for source in layout] for layout in found]
    return found


def _sources(name: str, shape: Sequence[int], naming: Naming) -> list[list[Source]]:
    model = naming.model
    norm = OnePlus() if model in _ZERO_CENTRED else AS_IT_IS
    if name in WHOLE:
        return [[Source(whole(name, naming), form=norm if name == "norm.weight" else AS_IT_IS)]]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        return []
    prefix, rest = f"{naming.prefix}.layers.{match[1]}", match[2]
    if rest in _LAYER:
        return [[Source(f"{prefix}.{_LAYER[rest]}", form=norm if "norm" in rest else AS_IT_IS)]]
    if rest == "mlp.norms.gate_norm.weight":
        return [[Source(f"{prefix}.router.scale", form=Times(shape[0] ** -0.5))]]
    if rest.startswith("attention."):
        part = rest.removeprefix("attention.")
        if model == "lfm2_moe" and part.split(".")[0] in _CONV:
            part, kind = part.split(".")
            return [[Source(f"{prefix}.conv.{_CONV[part]}.{kind}")]]
        if part in _DELTA_NET:
            return [[Source(f"{prefix}.linear_attn.{_DELTA_NET[part]}")]]
        if part in ("qkvz.weight", "ba.weight"):
            return _delta_net_sources(part.removesuffix(".weight"), f"{prefix}.linear_attn", shape, naming)
        part, kind = part.split(".")
        form = Regrouped(naming.groups[part]) if part in naming.groups else norm if "norm" in part else AS_IT_IS
        return [[Source(f"{prefix}.self_attn.{_ATTENTION[part]}.{kind}", form=form)]]
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
        if model == "ernie4_5_moe":
            return [[Source(f"{prefix}.{block}.moe_statics.{BIAS}", form=OneRow())] for block in ("mlp", "mlp.gate")]
        if model == "lfm2_moe":
            return [[Source(f"{prefix}.mlp.{_LFM2_BIAS}")]]
        return [[Source(f"{prefix}.{block}.{BIAS}")] for block in _HAS_BIAS]
    return _expert_sources(rest, prefix, shape, model)


def _delta_net_sources(part: str, prefix: str, shape: Sequence[int], naming: Naming) -> list[list[Source]]:
    """Of Qwen3-Next one matrix, in groups by the heads of queries; of Qwen3.5 two, the last part by itself."""
    sizes = naming.groups[part]
    first = shape[0] // sum(sizes) * sum(sizes[:-1])
    names = _APART[part]
    apart = [
        Source(f"{prefix}.in_proj_{name}.weight", (rows,))
        for name, rows in zip(names, (slice(0, first), slice(first, None)), strict=True)
    ]
    return [[Source(f"{prefix}.in_proj_{part}.weight", form=Regrouped(sizes))], apart]


def _expert_sources(rest: str, prefix: str, shape: Sequence[int], model: str) -> list[list[Source]]:
    layouts = LAYOUTS.get(model, COMMON)
    if rest in _BIASES:
        bias = _BIASES[rest]
        return [[bias._replace(key=f"{prefix}.{bias.key}")]]
    if rest == "mlp.weights.gate_ED":
        return [[Source(f"{prefix}.{layout.gate}")] for layout in layouts]
    if rest == "mlp.weights.w_gate_up_E2FD":
        half = shape[1] // 2
        halves = (slice(0, half), slice(half, None))
        return [_of_experts(prefix, layout.up, shape[0], halves, layout.up_form) for layout in layouts]
    if rest == "mlp.weights.w_down_EDF":
        return [_of_experts(prefix, (layout.down,), shape[0], (), layout.down_form) for layout in layouts]
    return []


def _of_experts(prefix: str, names: Sequence[str], n_experts: int, halves: Sequence[slice], form: Form) -> list[Source]:
    """All experts in one tensor, or one after the other; `halves`: the rows of each of two names."""
    if "{}" not in names[0]:
        return [Source(f"{prefix}.{names[0]}", form=form)]
    parts: list[tuple[slice, ...]] = [(half,) for half in halves] or [()]
    return [
        Source(f"{prefix}.{name.format(expert)}", (expert, *part))
        for expert in range(n_experts)
        for name, part in zip(names, parts, strict=True)
    ]


def layouts(shapes: Mapping[str, Sequence[int]], keys: Container[str], naming: Naming) -> dict[str, list[Source]]:
    """For each parameter the layout that the checkpoint uses; if it has none of its tensors, the most frequent one."""
    possible = {name: sources(name, shape, naming) for name, shape in shapes.items()}
    hits: Counter[tuple[str, int]] = Counter()
    for name, of_one in possible.items():
        for number, layout in enumerate(of_one):
            hits[_block(name), number] += sum(source.key in keys for source in layout)
    chosen = {}
    for name, of_one in possible.items():
        assert of_one, f"no layout for {name}"
        ranks = [
            (sum(source.key in keys for source in layout), hits[_block(name), n], -n) for n, layout in enumerate(of_one)
        ]
        chosen[name] = of_one[-max(ranks)[2]]
    return chosen


def _block(name: str) -> str:
    """The part of a layer whose parameters have the same layouts, as `mlp.weights`."""
    return ".".join(name.split(".")[2:4])


def is_unused(key: str, n_layers: int, extra_layers: int, has_bias: bool, others: tuple[str, ...] = ()) -> bool:
    """Whether a model may leave this tensor in the file.

    Args:
        others: what the keys of other parts begin with, as of one that sees images.
        extra_layers: after the `n_layers`: they predict further tokens (MTP), and the logits do not depend on them.
        has_bias: whether the trained routers have a bias. A router in their place may not read it.
    """
    if key.endswith("rotary_emb.inv_freq"):  # computed anew
        return True
    if extra_layers and key.startswith("model.mtp_"):  # ERNIE's further layers
        return True
    if others and key.startswith(others):
        return True
    match = re.match(r"model\.layers\.(\d{1,9})\.", key)
    if match is None:
        return False
    is_bias = key.endswith((f".{BIAS}", f".{_LFM2_BIAS}"))
    return n_layers <= int(match[1]) < n_layers + extra_layers or (has_bias and is_bias)
