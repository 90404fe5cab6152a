"""What may take the place of attention in a layer: modules that mix tokens and keep a state of fixed size."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lab.models.conv_mixer import ConvMixer
from moe_lab.models.gated_delta_net import GatedDeltaNet


def make_mixer(d_model: int, norm_eps: float, *, kind: str, **options: Any) -> nn.Module:
    """The mixer of this kind; `options` are its own.

    Called as attention is: (x [B, S, D], cos, sin, cache or None, position_S or None) -> [B, S, D]; its `make_cache`
    gives a `StateCache`.
    """
    if kind == "short_conv":
        return ConvMixer(d_model, **options)
    assert kind == "delta_net", kind
    return GatedDeltaNet(d_model, norm_eps, **options)
