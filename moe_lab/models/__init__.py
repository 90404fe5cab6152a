"""Models: minimal, transformer_decoder, decoder_moe, moe_layer, router (one alone).

A model is an `nn.Module` with

    input_shape(batch, seq_len)          the shape of its one input
    vocab_size                           for token ids in [0, vocab_size); None where the input is hidden states
    forward(x, forced_routing=None)      -> Output; `forced_routing` is a Routing per MoE layer, used instead of its own

An operation casts its weight to the dtype of its input (nothing happens when they agree), so that the same modules,
fed fp32, are the fp32 reference of a bf16 run; `use_reference()` switches a module to its plain-torch implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:  # a checkpoint's config.json is read without torch
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from moe_lab.routers.base import Router, Routing

ForcedRouting: TypeAlias = "Sequence[Routing] | None"
MakeRouter: TypeAlias = "Callable[[int, int], Router]"
"""(n_experts, top_k) -> a new Router."""


class Output(NamedTuple):
    """What a model computes: its output and the routing of each MoE layer, in order."""

    y: Tensor
    routings: tuple[Routing, ...] = ()
