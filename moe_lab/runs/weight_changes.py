"""Weights other than the model's own: experts removed or merged, experts or gates in few bits (conf/_base/model).

The model is built once as it is, with its own router and the plain experts, so that what a calibration text chooses
depends on nothing but the node `model`, the dtype, the seed and the device. The run's model is then made of these
tensors and of those that were changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models.expert_groups import Groups, clusters, grouped, without_lowest
from moe_lab.models.expert_statistics import ExpertStatistics, gathered
from moe_lab.models.moe_layer import indexed_moe_layers, moe_layers
from moe_lab.models.parameters import Donor, parameter_bytes, shareable
from moe_lab.ops.fake_quantize import fake_quantize, stored_bytes
from moe_lab.ops.hash_uniform import fill_uniform, stream_of
from moe_lab.ops.library import DTYPES
from moe_lab.records.identity import option_name
from moe_lab.routers.scored_topk import ScoredTopK
from moe_lab.workloads import text
from moe_lab.workloads.random import random_input

Nodes = Mapping[str, Mapping[Any, Any]]
"""What `records.weight_changes.active` finds in a model's configuration."""

_TOKENS_AT_ONCE = 4096
_MATRICES = ("w_gate_up_E2FD", "w_down_EDF")


@dataclass(frozen=True)
class LayerChange:
    """Of one layer.

    groups: of which of its experts each expert that is left consists.
    counts_E: slots of each former expert on the calibration text; zeros without one.
    quantized: of the experts that are left, those whose matrices are in few bits.
    bias_E: the trained selection bias of those that are left.
    """

    layer: int
    groups: Groups
    counts_E: np.ndarray
    quantized: tuple[int, ...]
    bias_E: Tensor | None


@dataclass(frozen=True)
class WeightChanges:
    """Of a whole model; `tokens` is 0 where nothing was chosen by a calibration text."""

    layers: tuple[LayerChange, ...]
    nodes: Nodes
    texts: tuple[str, ...]
    tokens: int
    router: str

    def router_biases(self, model: nn.Module) -> dict[str, Tensor]:
        """By name, the trained selection biases for the routers of `model`."""
        biases: dict[str, Tensor] = {}
        trained: set[str] = getattr(model, "trained_biases", set)()
        layer_names = [name for name, module in model.named_modules() if module in set(moe_layers(model))]
        for prefix, change in zip(layer_names, self.layers, strict=True):
            if change.bias_E is not None:
                biases |= {name: change.bias_E for name in trained if name.startswith(f"{prefix}.")}
        return biases

    def stored_bytes(self, weights: ExpertWeights, change: LayerChange) -> tuple[list[int], int]:
        """(bytes of each expert of a layer, bytes of its gate's matrix) as the formats would store them."""
        experts, gate = [weights.bytes_per_expert] * weights.n_experts, weights.gate_ED.nbytes
        if (node := self.nodes.get("quantize_experts")) is not None:
            for expert in change.quantized:
                for w in (getattr(weights, name)[expert] for name in _MATRICES):
                    experts[expert] += stored_bytes(w, node["format"], node["group_size"]) - w.nbytes
        if (node := self.nodes.get("quantize_gate", {})).get("format"):
            gate = stored_bytes(weights.gate_ED, node["format"], node["group_size"])
        return experts, gate


def n_left(nodes: Nodes, n_experts: int, top_k: int) -> int:
    """Experts of a layer that are left of `n_experts`; `ValueError` if they are fewer than a token uses."""
    for key in ("prune", "merge"):
        if key in nodes:
            n: int = nodes[key]["experts"]
            left = n_experts - n
            if left < top_k:
                raise ValueError(
                    f"model.{key}.experts={n}: leaves {max(left, 0)} of {n_experts} experts in a layer, and a token "
                    f"uses {top_k}; set it to at most {n_experts - top_k}."
                )
            return left
    return n_experts


