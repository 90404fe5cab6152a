"""experts=flashinfer_low: FlashInfer's two kernels for few tokens (frost_low_latency); nothing is sorted.

A warp multiplies some columns of one slot's expert; a second kernel multiplies by the down matrices and sums a token's
slots in their order. Tokens with one expert read its matrices each, so the kernels are for up to eight tokens. They
want the rows of up before those of gate: a copy, made at the first call with a layer's weights and kept as long as
these are; this is not timed.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_lab.errors import UnavailableError
from moe_lab.experts.peers.peer import Peer
from moe_lab.experts.peers.tuning import fastest
from moe_lab.experts.weights import ExpertWeights

MOST_K = 32  # its second kernel has a warp for each slot of a token
COLUMNS = ((1, 1), (2, 2), (2, 4), (4, 4), (8, 8))
"""Of a warp in the first and in the second kernel: what is tried."""


class FlashInferLow(Peer):
    """tune: try `COLUMNS` at the first call with a size; else what FlashInfer takes by itself."""

    distribution = "flashinfer-python"
    modules = ("flashinfer.fused_moe.backends.frost_low_latency.fma.bf16.runtime",)
    function = "launch"
    multiple = 128
    reads_unused = True
    _compiled: ClassVar[dict[Any, Any]] = {}  # of the process: a layer may be copied, and what is compiled may not

    def __init__(self, *, tune: bool):
        self.tune = tune
        self._laid_out: Any = WeakIdKeyDictionary()
        self._chosen: dict[Any, tuple[int, int]] = {}

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: as `flashinfer-python 0.7.4 few tokens, tuned, gate and up laid out anew`."""
        name = super().implementation(x_TD, weights)["experts"]
        columns = "tuned" if self.tune else "default columns"
        return {"experts": f"{name} few tokens, {columns}, gate and up laid out anew"}

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `Peer`."""
        F, K = down_EDF.shape[2], ids_TK.shape[1]
        if K > MOST_K:
            raise UnavailableError(f"{self.distribution}, few tokens: at most {MOST_K} experts per token, not {K}")
        if up_E2FD not in self._laid_out:
            self._laid_out[up_E2FD] = up_E2FD.roll(F, 1)
        h_NF = x_TD.new_empty(ids_TK.numel(), F)
        operands = (x_TD, self._laid_out[up_E2FD], ids_TK, h_NF, down_EDF, weights_TK, torch.empty_like(x_TD))
        columns = (2 if len(x_TD) == 1 else 4, 4)
        if self.tune:
            size = (x_TD.dtype, *ids_TK.shape, *down_EDF.shape)
            if size not in self._chosen:
                what = f"{self.distribution}, columns of a warp"
                self._chosen[size], _ = fastest(lambda *columns: self._launch(columns, operands), COLUMNS, what)
            columns = self._chosen[size]
        return self._launch(columns, operands)

    def _launch(self, columns: tuple[int, int], operands: tuple[Tensor, ...]) -> Tensor:
        key = (columns, *((operand.dtype, *operand.shape) for operand in operands))
        if key not in self._compiled:
            self._compiled[key] = self._compile(columns, operands)
        self._compiled[key](*operands)
        return operands[-1]

    def _compile(self, columns: tuple[int, int], operands: tuple[Tensor, ...]) -> Any:
        cute: Any = importlib.import_module("cutlass.cute")
        runtime: Any = importlib.import_module("cutlass.cute.runtime")
        major, minor = torch.cuda.get_device_capability(operands[0].device)
        target = f"sm_{major}{minor}{'' if major == 8 else 'a'}"
        return cute.compile(
            self.kernels().launch,
            *(runtime.from_dlpack(operand) for operand in operands),
            *columns,
            "swiglu",
            True,  # gated
            None,  # parameters of the activation: the default ones
            False,  # weights of the slots as they are
            True,  # sum the slots
            runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--gpu-arch {target} --enable-tvm-ffi",
        )
