"""The small layers that the models share. Each casts its weight to the dtype of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.experts.weights import Activation, activated
from moe_lab.ops import gemv
from moe_lab.ops.add_rms_norm import add_rms_norm
from moe_lab.ops.library import is_compiled, resolve_implementation
from moe_lab.ops.rms_norm import rms_norm


class Linear(nn.Module):
    """y = x W^T [+ b], W [out, in], b [out]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.uses_gemv = True

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def implementation(self, x: Tensor) -> str:
        """Who computes the product with x [..., in], or [T, 0] to ask: `torch`, or the kernels."""
        if x.shape[:-1].numel() > gemv.MOST_ROWS:
            return "torch"  # no need of rows to ask with
        rows = x.new_empty(*x.shape[:-1], self.weight.shape[1])
        return "gemv" if self.takes(rows, self.weight, self.bias) else "torch"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T [+ b] with any weight, as this layer computes it."""
        if self.takes(x, weight, bias):
            return gemv.gemv(_rows(x), weight, bias).view(*x.shape[:-1], -1)
        dtype = x.dtype  # `to` takes 1 us where it changes nothing: a tenth of a small product on a CPU
        if weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return F.linear(x, weight, bias)

    def takes(self, x: Tensor, *others: Tensor | None, norms: bool = False) -> bool:
        """Whether the kernels for a few rows compute it."""
        is_asked = self.uses_gemv and not is_compiled() and gemv.is_faster(x.device)
        return is_asked and gemv.takes(x, *others, norms=norms)

    def use_reference(self) -> None:
        """From now on compute in plain torch."""
        self.uses_gemv = False


def place_together(*layers: Linear) -> None:
    """Put their weights one after the other in memory, for `project_together`, and the biases that all or none have.

    Whatever values they have are lost.
    """
    assert len({layer.bias is None for layer in layers}) == 1
    for name in ("weight", "bias"):
        if (first := getattr(layers[0], name)) is None:
            continue
        sizes = [len(getattr(layer, name)) for layer in layers]
        whole = first.new_empty(sum(sizes), *first.shape[1:])
        for layer, rows in zip(layers, whole.split(sizes), strict=True):
            setattr(layer, name, nn.Parameter(rows, requires_grad=False))


def project_together(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each layer gives, by one product where their weights lie together; the results are views of one tensor."""
    joined = _joined_parameters(layers)
    if joined is None:
        return tuple(layer(x) for layer in layers)
    return _split(layers[0].product(x, *joined), layers)


def joined_with(
    norm: nn.Module, x: Tensor, residual: Tensor | None, *layers: Linear
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of all layers if `norm_and_project` takes them and this norm, as `add_norm` makes it.

    It takes a few rows, on Hopper.
    """
    if not (isinstance(norm, AddRMSNorm) and norm.may_be_fused):
        return None
    joined = _joined_parameters(layers)
    takes = joined is not None and layers[0].takes(x, residual, norm.weight, *joined, norms=True)
    return joined if takes else None


def norm_and_project(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    joined: tuple[Tensor, Tensor | None],
    *layers: Linear,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(`project_together` of norm(x + residual), x + residual), by one launch; `joined` as `joined_with` gives it."""
    assert isinstance(norm, AddRMSNorm)
    rows = None if residual is None else _rows(residual)
    y, total = gemv.norm_gemv(_rows(x), rows, norm.weight, norm.eps, *joined)
    return _split(y.view(*x.shape[:-1], -1), layers), total.view_as(x)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, one row behind the other."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _split(y: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    return y.split([len(layer.weight) for layer in layers], dim=-1)  # type: ignore[no-any-return]


def _joined_parameters(layers: Sequence[Linear]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of all as one; None where they do not lie together, or while a pass is compiled."""
    if is_compiled():  # where weights lie cannot be asked
        return None
    weight = rows_together([layer.weight for layer in layers])
    biases = [part for layer in layers if (part := layer.bias) is not None]
    bias = rows_together(biases) if weight is not None and biases else None
    return None if weight is None or (biases and bias is None) else (weight, bias)


def rows_together(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all as one tensor, without a copy; None if they do not lie one after the other."""
    first, rows = parts[0], 0
    storage, start, row = first.untyped_storage().data_ptr(), first.storage_offset(), first.stride(0)
    for part in parts:
        follows = part.is_contiguous() and part.storage_offset() == start + rows * row
        if not follows or part.untyped_storage().data_ptr() != storage:
            return None
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class Embedding(nn.Module):
    """Rows of W [V, D]; in the reference they come out in fp32, and every later layer follows."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model), requires_grad=False)
        self.dtype: torch.dtype | None = None

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return rows if self.dtype is None else rows.to(self.dtype)

    def use_reference(self) -> None:
        self.dtype = torch.float32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    `wide`: the weight is fp32 whatever the dtype of the others. Of a zero-centred norm (Qwen3-Next) it is 1 plus what
    the files hold, which bf16 would round away.
    """

    def __init__(self, width: int, eps: float, *, wide: bool = False):
        super().__init__()
        dtype = torch.float32 if wide else None
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == weight.dtype:
            return rms_norm(x, weight, self.eps)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return rms_norm(x.to(dtype), weight.to(dtype), self.eps).to(x.dtype)


class AddRMSNorm(RMSNorm):
    """(norm(x + residual), x + residual) by the custom op; without a residual, (norm(x), x)."""

    def __init__(self, width: int, eps: float, implementation: str, *, wide: bool = False):
        super().__init__(width, eps, wide=wide)
        self.asked = implementation
        self.implementation = "torch"

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """Decide who computes on `device`. Raises `UnavailableError` where that cannot be what was asked for."""
        self.implementation = resolve_implementation(self.asked, device, op="model.implementation")

    @property
    def may_be_fused(self) -> bool:
        """Whether a kernel that does more than the norm may do it: no implementation was asked for by name."""
        return self.asked == "auto" and self.implementation == "triton"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return super().forward(x), x
        return add_rms_norm(x, residual, self.weight, self.eps, self.implementation)

    def use_reference(self) -> None:
        self.implementation = "torch"


class AddLayerNorm(nn.Module):
    """As `AddRMSNorm`, of a LayerNorm with weight and bias, in plain torch."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = x if residual is None else x + residual
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(whole, self.weight.shape, weight, bias, self.eps), whole


class Add(nn.Module):
    """As `AddRMSNorm` without a norm: the sum, twice."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = x if residual is None else x + residual
        return whole, whole


def add_norm(kind: str, width: int, eps: float, implementation: str) -> AddRMSNorm | AddLayerNorm:
    """The norm of this kind: rms, wide (of a `RMSNorm` that is wide) or layer, which has one implementation only."""
    assert kind in ("rms", "wide", "layer"), kind
    return AddLayerNorm(width, eps) if kind == "layer" else AddRMSNorm(width, eps, implementation, wide=kind == "wide")


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or with another `Activation`; Shazeer, 2002.05202."""

    def __init__(self, d_model: int, hidden_dim: int, activation: Activation = None):
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(d_model, 2 * hidden_dim)
        self.down = Linear(hidden_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activated(self.gate_up(x), self.activation))  # type: ignore[no-any-return]
