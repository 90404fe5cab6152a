"""Forced loads: the routing of each MoE layer that gives its experts the load of `cfg.workload.load`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from moe_lab.models.moe_layer import moe_layers
from moe_lab.ops.hash_uniform import hash_integers, stream_of
from moe_lab.records import files, inputs, store
from moe_lab.records.trace import Trace
from moe_lab.routers.base import Routing
from moe_lab.workloads import loads

FROM_A_TRACE = ("replay", "fitted")


def forces(cfg: DictConfig) -> bool:
    """Whether a routing that is known beforehand is computed, and no router runs."""
    return bool(cfg.workload.get("load", "native") != "native" or cfg.model.get("timed") == "experts")


@torch.inference_mode()
def force_load(cfg: DictConfig, model: nn.Module, x: Tensor) -> tuple[Routing, ...] | None:
    """The routing of each layer that gives the experts the load of `cfg.workload.load`; None if the router runs.

    Its weights are those of the native pass of `model`, which may be a phase of serving it (`build_task`). With
    `model.timed=experts` the load `native` is that of this pass; the slots are not sorted yet.
    """
    load = cfg.workload.get("load", "native")
    layers = moe_layers(model)
    if not layers or not forces(cfg):
        return None
    keys, routings = _load_keys(cfg), [Routing(*routing[:2]) for routing in model(x).routings]
    if load in FROM_A_TRACE:
        recorded = _trace(cfg.workload.trace, cfg.workload.get("trace_layer"), len(layers))
        make: Callable[..., Routing] = partial(loads.fitted, fit=cfg.workload.get("fit"))
        if load == "replay":
            window, consecutive = cfg.workload.get("window", 1), bool(cfg.workload.get("trace_consecutive"))
            if window > 1 and consecutive:
                raise ValueError("workload.trace_consecutive=true: windows of the recording are replayed; remove it.")
            rows_T = None if window == 1 else _windows(cfg.workload.trace, cfg.batch, window, cfg.seed)
            make = partial(loads.replayed, rows_T=rows_T, consecutive=consecutive)
        return tuple(
            make(ids_TK, routing, layer.weights.n_experts, int(cfg.seed))
            for ids_TK, layer, routing in zip(recorded, layers, routings, strict=True)
        )
    return tuple(
        loads.loaded(load, routing, layer.weights.n_experts, **keys)
        for layer, routing in zip(layers, routings, strict=True)
    )


def _load_keys(cfg: DictConfig) -> dict[str, float]:
    keys = ("zipf_exponent", "hot_experts", "hot_share")
    return {"seed": int(cfg.seed), **{key: cfg.workload[key] for key in keys if cfg.workload.get(key) is not None}}


def _trace(path: str, layer: int | None, n_layers: int) -> list[np.ndarray]:
    """The recorded ids [T, K] of each layer, or of one MoE layer (counted from 0) for a model that has one.

    Raises:
        ValueError: the file is missing or damaged, or it has another number of layers.
    """
    file = inputs.trace_file(path)
    try:
        recorded = _of_an_older_run(file) if file.name == store.ROUTING else None
        if recorded is None:
            with Trace(file) as trace:
                return [trace.ids(index) for index in _chosen(path, layer, len(trace.layers), n_layers)]
    except (OSError, ValueError, KeyError) as error:
        if str(error).startswith("workload."):
            raise
        raise ValueError(
            f"workload.trace={path}: {file} has no recorded routing ({error}); give a trace file, or the folder of a "
            "run with measure.record_routing=true."
        ) from error
    return [recorded[index] for index in _chosen(path, layer, len(recorded), n_layers)]


def _windows(path: str, batch: int, window: int, seed: int) -> Tensor:
    """int64 [batch * window]: rows of a trace, windows of consecutive tokens of a sequence, drawn with replacement.

    Raises:
        ValueError: the recording does not have such tokens, or does not say which follow each other.
    """
    file = inputs.trace_file(path)
    if file.name == store.ROUTING:
        raise ValueError(
            f"workload.window={window}: {file} does not say which tokens follow each other; record the run again."
        )
    with Trace(file) as trace:
        tokens = trace.tokens()
    order_T = np.lexsort((tokens.position, tokens.sequence))
    sequence_T, position_T = tokens.sequence[order_T], tokens.position[order_T]
    first_N, last_N = slice(None, len(order_T) - window + 1), slice(window - 1, None)
    follows_N = sequence_T[first_N] == sequence_T[last_N]
    follows_N &= position_T[last_N] - position_T[first_N] == window - 1
    starts_N = torch.from_numpy(np.flatnonzero(follows_N))
    if not len(starts_N):
        raise ValueError(
            f"workload.window={window}: no sequence of {path} has so many tokens; lower it, or record longer sequences."
        )
    chosen_B = hash_integers((batch,), stream_of(seed, "load", "replay"), len(starts_N), torch.device("cpu"))
    return torch.from_numpy(order_T)[(starts_N[chosen_B].unsqueeze(1) + torch.arange(window)).flatten()]


def _of_an_older_run(file: Path) -> np.ndarray:
    """[L, T, K] of a `routing.npz`, where runs wrote their routes before there were traces."""
    files.require_arrays(file)
    with np.load(file, allow_pickle=False) as arrays:
        ids_LTK: np.ndarray = arrays["expert_ids_LTK"]
    return ids_LTK


def _chosen(path: str, layer: int | None, n_recorded: int, n_layers: int) -> range:
    """Which of the recorded layers the model's are."""
    if layer is not None and (n_layers != 1 or layer >= n_recorded):
        raise ValueError(
            f"workload.trace_layer={layer}: must be a layer of {path} (0 to {n_recorded - 1}), and the model "
            f"must have one MoE layer (this one has {n_layers})."
        )
    if layer is not None:
        return range(layer, layer + 1)
    if n_recorded != n_layers:
        remedy = "set workload.trace_layer=0, or sweep over it" if n_layers == 1 else "use a run of the same model"
        raise ValueError(
            f"workload.trace={path}: the recording has {n_recorded} MoE layers, but the model has {n_layers}; {remedy}."
        )
    return range(n_recorded)


