"""Verified after the timing, too: what was timed is what was verified, and has written into nothing that it was given.

same    the same pass again: its experts are those of the verified pass, and its output has the same bits or is verified
        anew (kernels that add in no fixed order round otherwise each time).
other   a pass over other values in the same memory: an output that does not change with them must be right for them,
        else it comes from a memory of earlier calls. Of decoding each step has other values, and each was verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import MismatchError
from moe_lab.models import Output
from moe_lab.models.serving import Decode
from moe_lab.runs.built import Built

WHERE = "timing"
_MOST_CHANGED = 0.01  # share of the tokens that may use other experts: near-ties, where kernels add in no fixed order
_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class Given:
    """What a run was given, before its first pass: a copy of the input, and the sum of its parameters' bits."""

    x: Tensor
    parameters: int

    @classmethod
    def of(cls, built: Built) -> Given:
        # On the CPU: the copy is not to be in the peak of the device's memory.
        return cls(built.x.to("cpu", copy=True), bits_of_parameters(built.model))


@dataclass(frozen=True)
class Pass:
    """A pass: the bits of its output, and the experts that each token used in each layer."""

    y: int
    ids: tuple[Tensor, ...]

    @classmethod
    def of(cls, output: Output) -> Pass:
        return cls(bits(output.y), tuple(routing.expert_ids_TK.sort(-1).values for routing in output.routings))

    def changed(self, other: Pass) -> tuple[int, int]:
        """(tokens that use other experts in `other`, of all): the worst layer's."""
        pairs = list(zip(self.ids, other.ids, strict=True))
        counts = [len(a) if a.shape != b.shape else int((a != b).any(-1).sum()) for a, b in pairs]
        return max(zip(counts, map(len, self.ids), strict=True), default=(0, 0))

    def equals(self, other: Pass) -> bool:
        return self.y == other.y and self.changed(other)[0] == 0


@torch.inference_mode()
def require_the_same(built: Built, given: Given, verified: Pass, verify: Callable[[], Any]) -> None:
    """See above; `verify` compares the run's step on its present input with the reference.

    Raises:
        MismatchError: what was timed is something else, or has changed what it was given.
    """
    _require_unchanged(built, given)
    if not isinstance(built.task, Decode):
        other = given.x.flip(tuple(range(given.x.dim())))
        if not torch.equal(other, given.x):
            built.x.copy_(other)
            if Pass.of(first_output(built)).y == verified.y:
                verify()
            built.x.copy_(given.x)
    again = Pass.of(first_output(built))
    changed, n = verified.changed(again)
    if changed > 1 + _MOST_CHANGED * n:
        raise MismatchError(
            WHERE, f"after the timing {changed} of {n} tokens use other experts than when the run was verified"
        )
    if not again.equals(verified):
        verify()
    _require_unchanged(built, given)


def first_output(built: Built) -> Output:
    """Of a pass, or of the first step of decoding."""
    return next(iter(built.outputs(1)))


def _require_unchanged(built: Built, given: Given) -> None:
    if not torch.equal(built.x.cpu().view(torch.uint8), given.x.view(torch.uint8)):
        raise MismatchError(WHERE, "the run has written into its input; a pass must leave what it is given as it was")
    if bits_of_parameters(built.model) != given.parameters:
        raise MismatchError(WHERE, "the run has written into its parameters; a pass must leave them as they were")


def bits(tensor: Tensor) -> int:
    """A number that changes with any element and with their order."""
    words, total = _words(tensor), 0
    for piece in words.split(_AT_ONCE):
        place = torch.arange(1, len(piece) + 1, device=piece.device)
        total = (31 * total + int((piece.long() * place).sum())) % (1 << 64)
    return total


def bits_of_parameters(model: nn.Module) -> int:
    """The sum of all parameters' words; of large models the order would take long."""
    sums = [_words(parameter).sum(dtype=torch.int64) for parameter in model.parameters()]
    return int(torch.stack(sums).sum()) if sums else 0


def _words(tensor: Tensor) -> Tensor:
    """[n]: its memory as whole numbers, of 8 bytes where they fit."""
    if not tensor.numel():  # an empty view may have strides that no other dtype has
        return torch.empty(0, dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().contiguous().flatten()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if flat.numel() * flat.element_size() % dtype.itemsize == 0 and flat.data_ptr() % dtype.itemsize == 0:
            return flat.view(torch.uint8).view(dtype)
    return flat.view(torch.uint8)
