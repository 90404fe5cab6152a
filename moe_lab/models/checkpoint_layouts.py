"""What a layer's gate and experts are called in the files: one by one or stacked, by the model's type."""

from __future__ import annotations

from typing import NamedTuple

from moe_lab.models.checkpoint_forms import AS_IT_IS, Arranged, Form, Mxfp4


class Layout(NamedTuple):
    """What a layer's gate and experts are called, in one of the layouts that checkpoints have.

    gate: the router's matrix.
    up: gate and up of expert {}, or of all stacked.
    down: of expert {}, or of all stacked.
    up_form, down_form: of stacked ones.
    """

    gate: str
    up: tuple[str, ...]
    down: str
    up_form: Form = AS_IT_IS
    down_form: Form = AS_IT_IS


_IN_ONE = ("mlp.experts.gate_up_proj",)
COMMON = (
    Layout(
        "mlp.gate.weight",
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.{}.down_proj.weight",
    ),
    Layout(
        "block_sparse_moe.gate.weight",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        "block_sparse_moe.experts.{}.w2.weight",
    ),
    Layout("mlp.gate.weight", _IN_ONE, "mlp.experts.down_proj"),
)
LAYOUTS = {
    "granitemoe": (
        Layout(
            "block_sparse_moe.router.layer.weight",
            ("block_sparse_moe.input_linear.weight",),
            "block_sparse_moe.output_linear.weight",
        ),
        Layout(
            "block_sparse_moe.router.weight",
            ("block_sparse_moe.experts.gate_up_proj",),
            "block_sparse_moe.experts.down_proj",
        ),
    ),
    "gemma4_text": (Layout("router.proj.weight", ("experts.gate_up_proj",), "experts.down_proj"),),
    "hunyuan_v1_moe": tuple(layout._replace(gate="mlp.gate.wg.weight") for layout in (COMMON[0], COMMON[2])),
    "phimoe": (COMMON[1], Layout("mlp.router.weight", _IN_ONE, "mlp.experts.down_proj")),
    "gpt_oss": (
        Layout(
            "mlp.router.weight",
            _IN_ONE,
            "mlp.experts.down_proj",
            Arranged(transposed=True, interleaved=True),
            Arranged(transposed=True),
        ),
    ),
    "gpt_oss mxfp4": (
        Layout(
            "mlp.router.weight",
            ("mlp.experts.gate_up_proj_blocks",),
            "mlp.experts.down_proj_blocks",
            Mxfp4(interleaved=True),
            Mxfp4(),
        ),
    ),
}
LAYOUTS["gemma4"] = LAYOUTS["gemma4_text"]
"""Of models whose files have other names than `COMMON`."""
