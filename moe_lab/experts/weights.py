"""The parameters of one MoE layer, shared by every implementation of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Scale = Literal["output", "input"]


class ExpertWeights(nn.Module):
    """The gate and the expert matrices: gate_ED [E, D], w_gate_up_E2FD [E, 2F, D] (gate first), w_down_EDF [E, D, F].

    Built once; every implementation reads these very tensors, so none may reorder or copy them.
    """

    def __init__(self, n_experts: int, d_model: int, hidden_dim: int):
        super().__init__()
        E, D, F = n_experts, d_model, hidden_dim
        self.gate_ED = nn.Parameter(torch.empty(E, D), requires_grad=False)
        self.w_gate_up_E2FD = nn.Parameter(torch.empty(E, 2 * F, D), requires_grad=False)
        self.w_down_EDF = nn.Parameter(torch.empty(E, D, F), requires_grad=False)

    @property
    def n_experts(self) -> int:
        return self.gate_ED.shape[0]

    @property
    def bytes_per_expert(self) -> int:
        """Of the matrices of one expert."""
        return sum(w[0].numel() * w.element_size() for w in (self.w_gate_up_E2FD, self.w_down_EDF))


def check_scale(scale: str) -> None:
    """Raise `ValueError` unless `scale` is `output` or `input`."""
    if scale not in ("output", "input"):
        raise ValueError(f"scale={scale}: must be output or input.")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] whose first half is the gate; computed in the tensor's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