def repeated(cfg: DictConfig, n_tokens: int) -> str | None:
    """A sentence for a load that the seed drew and that every iteration repeats; None where the load is no draw."""
    load = cfg.workload.get("load")
    several = "the load is that of this draw, so compare several seeds."
    if load == "fitted" and cfg.workload.fit == "dirichlet":
        return f"workload.fit=dirichlet: every iteration has the load that the seed drew; {several}"
    if load != "replay":
        return None
    file = inputs.trace_file(cfg.workload.trace)
    if file.name == store.ROUTING:
        n_recorded = int(_of_an_older_run(file).shape[1])
    else:
        with Trace(file) as trace:
            n_recorded = trace.n_tokens
    if n_recorded == n_tokens and cfg.workload.get("window", 1) == 1:  # windows are drawn whatever their number
        return None
    which = "from a place drawn" if cfg.workload.get("trace_consecutive") else "drawn"
    return (
        f"workload.load=replay: every iteration replays the same {n_tokens} token{'s' if n_tokens > 1 else ''}, "
        f"{which} from the {n_recorded} recorded by the seed; {several}"
    )


def load_difference(cfg: DictConfig, model: nn.Module, forced: Sequence[Routing] | None) -> float | None:
    """The largest difference between a layer's load and the requested load (`loads.difference`); None without one."""
    if forced is None:
        return None
    load, layers = cfg.workload.load, moe_layers(model)
    if load == "replay" or (load == "fitted" and cfg.workload.fit == "dirichlet"):
        return None  # what was drawn is what there is
    recorded: Sequence[np.ndarray | None] = [None] * len(layers)
    if load == "fitted":
        recorded = _trace(cfg.workload.trace, cfg.workload.get("trace_layer"), len(layers))
    differences = []
    for layer, routing, ids_TK in zip(layers, forced, recorded, strict=True):
        E, K = layer.weights.n_experts, routing.expert_ids_TK.shape[1]
        if ids_TK is not None:
            asked_E: np.ndarray | None = loads.fitted_shares(ids_TK, E)
        else:
            asked_E = loads.asked_shares(load, E, K, **_load_keys(cfg))
        if asked_E is not None:
            differences.append(loads.difference(routing.expert_ids_TK, asked_E))
    return max(differences, default=None)
