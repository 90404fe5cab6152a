"""What rounding explains in each dtype, and the fp32 products that it is measured against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_lab.models.gated_delta_net import GatedDeltaNet


@dataclass(frozen=True)
class Tolerance:
    """What rounding explains in one dtype; everything beyond is a fault. About twice what correct runs were seen to do.

    `model`, `expert` and `token` bound ||y - reference|| / ||reference||.
    """

    model: float  # of the whole model's output, times the square root of its depth: rounding adds up like a random walk
    expert: float  # of one expert's outputs, before they are weighted and summed; the worst expert
    token: float  # of one token's output of one MoE layer; the worst token
    score: float  # of a selection score, as a share of the token's largest: below it two experts are a near-tie
    weight: float  # absolute, of a routing weight
    logit: float = 0.0  # of a router logit, as a share of the token's median one, where the run's own are not at hand
    cache: float = 0.0  # of a token's keys or values in a layer's cache: `token` times the square root of the depth

    def scale(self, n_outputs: float) -> float:
        """By what share so many outputs of experts may be too large together: rounding is up as often as down.

        Down to what one element may be rounded by, which all of them may have in common.
        """
        return self.expert * max(1 / math.sqrt(max(n_outputs, 1)), 0.25)


TOLERANCES = {
    torch.float32: Tolerance(model=1e-5, expert=1e-5, token=3e-5, score=1e-6, weight=1e-5),
    torch.float16: Tolerance(model=1.5e-3, expert=2e-3, token=4e-3, score=1e-3, weight=2e-3),
    torch.bfloat16: Tolerance(model=1.3e-2, expert=1.5e-2, token=3e-2, score=8e-3, weight=1.6e-2),
}


def tolerance_of(model: nn.Module, dtype: torch.dtype, *, fuses: bool = False) -> Tolerance:
    """The tolerances for `model` in `dtype`; `fuses` as in `verify`."""
    allowed = TOLERANCES[dtype]
    walk = max(len(getattr(model, "layers", ())), 1) ** 0.5
    walk *= _enlargement(model)
    allowed = replace(allowed, model=allowed.model * walk, cache=allowed.token * walk)
    if not fuses:
        return allowed
    # Rounding on the way to the logits is that of the model's output so far; the median is 2/3 of a standard deviation.
    return replace(allowed, logit=3 * allowed.model, weight=allowed.weight + allowed.model)


def _enlargement(model: nn.Module) -> float:
    """By how much a gated delta net enlarges rounding: the more, the narrower its heads.

    Where the output of a head happens to be small its norm enlarges what was rounded; wide heads are hardly ever small.
    """
    widths = [module.value_dim for module in model.modules() if isinstance(module, GatedDeltaNet)]
    return 1 + 32 / min(widths) if widths else 1.0


@contextmanager
def exact_products() -> Iterator[None]:
    """Full fp32 matrix products and convolutions inside: TF32 off. cuDNN's is on by default."""
    before, (switch, name, exact) = torch.get_float32_matmul_precision(), _convolutions()
    before_of_convolutions = getattr(switch, name)
    torch.set_float32_matmul_precision("highest")
    setattr(switch, name, exact)
    try:
        yield
    finally:
        setattr(switch, name, before_of_convolutions)
        torch.set_float32_matmul_precision(before)


def _convolutions() -> tuple[Any, str, Any]:
    """(object, attribute, its value without TF32). torch has two names; the older raises once the newer is set."""
    cudnn: Any = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        return cudnn.conv, "fp32_precision", "ieee"
    return cudnn, "allow_tf32", False
