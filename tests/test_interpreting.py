"""interpreting: what is left out of Triton's interpreter changes no result, and a launch that fails leaves no trace."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from moe_lab.ops.library import triton_interprets
from moe_lab.ops.route import route
from moe_lab.ops.selection import Selection
from tests import interpreting

pytestmark = pytest.mark.skipif(not triton_interprets(), reason="Triton compiles for the GPU")


@triton.jit
def _doubled(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit  # type: ignore[untyped-decorator]
def _sums(x_ptr, y_ptr, N: tl.constexpr, IS_WRONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row; a device function is called twice."""
    row = tl.program_id(0)
    x = _doubled(_doubled(tl.load(x_ptr + row * N + tl.arange(0, N))))
    if IS_WRONG:
        tl.no_such_function(x)
    tl.store(y_ptr + row, tl.sum(x, 0))


def sums(x_TN: Tensor, is_wrong: bool = False) -> Tensor:
    y_T = x_TN.new_empty(len(x_TN))
    _sums[(len(x_TN),)](x_TN, y_T, x_TN.shape[1], is_wrong)
    return y_T


def everything() -> list[Tensor]:
    """Of numbers, of integers that overflow, and of a kernel of ours with functions from several files."""
    generator = torch.Generator().manual_seed(5)
    small = torch.randint(-128, 128, (3, 16), generator=generator)
    logits_TE = torch.randn(5, 12, generator=generator)
    routed = route(logits_TE, Selection(3), "triton")
    return [sums(logits_TE[:, :8].contiguous()), sums(small.to(torch.int8)), routed.expert_ids_TK, routed.weights_TK]


def test_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with and without what is left out."""
    found = everything()
    builder = interpreter.interpreter_builder
    assert interpreter._patch_lang is not interpreting.PREPARE and not builder.options.sanitize_overflow
    monkeypatch.setattr(interpreter, "_patch_lang", interpreting.PREPARE)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", interpreting.RESTORE)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    for one, other in zip(found, everything(), strict=True):
        assert torch.equal(one, other)


def test_after_a_launch_that_raised_all_is_as_before() -> None:
    """Triton's language is its own again, and the next launch is prepared anew."""
    x_TN, load = torch.arange(24.0).view(3, 8), tl.load
    for _ in range(2):
        with pytest.raises(interpreter.InterpreterError, match="no_such_function"):
            sums(x_TN, is_wrong=True)
        assert tl.load is load
        assert torch.equal(sums(x_TN), 4 * x_TN.sum(1))
        assert tl.load is load