def prepare(nodes: Nodes, model: nn.Module, experts: Experts | None) -> None:
    """Give the layers of a new model, which holds nothing yet, as many experts as are left.

    `experts` are those of all layers; each layer asks for its own again, as its shape is another.

    Raises:
        ValueError: the model cannot be changed like that; one line with the key.
    """
    layers = moe_layers(model)
    if nodes and not layers:
        raise ValueError(f"model.{list(nodes)[-1]}: the model has no MoE layers; remove it.")
    for layer in layers:
        weights = layer.weights
        left = n_left(nodes, weights.n_experts, 1)
        if left < weights.n_experts:
            _require_one_group(nodes, layer.router)
            weights.resize(left)
            assert experts is not None
            layer.experts = experts.for_layer(weights, layer.router.top_k, static_k=bool(layer.router.static_k))
        if (node := nodes.get("quantize_experts")) is not None:
            coldest = node["coldest"]
            if coldest is not None and coldest > left:
                raise ValueError(
                    f"model.quantize_experts.coldest={coldest}: must be <= {left}, the experts of a layer; null takes "
                    "all."
                )
            for name in _MATRICES:
                _require_divisor("quantize_experts", node["group_size"], getattr(weights, name))
        if (node := nodes.get("quantize_gate", {})).get("format"):
            _require_divisor("quantize_gate", node["group_size"], weights.gate_ED)


def _require_one_group(nodes: Nodes, router: nn.Module) -> None:
    for module in router.modules():
        if isinstance(module, ScoredTopK) and module.n_groups > 1:
            key = "prune" if "prune" in nodes else "merge"
            raise ValueError(
                f"model.{key}: the router chooses among {module.n_groups} groups of neighbouring experts, which would "
                f"be others with experts left out; remove model.{key} or use a router without groups."
            )


def _require_divisor(key: str, group_size: int | None, w: Tensor) -> None:
    if group_size is not None and w.shape[-1] % group_size:
        raise ValueError(
            f"model.{key}.group_size={group_size}: must divide {w.shape[-1]}, the columns of a matrix; use a divisor, "
            "or null for one scale a row."
        )


@torch.no_grad()
def changed(nodes: Nodes, cfg: DictConfig, model: nn.Module, device: torch.device) -> Donor:
    """The parameters of `model`, which has its own router, changed by `nodes`: for the model of `cfg` to share.

    Layer by layer, so that no more than one layer is in memory twice; `model` is of no use afterwards.

    Raises:
        ValueError: the calibration text cannot be read or is too short.
    """
    tokens, texts = 0, tuple[str, ...]()
    statistics: list[ExpertStatistics] | None = None
    if "calibration" in nodes:
        statistics, texts = _calibrate(nodes, cfg, model, device)
        tokens = statistics[0].n_tokens
    donor, changes = shareable(model), []
    names = {id(module): name for name, module in model.named_modules()}
    for position, (index, layer) in enumerate(indexed_moe_layers(model)):
        found = statistics[position] if statistics is not None else None
        groups, counts_E = _groups(nodes, layer.weights.n_experts, found)
        bias_E = next((m.bias_E for m in layer.router.modules() if isinstance(m, ScoredTopK)), None)
        if bias_E is not None:
            bias_E = nn.Parameter(grouped(bias_E, groups, counts_E), False)
        quantized = _coldest(nodes, groups, counts_E)
        prefix = f"{names[id(layer.weights)]}."
        for name, w in layer.weights.named_parameters():
            left = grouped(w, groups, counts_E) if len(groups) < layer.weights.n_experts else w.data
            donor[prefix + name] = nn.Parameter(_quantized(nodes, name, left, quantized, cfg.seed, index), False)
        changes.append(LayerChange(index, groups, counts_E, quantized, bias_E))
        del layer.weights
    donor.changes = WeightChanges(tuple(changes), nodes, texts, tokens, option_name(cfg.router))
    return donor


