"""Fewer experts in the layers that need them least: how sensitive each layer is, and the best list of k.

    D_l(k) = || f_k(X) - f(X) ||_F      f_k: MoE layer l with k experts per token, f: with as many as the model has
    minimise sum_l C_l(k_l)  subject to  sum_l k_l <= budget,  1 <= k_l <= K
    C_l(k) = D_l(k), as published, or (D_l(k) / ||f(X)||_F)^2, the share of the layer's output that is lost

X is noise, N(0, 1), as in LExI (2509.02753), whose search is evolutionary; or what the layer reads of a text while all
layers have K experts, with dynamic programming over the budget as in Alloc-MoE (2604.08133), which finds the minimum.
D itself weighs the layers with large outputs most, and losses of several layers add like squares as far as they are
independent. Both look at one layer at a time, so the least sum need not predict best: measure that
(docs/results/traces.md does).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from moe_lab.config.unread import own_top_k
from moe_lab.measure.tolerances import exact_products
from moe_lab.models.moe_layer import MoELayer, hooked, indexed_moe_layers, moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.ops.library import DTYPES
from moe_lab.records.identity import option_name
from moe_lab.routers.base import NO_CONTEXT, RouteContext
from moe_lab.runs import build
from moe_lab.workloads import text


class Sensitivity(NamedTuple):
    """Of a model's MoE layers.

    layers: their indices in the model.
    norm_L: ||f(X)||_F.
    distance_LK: D_l(k) for k = 1 to K; the last is 0.
    tokens: rows of X.
    left_out: texts that are shorter than a window.
    """

    layers: list[int]
    norm_L: list[float]
    distance_LK: list[list[float]]
    tokens: int
    left_out: Sequence[str]

    @property
    def lost_LK(self) -> list[list[float]]:  # noqa: N802 - a shape
        """The share of each layer's output that is lost; 0 of an output that is 0."""
        rows = zip(self.norm_L, self.distance_LK, strict=True)
        return [[(distance / (norm or 1.0)) ** 2 for distance in distances] for norm, distances in rows]


@torch.inference_mode()
def sensitivity(cfg: DictConfig, n_tokens: int, *, progress: Callable[[range], Any] = iter) -> Sensitivity:
    """D of every MoE layer of the model of `cfg`: on its texts if `cfg.workload` has some, else on noise.

    Args:
        cfg: a checked configuration.
        n_tokens: rows of noise; of texts about so many, in windows of `seq_len` spread evenly over them.
        progress: is given the first window of each batch of texts.

    Raises:
        ValueError: no MoE layers, a k of the router's own, a list of k, or noise for a router that reads token ids.
        UnavailableError: the device, or an implementation on it, is not here.
    """
    if (own := own_top_k(cfg.router)) is not None:
        raise ValueError(f"{own}: the router has its own number of experts per token; choose another router.")
    if OmegaConf.is_list(cfg.model.get("top_k")):
        raise ValueError(f"model.top_k={cfg.model.top_k}: is what is looked for; remove it.")
    with exact_products():
        device = build.resolve_device(cfg)
        model = build.build_model(cfg, device)
        build.require_runnable(cfg, model, device)
        layers = moe_layers(model)
        if not layers or "top_k" not in cfg.model:
            raise ValueError(f"model={option_name(cfg.model)}: has no list of MoE layers; use model=checkpoint.")
        fewer = [_with_k(cfg, k, model, device) for k in range(1, layers[0].router.top_k)]
        left_out: Sequence[str] = ()
        rows = _noise(cfg, layers, n_tokens, device)
        if cfg.workload.get("name") == "text":
            windows = _windows(cfg, model, n_tokens)
            rows, left_out = _read(cfg, model, windows.ids_WS.to(device), progress), windows.left_out
        tokens = 0
        squares_LK = torch.zeros(len(layers), len(fewer) + 1, dtype=torch.float64)
        for index, x_TD, ctx in rows:
            y_TD = layers[index](x_TD, ctx)[0].double()
            others = [(layer_of[index](x_TD, ctx)[0].double() - y_TD) for layer_of in fewer]
            squares_LK[index] += torch.stack([part.square().sum().cpu() for part in (*others, y_TD)])
            tokens += len(x_TD) if index == 0 else 0
    roots = squares_LK.sqrt().tolist()
    indices = [index for index, _ in indexed_moe_layers(model)]
    return Sensitivity(indices, [row[-1] for row in roots], [[*row[:-1], 0.0] for row in roots], tokens, left_out)


def _with_k(cfg: DictConfig, k: int, model: nn.Module, device: torch.device) -> list[MoELayer]:
    """The MoE layers of the same model with k experts per token; they share its parameters."""
    other = copy.deepcopy(cfg)
    other.model.top_k = k
    return moe_layers(build.build_model(other, device, shareable(model)))


_Row = tuple[int, Tensor, RouteContext]
"""(which MoE layer, what it reads [T, D], of which tokens)."""


def _noise(cfg: DictConfig, layers: Sequence[MoELayer], n_tokens: int, device: torch.device) -> Iterator[_Row]:
    """The same rows for every layer, whatever the device."""
    if any(layer.router.needs_token_ids for layer in layers):
        raise ValueError(f"router={option_name(cfg.router)}: reads token ids, and noise has none; set workload.path.")
    width = layers[0].weights.gate_ED.shape[1]
    x_TD = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(int(cfg.seed)))
    for index in range(len(layers)):
        yield index, x_TD.to(device, DTYPES[cfg.dtype.name]), NO_CONTEXT


def _windows(cfg: DictConfig, model: nn.Module, n_tokens: int) -> text.Windows:
    vocab_size: Any = model.vocab_size
    domains = text.read_domains(cfg.workload.path, vocab_size, getattr(model, "tokenizer_file", None))
    build.build_input(cfg, model, torch.device("cpu"))  # its errors name the keys
    return text.windows(domains, int(cfg.seq_len), max(n_tokens // int(cfg.seq_len), 1), int(cfg.seed))


def _read(cfg: DictConfig, model: nn.Module, ids_WS: Tensor, progress: Callable[[range], Any]) -> Iterator[_Row]:
    """What each layer reads of the texts, `batch` windows at a time."""
    read: list[tuple[Tensor, RouteContext]] = []

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        read.append((arguments[0], arguments[1]))

    for first in progress(range(0, len(ids_WS), int(cfg.batch))):
        with hooked(moe_layers(model), look, before=True):
            model(ids_WS[first : first + int(cfg.batch)])
        for index, (x_TD, ctx) in enumerate(read):
            yield index, x_TD, ctx
        read.clear()


def allocate(cost_LK: Sequence[Sequence[float]], budget: int) -> list[int]:
    """k for each layer, 1 to K, at most `budget` in all, with the least sum of `cost_LK[layer][k - 1]`.

    Of equal sums the one with fewer experts in later layers. Dynamic programming, O(L * budget * K).

    Raises:
        ValueError: the budget does not give every layer an expert.
    """
    if budget < len(cost_LK):
        raise ValueError(f"budget={budget}: must be >= {len(cost_LK)}, an expert for each layer.")
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (budget + 1)  # by what may be spent on the layers so far
    for layer, costs in enumerate(cost_LK):
        after: list[tuple[float, list[int]]] = [(math.inf, [])] * (budget + 1)
        for spent in range(layer + 1, budget + 1):
            for k in range(1, min(len(costs), spent - layer) + 1):
                cost, ks = best[spent - k]
                if cost + costs[k - 1] < after[spent][0]:
                    after[spent] = (cost + costs[k - 1], [*ks, k])
        best = after
    return best[budget][1]
