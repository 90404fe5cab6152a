"""What the experts of a layer do on a calibration text, and how much each therefore matters.

Over the tokens t that choose expert j, with the routing weight g_tj and the expert's output f_j(x_t):

    frequency  number of these tokens
    weight     sum of g_tj
    reap       mean of g_tj ||f_j(x_t)||_2  (REAP, Lasby et al. 2025, 2510.13999); 0 of an expert that no token chose
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.models.moe_layer import MoELayer, hooked
from moe_lab.routers.base import Routing

IMPORTANCES = ("frequency", "weight", "reap")


class ExpertStatistics:
    """Sums over the tokens that a layer was given so far, in float64 on its device.

    counts_E: slots; weights_E: their routing weights; norms_E: weights times the norm of the output; outputs_ED: of
    all experts on all tokens; n_tokens.
    """

    def __init__(self, layer: MoELayer, *, norms: bool, outputs: bool):
        """`norms` and `outputs` cost passes of their own; without, those sums stay 0."""
        E, D = layer.weights.n_experts, layer.weights.w_down_EDF.shape[1]
        device = layer.weights.gate_ED.device
        self.layer, self.norms, self.outputs, self.n_tokens = layer, norms, outputs, 0
        self.counts_E, self.weights_E, self.norms_E = torch.zeros(3, E, dtype=torch.float64, device=device)
        self.outputs_ED = torch.zeros(E, D, dtype=torch.float64, device=device)

    def add(self, x_TD: Tensor, routing: Routing) -> None:
        """The tokens of one pass: the layer's input, and which experts they chose."""
        x_TD = self.layer.experts_input(x_TD)
        self.n_tokens += len(x_TD)
        for ids_T, weights_T in zip(routing.expert_ids_TK.T, routing.weights_TK.double().T, strict=True):
            used_T = ids_T >= 0
            at_N, weights_N = ids_T[used_T].long(), weights_T[used_T]
            self.counts_E.index_add_(0, at_N, torch.ones_like(weights_N))
            self.weights_E.index_add_(0, at_N, weights_N)
            if self.norms:
                norm_N = self._alone(x_TD, ids_T).double().norm(dim=-1)[used_T]
                self.norms_E.index_add_(0, at_N, weights_N * norm_N)
        if self.outputs:
            for expert, sum_D in enumerate(self.outputs_ED):
                ids_T = torch.full((len(x_TD),), expert, dtype=torch.int32, device=x_TD.device)
                sum_D += self._alone(x_TD, ids_T).double().sum(0)

    def _alone(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """[T, D] output of one expert of each token, unweighted."""
        ones_T1 = torch.ones(len(x_TD), 1, dtype=torch.float32, device=x_TD.device)
        return self.layer.compute(x_TD, Routing(ids_T.unsqueeze(1), ones_T1))

    def importance(self, by: str) -> np.ndarray:
        """[E] float64, one of `IMPORTANCES`."""
        sums_E = {"frequency": self.counts_E, "weight": self.weights_E, "reap": self.norms_E}[by]
        mean_E = sums_E / self.counts_E.clamp(min=1) if by == "reap" else sums_E
        return np.asarray(mean_E.cpu())

    def mean_outputs(self) -> np.ndarray:
        """[E, D] float64: what each expert gives on average, whether it was chosen or not."""
        return np.asarray((self.outputs_ED / self.n_tokens).cpu())


@contextmanager
def gathered(layers: Sequence[MoELayer], **wanted: bool) -> Iterator[list[ExpertStatistics]]:
    """Inside, every pass is added to the statistics of these layers; `wanted` as for `ExpertStatistics`."""
    statistics = {layer: ExpertStatistics(layer, **wanted) for layer in layers}

    def look(layer: Any, arguments: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
        statistics[layer].add(arguments[0], result[1])

    hook: Callable[..., None] = look
    with hooked(layers, hook):
        yield list(statistics.values())
