"""experts=auto: the fastest of the package's own that can run, by device, dtype, shape and number of tokens.

Where the kernels of `fused` can run it is what was measured to be the fastest, or likely is (table.py); elsewhere
`grouped`. `loop` is not taken: it is the reference that every run is compared with. On a CPU `grouped` took 0.25 to 1.2
of its time for two to 64 experts (one EPYC core, 1 to 256 tokens, fp32 and bf16), and only for a single expert more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts
from moe_lab.experts.fused import Fused, kernels_activation
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.table import Shape, fastest
from moe_lab.experts.weights import ExpertWeights, Scale
from moe_lab.ops.extension import BuildError
from moe_lab.ops.library import DTYPE_NAMES, constant_when_compiled
from moe_lab.routers.base import Routing

FASTEST_FIRST: Mapping[str, Callable[[], Experts]] = {"fused": Fused, "grouped": Grouped}
"""Who may be chosen. The last can always compute."""


@constant_when_compiled  # there the shape is fixed
def _fastest(device_name: str, dtype: str, shape: Shape, n_tokens: int) -> str:
    return fastest(device_name, dtype, shape, n_tokens)


def preferred(device: torch.device) -> str:
    """The first of `FASTEST_FIRST` that is usable on `device`: what auto means there unless a table says otherwise."""
    experts = Auto()
    experts.compute_on(device, load=False)
    return next(iter(experts.usable))


def _has_activation(weights: ExpertWeights) -> bool:
    """Whether `fused` computes the activation of these experts."""
    try:
        kernels_activation(weights)
    except UnavailableError:
        return False
    return True


class Auto(Experts):
    """Each call goes to one of `usable`; which one depends on nothing but its shape."""

    graph_safe = True  # as all of `FASTEST_FIRST` are
    only_plain = False

    def __init__(self) -> None:
        self.candidates: dict[str, Experts] = {name: make() for name, make in FASTEST_FIRST.items()}
        self.usable: dict[str, Experts] = {"grouped": self.candidates["grouped"]}
        """Who can compute on the device, by name; until that is known, who can everywhere."""
        self.fallback: str | None = None
        """Why `fused` cannot be used though the device could: its kernels do not compile."""
        self.device_name = ""
        self.shape: Shape | None = None
        """Of the layer; None as long as this is of no layer."""

    def for_layer(self, weights: ExpertWeights, top_k: int, *, static_k: bool = False) -> Self:
        """See `Experts`."""
        mine = copy.copy(self)
        E, D, F = weights.w_down_EDF.shape
        mine.shape = Shape(E, top_k, D, F)
        mine.candidates = {
            name: experts.for_layer(weights, top_k, static_k=static_k)
            for name, experts in self.candidates.items()
            if name != "fused" or _has_activation(weights)
        }
        mine.usable = {name: mine.candidates[name] for name in self.usable if name in mine.candidates}
        return mine

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """See `Experts`: notes who can."""
        self.usable, self.fallback = {}, None
        for name, experts in self.candidates.items():
            try:
                experts.compute_on(device, load=load)
            except BuildError as error:
                self.fallback = str(error)
            except UnavailableError:
                pass
            else:
                self.usable[name] = experts
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`."""
        top_k = routing.expert_ids_TK.shape[1]
        experts = self.for_layer(weights, top_k) if self.shape is None else self
        return experts.chosen(x_TD)(x_TD, routing, weights, scale=scale)

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        """See `Experts`."""
        return self.chosen(x_TD).reads_dispatch(x_TD)

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: that of the one chosen."""
        return self.chosen(x_TD).implementation(x_TD, weights)

    def chosen(self, x_TD: Tensor) -> Experts:
        """See `Experts`."""
        return self.usable[self._fastest(x_TD) if "fused" in self.usable else "grouped"]

    def warning(self, x_TD: Tensor) -> str | None:
        """See `Experts`: the kernels of `fused`, which would be faster, do not compile."""
        if self.fallback is None or self._fastest(x_TD) != "fused":
            return None
        return f"experts=auto uses grouped: {self.fallback}."

    def _fastest(self, x_TD: Tensor) -> str:
        assert self.shape is not None, "for_layer tells the shape"
        return _fastest(self.device_name, DTYPE_NAMES.get(x_TD.dtype, ""), self.shape, len(x_TD))
