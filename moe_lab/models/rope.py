"""Rotary positions (RoPE: Su et al., 2104.09864) and how their frequencies are stretched for longer contexts.

Dimension i is turned together with i + head_dim/2, by the angle position * f_i, f_i = theta^(-2i / rotary_dim), i <
rotary_dim/2; the other dimensions of a head stay as they are (partial RoPE), by an angle of 0. `scaling` changes the
frequencies; its keys are those that checkpoints have:

    linear  f_i / factor                                                             (Chen et al., 2306.15595)
    llama3  slow dimensions are divided by `factor`, fast ones kept, between them a ramp over the number of turns in the
            original context                                                         (Llama 3, 2407.21783)
    yarn    the same with a ramp over i, and cos and sin grow by 0.1 ln(factor) + 1  (Peng et al., 2309.00071)
    dynamic with a fixed alpha: theta * alpha^(d / (d - 2)) in place of theta        (NTK-aware; HunYuan)
    proportional  the dimensions that turn do so as if all turned, theta^(-2i / head_dim), divided by `factor` (Gemma 4)
    longrope  f_i / short_factor_i, and cos and sin grow by short_mscale: up to the original length of the context, and
            no longer sequence is computed                                           (LongRoPE, 2402.13753; Phi-3.5)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frequencies(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[Tensor, float]:
    """(f [rotary_dim / 2] fp32 on the CPU, what cos and sin are multiplied by)."""
    kind = "default" if scaling is None else scaling["rope_type"]
    width = rotary_dim if scaling is None or kind != "proportional" else scaling["head_dim"]
    f = theta ** (-torch.arange(0, rotary_dim, 2, device="cpu", dtype=torch.float32) / width)
    if scaling is None or kind == "default":
        return f, 1.0
    if kind in ("linear", "proportional"):
        return f / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(f, scaling), 1.0
    if kind == "dynamic":
        stretched = theta * scaling["alpha"] ** (rotary_dim / (rotary_dim - 2))
        return frequencies(rotary_dim, stretched)
    if kind == "longrope":
        return f / torch.tensor(scaling["short_factor"], device="cpu"), scaling["short_mscale"]
    assert kind == "yarn", kind
    return _yarn(f, rotary_dim, theta, scaling)


def _llama3(f: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = f / scaling["factor"]
    return kept * f + (1 - kept) * slowed


def _yarn(f: Tensor, rotary_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension_of(turns: float) -> float:
        """The dimension that makes so many turns in the original context."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, device="cpu", dtype=torch.float32) - low) / (high - low or 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return kept * f + (1 - kept) * f / factor, _yarn_attention_factor(factor, scaling)


def softmax_scale(scaling: Mapping[str, Any] | None) -> float:
    """What latent attention scales the softmax by, beside 1/sqrt(d): the square of YaRN's growth by mscale_all_dim."""
    by = scaling.get("mscale_all_dim") if scaling is not None else None
    return _yarn_growth(scaling["factor"], by) ** 2 if scaling is not None and by else 1.0


def _yarn_growth(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _yarn_growth(factor, scaling["mscale"]) / _yarn_growth(factor, scaling["mscale_all_dim"])
    return _yarn_growth(factor, 1.0)


def rope_tables(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [length, head_dim] in fp32 for positions 0 .. length-1; without `rotary_dim` all dimensions turn."""
    f, grown = frequencies(rotary_dim or head_dim, theta, scaling)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(positions, f.to(device))
    still = (0, head_dim // 2 - len(f))
    cos, sin = F.pad(angle.cos() * grown, still, value=1.0), F.pad(angle.sin() * grown, still)
    return cos.repeat(1, 2), sin.repeat(1, 2)


class Rope(nn.Module):
    """The tables of a model, which `reserve` keeps so that a pass need not compute them."""

    tables_2Nd: Tensor | None

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: Mapping[str, Any] | None = None,
        rotary_dim: int | None = None,
    ):
        super().__init__()
        self.head_dim, self.theta, self.scaling, self.rotary_dim = head_dim, theta, scaling, rotary_dim
        self.register_buffer("tables_2Nd", None, persistent=False)

    def reserve(self, length: int, device: torch.device) -> None:
        """Keep the tables of the first `length` positions."""
        self.tables_2Nd = torch.stack(self._tables(length, device))

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) [length, head_dim]; what was not reserved is computed."""
        if self.tables_2Nd is None or self.tables_2Nd.shape[1] < length:
            return self._tables(length, device)
        return self.tables_2Nd[0, :length], self.tables_2Nd[1, :length]

    def at(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [S, head_dim] of these positions, which must be reserved."""
        assert self.tables_2Nd is not None
        cos_Sd, sin_Sd = self.tables_2Nd.index_select(1, position_S)  # one kernel for both
        return cos_Sd, sin_Sd

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_tables(length, self.head_dim, self.theta, device, self.scaling, self.rotary_dim)


class Ropes(nn.ModuleList):
    """The tables of each layer; layers that turn alike share theirs."""

    def __init__(self, layers: Sequence[Sequence[Any]]):
        """`layers`: for each the arguments of its `Rope`."""
        different = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
        super().__init__(Rope(*layer) for layer in different)
        self.of_layer = [different.index(layer) for layer in layers]

    def reserve(self, length: int, device: torch.device) -> None:
        """See `Rope.reserve`."""
        for rope in self._ropes():
            rope.reserve(length, device)

    def tables(
        self, length: int, device: torch.device, position_S: Tensor | None, start: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """(cos, sin) [S, head_dim] for each layer: of `length` positions from `start` on, or of these (`Rope.at`)."""
        tables = [rope(start + length, device) if position_S is None else rope.at(position_S) for rope in self._ropes()]
        if start:
            tables = [(cos[start:], sin[start:]) for cos, sin in tables]
        return [tables[number] for number in self.of_layer]

    def _ropes(self) -> list[Rope]:
        return [rope for rope in self if isinstance(rope, Rope)]
