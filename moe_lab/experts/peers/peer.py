"""What the kernels of another project need around them: is it installed, can it compute this, which slots are used."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts, require_plain
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.ops import extension
from moe_lab.ops.library import register
from moe_lab.routers.base import Routing


class Peer(Experts):
    """Experts of another project. A subclass says what it is called and where, and defines `compute`.

    distribution: its name in the record. pip: what to install, if that is called otherwise.
    modules: what is imported, in the order of preference. function: what the module must have.
    name: given by `compute_on`.
    capability: of the GPU, at least (with `newer` false, exactly its major number).
    dtypes: what it computes. multiple: what D and F must be multiples of.
    reads_unused: whether `compute` takes ids of -1 as they are.
    sorts: `compute` sorts the slots by `ops.dispatch`.
    is_full: no slot of its layer is ever unused.
    """

    graph_safe = True
    distribution: str
    pip: str | None = None
    modules: tuple[str, ...]
    function: str
    name: str
    capability: tuple[int, int] = (8, 0)
    newer = True
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    multiple = 16
    reads_unused = False
    sorts = False
    is_full = False

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        """[T, D], the weighted sum of each token's experts. T and K are at least 1; the ids are int32."""
        raise NotImplementedError(f"{type(self).__name__} must define compute")

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """See `Experts`."""
        self.require_device(device)
        self.kernels()
        self.name = f"{type(self).__name__} {id(self)}"
        _DECIDED[self.name] = self

    def require_device(self, device: torch.device) -> None:
        """Raise `UnavailableError` if it has no kernels for this device."""
        if device.type != "cuda":
            raise UnavailableError(f"needs device=cuda (this run is on {device.type})")
        found, (major, minor) = torch.cuda.get_device_capability(device), self.capability
        if found < self.capability or (not self.newer and found[0] != major):
            at_least = f">= {major}.{minor}" if self.newer else f"{major}.x"
            raise UnavailableError(
                f"needs a GPU with compute capability {at_least} (this one has {found[0]}.{found[1]})"
            )

    def for_layer(self, weights: ExpertWeights, top_k: int, *, static_k: bool = False) -> Self:
        """See `Experts`."""
        mine = copy.copy(self)
        mine.is_full = static_k
        return mine

    def kernels(self) -> Any:
        """The module with its functions.

        Raises:
            UnavailableError: it is not installed, or cannot be imported.
        """
        errors = []
        for name in self.modules:
            try:
                module = importlib.import_module(name)
                getattr(module, self.function)
                return module
            except Exception as error:  # what a package raises where its own needs are not met is its own affair
                errors.append(error)
        why = " ".join(str(errors[0]).split())
        raise UnavailableError(
            f"cannot import {self.modules[0]} ({why}); pip install {self.pip or self.distribution}"
        ) from errors[0]

    def require(self, dtype: torch.dtype, D: int, F: int) -> None:
        """Raise `UnavailableError` if it does not compute this dtype or these widths."""
        if dtype not in self.dtypes:
            names = " or ".join(str(known).removeprefix("torch.") for known in self.dtypes)
            raise UnavailableError(
                f"{self.distribution} computes {names} only, not {str(dtype).removeprefix('torch.')}"
            )
        if D % self.multiple or F % self.multiple:
            raise UnavailableError(
                f"{self.distribution} needs widths that are multiples of {self.multiple}, not {D}, {F}"
            )

    def version(self) -> str:
        """As installed."""
        return metadata.version(self.distribution)

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: the project and its version, as `vllm 0.26.0`; `dispatch` as `Grouped` has it."""
        self.require(x_TD.dtype, *weights.w_down_EDF.shape[1:])
        ran = {"experts": f"{self.distribution} {self.version()}"}
        if self.sorts and extension.sorts(x_TD.device, weights.n_experts):
            ran["dispatch"] = extension.label(x_TD.device)
        return ran

    def warning(self, x_TD: Tensor) -> str | None:
        """See `Experts`: its time would be shorter with our sort."""
        if not self.sorts or x_TD.device.type != "cuda" or extension.computes(x_TD.device):
            return None
        return (
            f"torch sorts the slots for {self.distribution}, which takes about ten launches; run moe-lab build first."
        )

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`.

        Raises:
            UnavailableError: it does not compute this dtype, these widths or such experts.
        """
        check_scale(scale)
        require_plain(weights)
        self.require(x_TD.dtype, *weights.w_down_EDF.shape[1:])
        (T, K), matrices = routing.expert_ids_TK.shape, (weights.w_gate_up_E2FD, weights.w_down_EDF)
        if T == 0 or K == 0:
            return torch.zeros_like(x_TD)
        compute: Callable[..., Tensor] = self.compute
        if torch.compiler.is_compiling():
            compute = partial(torch.ops.moe_lab.peer_experts, self.name)
        with phase("dispatch+experts+combine"):
            if not self.reads_unused and not self.is_full:
                x_TD, routing = without_unused(x_TD, routing)
            ids_TK, weights_TK = routing.expert_ids_TK.contiguous(), routing.weights_TK.contiguous()
            if scale == "output":
                return compute(x_TD.contiguous(), ids_TK, weights_TK, *matrices)
            # Every slot becomes a token of its own, whose row is scaled.
            used_N1 = routing.expert_ids_TK.reshape(-1, 1) >= 0
            x_ND = x_TD.repeat_interleave(K, 0) * weights_TK.reshape(-1, 1).masked_fill(~used_N1, 0)
            o_ND = compute(x_ND.to(x_TD.dtype), ids_TK.reshape(-1, 1), used_N1.float(), *matrices)
            return o_ND.view(T, K, -1).sum(1, dtype=torch.float32).to(x_TD.dtype)


_DECIDED: WeakValueDictionary[str, Peer] = WeakValueDictionary()
"""Those that may be called, by their names: an op takes no objects."""


def _compute(peer: str, *operands: Tensor) -> Tensor:
    return _DECIDED[peer].compute(*operands)


def _fake(peer: str, x: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# What a compiled pass has in place of the peer's Python.
register(
    "peer_experts(str peer, Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down) -> Tensor", _compute, _fake
)


def without_unused(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """The same for kernels that take no id of -1: such a slot gets an expert that its token uses, and the weight 0.

    A token without any expert gets expert 0 and zeros as its row, for 0 times what is not finite would be NaN.
    """
    ids_TK = routing.expert_ids_TK
    used_TK = ids_TK >= 0
    another_T1 = ids_TK.amax(-1, keepdim=True)
    x_TD = x_TD.masked_fill(another_T1 < 0, 0)
    ids_TK = ids_TK.where(used_TK, another_T1.clamp(min=0))
    return x_TD, Routing(ids_TK, routing.weights_TK.masked_fill(~used_TK, 0))
