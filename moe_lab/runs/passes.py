"""The passes of a configuration: how many tokens each has, and what that means for routes and attention."""

from __future__ import annotations

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


def n_tokens_at_once(cfg: Any) -> int:
    """Tokens that a layer is given: those of one iteration, or of a prefill in chunks those of a chunk."""
    if cfg.workload.get("phase") != "prefill":
        return n_tokens(cfg)
    return int(cfg.batch * len(prefill_passes(cfg)[0]))


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


def attention_backends(cfg: DictConfig, model: nn.Module, device: torch.device) -> list[str]:
    """Who computes the attention of these passes, of torch's backends; empty if no pass has attention of many tokens.

    Raises:
        UnavailableError: torch cannot compute one by `model.attention`.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention | LatentAttention)]
    calls = {
        (attention.backend, attention.call(len(tokens), tokens.stop, device))
        for attention in attentions
        for tokens in prefill_passes(cfg)
        if len(tokens) > 1
    }
    return sorted({backend_of(*call) for call in calls})
