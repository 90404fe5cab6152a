"""The passes of a configuration: how many tokens each has, and what that means for routes and attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from moe_lab.models.attention import Attention
from moe_lab.models.attention_backend import backend_of
from moe_lab.models.latent_attention import LatentAttention
from moe_lab.models.serving import chunks
from moe_lab.records.identity import option_name
from moe_lab.routers.base import Router


def n_tokens(cfg: Any) -> int:
    """Tokens of one iteration of this configuration; of decoding, `workload.window` of each sequence."""
    is_one, decodes = "seq_len" in cfg.model.get("ignores", ()), cfg.workload.get("phase") == "decode"
    per_sequence = 1 if is_one else cfg.workload.get("window", 1) if decodes else cfg.seq_len
    return int(cfg.batch * per_sequence)


def tokens_at_once(cfg: Any) -> list[int]:
    """How many a layer is given: those of one iteration; of a prefill in chunks those of a chunk, and of a shorter one.

    Each number once, in the order of the passes.
    """
    if cfg.workload.get("phase") != "prefill":
        return [n_tokens(cfg)]
    return list(dict.fromkeys(int(cfg.batch * len(positions)) for positions in prefill_passes(cfg)))


def of_all_passes(ran: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Who computes what in several passes: `a+b` where they differ.

    A part named by only some passes keeps that name.
    """
    by: dict[str, dict[str, None]] = {}
    for of_pass in ran:
        for part, names in of_pass.items():
            by.setdefault(part, {}).update(dict.fromkeys(names.split("+")))
    return {part: "+".join(names) for part, names in by.items()}


def n_positions(cfg: DictConfig) -> int:
    """How long a sequence gets."""
    return int(cfg.seq_len + (cfg.workload.context_len if cfg.workload.get("phase") == "decode" else 0))


def prefill_passes(cfg: Any) -> list[range]:
    """The positions of each pass over many tokens: of a whole pass, of a prefill, or while decoding of the context.

    A forward pass has no chunks: the key may be another cell's of a sweep.
    """
    workload, phase = cfg.workload, cfg.workload.get("phase", "forward")
    length = workload.context_len if phase == "decode" else cfg.seq_len
    return chunks(length, None if phase == "forward" else workload.get("prefill_chunk"))


def chunk_warning(cfg: DictConfig, router: Router) -> str | None:
    """A sentence if its routes depend on how the prefill, or that of the context, is cut into passes."""
    if len(prefill_passes(cfg)) == 1 or (router.causal and router.batch_invariant):
        return None
    return (
        f"router={option_name(cfg.router)} looks at the other tokens of a pass, or does not say; here those of a "
        "chunk, so the routes are not those of a whole prefill"
    )


def attentions_of(model: nn.Module) -> list[Attention | LatentAttention]:
    """Layer by layer."""
    return [module for module in model.modules() if isinstance(module, Attention | LatentAttention)]


def prefill_backends(cfg: DictConfig, model: nn.Module, device: torch.device) -> list[str]:
    """Who computes the attention of `prefill_passes`, of torch's backends; empty if none has that of many tokens.

    Raises:
        UnavailableError: torch cannot compute one by `model.attention`.
    """
    lengths = [(len(tokens), tokens.stop) for tokens in prefill_passes(cfg) if len(tokens) > 1]
    return _backends(attentions_of(model), lengths, device)


def step_backends(cfg: DictConfig, model: nn.Module, device: torch.device) -> list[str]:
    """As `prefill_backends`, of a decoding step; empty if kernels of our own take it, or it has a single token."""
    window = cfg.workload.get("window", 1) if cfg.workload.get("phase") == "decode" else 1
    by_torch = [attention for attention in attentions_of(model) if attention.decoded_by(window) == "torch"]
    return _backends(by_torch, [(window, None)] if window > 1 else [], device)


def _backends(
    attentions: Iterable[Attention | LatentAttention], lengths: Iterable[tuple[int, int | None]], device: torch.device
) -> list[str]:
    calls = {(each.backend, each.call(*length, device)) for each in attentions for length in lengths}
    return sorted({backend_of(*call) for call in calls})
