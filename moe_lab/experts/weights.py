"""The parameters of one MoE layer, shared by every implementation of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Scale = Literal["output", "input"]


class Clamped(NamedTuple):
    """The activation of gpt-oss (2508.10925): g sigmoid(alpha g) (u + 1), g at most `limit` and u within +- `limit`."""

    alpha: float = 1.702
    limit: float = 7.0

    def __str__(self) -> str:
        return "a clamped activation"


Activation = Clamped | Literal["gelu_tanh"] | None
"""None is silu(g) u (SwiGLU); gelu_tanh is gelu(g) u by the formula with tanh (GeGLU, 2002.05202)."""


class ExpertWeights(nn.Module):
    """The gate and the expert matrices: gate_ED [E, D], w_gate_up_E2FD [E, 2F, D] (gate first), w_down_EDF [E, D, F].

    With `gate_bias` also gate_bias_E, which is added to the logits, whichever router ranks them. With `bias` also what
    is added to each product: up_bias_E2F and down_bias_ED, in float32 whatever the dtype of the matrices. With `scaled`
    also scale_E, in float32, by which an expert's output is multiplied beside the routing weight, whichever router
    gives that (Gemma 4). `activation` is an `Activation`, of a clamped one its alpha and limit.

    Built once; every implementation reads these very tensors, so none may reorder or copy them.
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        hidden_dim: int,
        *,
        bias: bool = False,
        activation: tuple[float, float] | Literal["gelu_tanh"] | None = None,
        gate_bias: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        E, D, F = n_experts, d_model, hidden_dim
        self.activation: Activation
        self.activation = activation if activation is None or isinstance(activation, str) else Clamped(*activation)
        self.gate_ED = nn.Parameter(torch.empty(E, D), requires_grad=False)
        self.gate_bias_E = nn.Parameter(torch.empty(E), requires_grad=False) if gate_bias else None
        self.w_gate_up_E2FD = nn.Parameter(torch.empty(E, 2 * F, D), requires_grad=False)
        self.w_down_EDF = nn.Parameter(torch.empty(E, D, F), requires_grad=False)
        self.up_bias_E2F = _wide(E, 2 * F) if bias else None
        self.down_bias_ED = _wide(E, D) if bias else None
        self.scale_E = _wide(E) if scaled else None

    def resize(self, n_experts: int) -> None:
        """Hold so many experts instead; nothing is filled."""
        for name, w in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(w.new_empty(n_experts, *w.shape[1:]), requires_grad=False))

    @property
    def n_experts(self) -> int:
        return self.gate_ED.shape[0]

    @property
    def bytes_per_expert(self) -> int:
        """Of the matrices, biases and scale of one expert."""
        own = (self.w_gate_up_E2FD, self.w_down_EDF, self.up_bias_E2F, self.down_bias_ED, self.scale_E)
        return sum(w[0].numel() * w.element_size() for w in own if w is not None)

    @property
    def is_plain(self) -> bool:
        """Whether the experts are SwiGLU without biases, which every implementation computes; a layer scales them."""
        return self.up_bias_E2F is None and self.activation is None

    def activate(self, gate_up: Tensor) -> Tensor:
        """The activation of [..., 2F] whose first half is the gate."""
        return activated(gate_up, self.activation)


def _wide(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)


def check_scale(scale: str) -> None:
    """Raise `ValueError` unless `scale` is `output` or `input`."""
    if scale not in ("output", "input"):
        raise ValueError(f"scale={scale}: must be output or input.")


def activated(gate_up: Tensor, activation: Activation) -> Tensor:
    """The activation of [..., 2F] whose first half is the gate; computed in the tensor's dtype."""
    if isinstance(activation, Clamped):
        return clamped(gate_up, *activation)
    return swiglu(gate_up) if activation is None else geglu(gate_up)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F] whose first half is the gate; computed in the tensor's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up of [..., 2F] whose first half is the gate, gelu by the formula with tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def clamped(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """See `Clamped`, of [..., 2F] whose first half is the gate; computed in the tensor's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
