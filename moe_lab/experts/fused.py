"""experts=fused: the extension's kernels for Hopper, with gather, activation and sum in or beside two products."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts
from moe_lab.experts.table import Shape
from moe_lab.experts.tiles import offered, require_no_empty_piece, require_offered_for, tiles_for
from moe_lab.experts.weights import Clamped, ExpertWeights, Scale, check_scale
from moe_lab.marks import phase
from moe_lab.ops import extension, fused_experts
from moe_lab.ops.library import DTYPE_NAMES, constant_when_compiled
from moe_lab.routers.base import Routing


@constant_when_compiled  # sizes one by one: a tuple that is made while tracing is not taken for a constant
def _tiles_for(
    device_name: str, multiprocessors: int, dtype: str, T: int, E: int, K: int, D: int, F: int
) -> tuple[int, ...]:
    """`Tiles` without its name: torch 2.11 cannot unpack a constant that has a class of its own."""
    return tuple(tiles_for(device_name, multiprocessors, dtype, T, E, K, D, F))


def kernels_activation(weights: ExpertWeights) -> str:
    """What the kernels call the activation of these experts.

    Raises:
        UnavailableError: they do not have it.
    """
    if weights.activation is None:
        return "silu"
    if weights.activation == Clamped():
        return "clamped"
    if not isinstance(weights.activation, Clamped):
        raise UnavailableError(f"its kernels do not compute {weights.activation}; use experts=auto")
    alpha, limit = weights.activation
    raise UnavailableError(
        f"its kernels clamp with alpha={Clamped().alpha} and limit={Clamped().limit} only, not {alpha:g} and "
        f"{limit:g}; use experts=auto"
    )


class Fused(Experts):
    """Nothing is read on the host, and the weights are read as they are."""

    graph_safe = True
    only_plain = False

    def __init__(self, tiles: Iterable[int] | None = None) -> None:
        """`tiles` (see `Tiles`) are taken for every input; None: by its shape, from what was measured (tiles.py).

        Raises:
            ValueError: tiles that the kernels do not offer.
        """
        self.tiles = None if tiles is None else offered(tiles)
        self.device_name, self.multiprocessors = "", 0
        self.shape: Shape | None = None
        """Of the layer; None as long as this is of no layer."""

    def for_layer(self, weights: ExpertWeights, top_k: int, *, static_k: bool = False) -> Self:
        """See `Experts`. Raises `ValueError` for chosen tiles that the kernels would change for such a layer."""
        mine = copy.copy(self)
        E, D, F = weights.w_down_EDF.shape
        if self.tiles is not None:
            require_no_empty_piece(self.tiles, F)
        mine.shape = Shape(E, top_k, D, F)
        return mine

    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        """See `Experts`."""
        fused_experts.require(device)
        if load:
            extension.load()
        properties = torch.cuda.get_device_properties(device)
        self.device_name, self.multiprocessors = properties.name, properties.multi_processor_count

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`.

        Raises:
            UnavailableError: another dtype or activation, or widths that the kernels do not take.
        """
        check_scale(scale)
        up_bias_E2F, down_bias_ED = weights.up_bias_E2F, weights.down_bias_ED
        top_k = routing.expert_ids_TK.shape[1]
        layer = self if self.shape is not None else self.for_layer(weights, top_k)
        with phase("dispatch+experts+combine"):
            return fused_experts.fused_experts(
                x_TD, routing.expert_ids_TK, routing.weights_TK, weights.w_gate_up_E2FD, weights.w_down_EDF,
                layer._tiles(x_TD, top_k), dispatch=routing.dispatch, scales_input=scale == "input",
                activation=kernels_activation(weights),
                gate_up_bias_E2F=None if up_bias_E2F is None else up_bias_E2F.float(),
                down_bias_ED=None if down_bias_ED is None else down_bias_ED.float(),
            )  # fmt: skip

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        """See `Experts`: few slots are sorted by the kernels."""
        if self.shape is None:
            return True
        n_slots = len(x_TD) * self.shape.K
        return fused_experts.reads_dispatch(self._tiles(x_TD, self.shape.K), n_slots, self.shape.E)

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`: `fused` and its tiles."""
        assert self.shape is not None, "for_layer tells the shape"
        kernels_activation(weights)
        tiles = self._tiles(x_TD, self.shape.K)
        return {"experts": "fused", "tiles": "-".join(map(str, tiles))}

    def _tiles(self, x_TD: Tensor, top_k: int) -> tuple[int, ...]:
        """The number of slots decides, so K may differ from the layer's (in a layer of other rows).

        Raises:
            UnavailableError: the kernels do not compute such an input.
        """
        assert self.shape is not None
        fused_experts.require_computable(x_TD.dtype, self.shape.E, self.shape.D, self.shape.F)
        if self.tiles is not None:
            require_offered_for(self.tiles, self.shape._replace(K=top_k), len(x_TD))
            return self.tiles
        E, _, D, F = self.shape
        dtype = DTYPE_NAMES[x_TD.dtype]
        return _tiles_for(self.device_name, self.multiprocessors, dtype, len(x_TD), E, top_k, D, F)