def _calibrate(
    nodes: Nodes, cfg: DictConfig, model: nn.Module, device: torch.device
) -> tuple[list[ExpertStatistics], tuple[str, ...]]:
    """The statistics of each MoE layer, and the names of the texts."""
    node, texts = nodes["calibration"], tuple[str, ...]()
    seq_len = min(node["seq_len"], getattr(model, "max_positions", None) or node["seq_len"])
    n_windows = max(node["tokens"] // seq_len, 1)
    by_reap = nodes.get("prune", {}).get("by") == "reap"
    windows: Iterator[Tensor]
    if node["path"] is None:
        x = random_input(
            model=model,
            batch=n_windows,
            seq_len=seq_len,
            seed=cfg.seed + 1,
            device=device,
            dtype=DTYPES[cfg.dtype.name],
            phase="forward",
        )
        windows = iter(x.split(max(1, _TOKENS_AT_ONCE // (seq_len if x.dtype == torch.int64 else 1))))
    else:
        if model.vocab_size is None:
            raise ValueError(
                "model.calibration.path: the model takes hidden states, not tokens; set it to null, for random ones."
            )
        vocab_size: Any = model.vocab_size
        domains = text.read_domains(node["path"], vocab_size, getattr(model, "tokenizer_file", None))
        found = text.windows(domains, seq_len, n_windows, cfg.seed)
        texts = tuple(name for name in found.names if name not in found.left_out)
        windows = (ids.to(device) for ids in found.ids_WS.split(max(1, _TOKENS_AT_ONCE // seq_len)))
    with gathered(moe_layers(model), norms=by_reap, outputs="merge" in nodes) as statistics:
        for x in windows:
            model(x)
    return statistics, texts


def _groups(nodes: Nodes, n_experts: int, statistics: ExpertStatistics | None) -> tuple[Groups, np.ndarray]:
    """(which experts are left, slots of each former one)."""
    everyone = tuple((expert,) for expert in range(n_experts))
    if statistics is None:
        return everyone, np.zeros(n_experts)
    counts_E = statistics.importance("frequency")
    if "prune" in nodes:
        return without_lowest(statistics.importance(nodes["prune"]["by"]), nodes["prune"]["experts"]), counts_E
    if "merge" in nodes:
        return clusters(statistics.mean_outputs(), n_experts - nodes["merge"]["experts"]), counts_E
    return everyone, counts_E


def _coldest(nodes: Nodes, groups: Groups, counts_E: np.ndarray) -> tuple[int, ...]:
    """The experts, of those left, that are to be quantised; of equally cold ones the last."""
    if "quantize_experts" not in nodes:
        return ()
    node = nodes["quantize_experts"]
    if node["coldest"] is None:
        return tuple(range(len(groups)))
    hot = without_lowest(np.array([counts_E[list(group)].sum() for group in groups]), node["coldest"])
    return tuple(sorted(set(range(len(groups))) - {expert for (expert,) in hot}))


def _quantized(nodes: Nodes, name: str, w: Tensor, quantized: tuple[int, ...], seed: int, layer: int) -> Tensor:
    """A parameter of `ExpertWeights` as the formats have it."""
    if name in _MATRICES and quantized:
        node, w = nodes["quantize_experts"], w.clone()
        for expert in quantized:
            w[expert] = fake_quantize(w[expert], node["format"], node["group_size"])
    if name == "gate_ED" and "quantize_gate" in nodes:
        node = nodes["quantize_gate"]
        if node["format"]:
            w = fake_quantize(w, node["format"], node["group_size"])
        if node["noise"]:
            wide = w.float()
            noise = torch.empty_like(wide)
            bound = math.sqrt(3) * node["noise"] * float(wide.square().mean().sqrt())
            w = (wide + fill_uniform(noise, stream_of(seed, "quantize_gate", layer), bound)).to(w.dtype)
    return w


def described(changes: WeightChanges, model: nn.Module) -> dict[str, Any]:
    """What is known of `model`, whose weights were changed like that: for the record's `weight_changes`."""
    layers, saved = moe_layers(model), 0
    for layer, change in zip(layers, changes.layers, strict=True):
        experts, gate = changes.stored_bytes(layer.weights, change)
        saved += layer.weights.bytes_per_expert * len(experts) - sum(experts) + layer.weights.gate_ED.nbytes - gate
    slots = sum(change.counts_E.sum() for change in changes.layers)
    left = sum(change.counts_E[[e for group in change.groups for e in group]].sum() for change in changes.layers)
    first = changes.layers[0]
    return {
        "experts_before": len(first.counts_E),
        "experts": len(first.groups),
        "quantized_experts": len(first.quantized),
        "stored_mb": (parameter_bytes(model) - saved) / 1e6,
        "calibration_tokens": changes.tokens or None,
        "calibration_texts": ", ".join(changes.texts) if changes.texts else "random" if changes.tokens else None,
        "calibration_router": changes.router if changes.tokens else None,
        "removed_slots": float(1 - left / slots) if "prune" in changes.nodes else None,
        "layers": [
            {
                "layer": change.layer,
                "groups": [list(group) for group in change.groups],
                "quantized": list(change.quantized),
            }
            for change in changes.layers
        ],
    }


def warnings(nodes: Nodes) -> list[str]:
    """What a reader of a result with these changes should know."""
    found = []
    if "quantize_experts" in nodes or nodes.get("quantize_gate", {}).get("format"):
        found.append(
            "weights are fake-quantised: latency, memory and bytes are those of dtype; weight_changes.stored_mb is "
            "what the format would take."
        )
    return found
