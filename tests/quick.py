"""Overrides of a run of each model that takes milliseconds, for tests that go through the command line or `run`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

import moe_lab

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY_OLMOE, TEXTS = ASSETS / "tiny-olmoe", ASSETS / "text"
_SHORT = ("measure.max_time_s=0.02", "measure.warmup_s=0", "measure.roofline=false")
_DECODER = ("model.vocab_size=97", "model.d_model=32", "model.n_heads=4", "model.n_layers=2", "model.mlp_hidden_dim=24")
MODELS = {
    "minimal": ("model=minimal", "model.hidden=37", "batch=2"),
    "transformer_decoder": ("model=transformer_decoder", *_DECODER, "batch=2", "seq_len=7"),
    "decoder_moe": ("model=decoder_moe", *_DECODER, "model.n_experts=5", "model.top_k=2", "batch=2", "seq_len=7"),
    "moe_layer": (
        "model=moe_layer",
        "model.shape.n_experts=5",
        "model.shape.d_model=32",
        "model.shape.mlp_hidden_dim=24",
        "batch=2",
        "seq_len=7",
    ),
    "checkpoint": (
        "model=checkpoint",
        f"model.path={TINY_OLMOE}",
        "router=native",
        "workload=text",
        f"workload.path={TEXTS}",
        "measure.quality_tokens=64",
        "batch=2",
        "seq_len=16",
    ),
}
RELATED = {
    "mixtral",
    "granite",
    "qwen3_moe",
    "switch",
    "olmoe",
    "deepseek_v2",
    "deepseek_v4",
    "minimax_m2",
    "ernie4_5",
    "min_p",
    "expert_skip",
    "quantile",
    "token_rounding",
    "xshare",
    "moe_spec",
    "triton",
}
"""Routers that share their code with others: runs of them are left to the slow tests."""


def overrides(model: str, *more: str, device: str = "cpu") -> list[str]:
    """The overrides of a quick run of `model`; what `more` gives replaces what stands here, and before it in `more`.

    With another option of a group go the keys of the one that stands here.
    """
    given = {text.split("=", 1)[0]: text for text in more}
    keys = {text: text.split("=", 1)[0] for text in (*MODELS[model], f"device={device}", *_SHORT)}
    start = [text for text, key in keys.items() if not {key, key.split(".")[0]} & given.keys()]
    return [*start, *given.values()]


def compose(model: str, *more: str, device: str = "cpu") -> DictConfig:
    """The composed configuration of a quick run of `model`."""
    return moe_lab.compose(overrides(model, *more, device=device))
