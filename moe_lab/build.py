"""From a checked configuration to its objects: device, router, experts, model, input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from moe_lab.errors import UnavailableError
from moe_lab.experts.weights import ExpertsImpl
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.parameters import adopt, initialize, without_storage
from moe_lab.records.identity import digest, option_name
from moe_lab.routers.base import Router
from moe_lab.targets import instantiate, locate

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(cfg: DictConfig) -> torch.device:
    """The device that `cfg.device` means here.

    Raises:
        UnavailableError: it is not there, or does not compute `cfg.dtype` or `cfg.execution`.
    """
    has_cuda = torch.cuda.is_available()
    name = cfg.device.name
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise UnavailableError("device=cuda: torch sees no CUDA device here; use device=cpu or device=auto")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device.name={name}: it must be auto, cpu or cuda.")
    if name == "cpu" and cfg.dtype.name == "fp16":
        raise UnavailableError("dtype=fp16: half precision is not computed on a CPU; use bf16 or fp32")
    if name == "cpu" and cfg.execution.name == "cuda_graph":
        raise UnavailableError("execution=cuda_graph: this run is on a CPU; use execution=eager or compile")
    if name == "cuda" and cfg.dtype.name == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        raise UnavailableError("dtype=bf16: this GPU is older than compute capability 8.0; use fp16 or fp32")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def build_router(cfg: DictConfig, n_experts: int | None = None, top_k: int | None = None) -> Router:
    """A new router of `cfg.router`, for the model's sizes unless others are given.

    Raises:
        UnavailableError: the implementation asked for cannot run here.
        ValueError: the model has no experts and no sizes were given.
    """
    sizes = cfg.model.get("shape") or cfg.model
    n_experts, top_k = n_experts or sizes.get("n_experts"), top_k or sizes.get("top_k")
    if n_experts is None or top_k is None:
        raise ValueError(f"model={cfg.model.name} has no experts: give build_router n_experts and top_k.")
    router = instantiate(cfg.router, n_experts=n_experts, top_k=top_k)
    if not isinstance(router, Router):
        raise ValueError(f"router: {cfg.router._target_} is no moe_lab.routers.base.Router; derive it from that class.")
    return router


def build_experts(cfg: DictConfig) -> ExpertsImpl:
    """The function that `cfg.experts` names."""
    experts: ExpertsImpl = locate(cfg.experts._target_)
    if not callable(experts):
        raise ValueError(f"experts: {cfg.experts._target_} is not a function.")
    return experts


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    cfg: DictConfig, device: torch.device | None = None, donor: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The model of `cfg` in its dtype on its device, parameters filled from `cfg.seed`, in inference mode.

    With `donor`, parameters by name of a model with the same `weights_key`, it shares those tensors.
    """
    device = device or resolve_device(cfg)
    with without_storage() if donor is not None else nullcontext():
        model = _make_model(cfg, device)
    if donor is None:
        initialize(model, cfg.seed)
    else:
        adopt(model, donor, device, cfg.seed)
    return model.eval().requires_grad_(False)


def _make_model(cfg: DictConfig, device: torch.device) -> nn.Module:
    parts: dict[str, Any] = {}
    if "experts" not in cfg.model.get("ignores", ()):
        parts = {
            "make_router": lambda n_experts, top_k: build_router(cfg, n_experts, top_k),
            "experts": build_experts(cfg),
        }
    with _defaults(device, DTYPES[cfg.dtype.name]):
        model: nn.Module = instantiate(cfg.model, **parts)
    return model


def weights_key(cfg: DictConfig, device: torch.device) -> str:
    """Equal for configurations whose models have the same parameters, but for those of their routers."""
    return digest([OmegaConf.to_container(cfg.model, resolve=True), cfg.dtype.name, int(cfg.seed), str(device)])


def check_available(cfg: DictConfig) -> torch.device:
    """The device of `cfg`, if its parts can run there; tensors are made on the meta device, so nothing is allocated.

    Raises:
        UnavailableError: the device, the dtype on it, or an implementation cannot run here.
        ValueError: a key that a part refuses.
    """
    device = resolve_device(cfg)
    require_capturable(cfg, _make_model(cfg, torch.device("meta")))
    return device


def require_capturable(cfg: DictConfig, model: nn.Module) -> None:
    """Raise `UnavailableError` if a part of `model` reads results on the host and `cfg.execution` captures."""
    if cfg.execution.name == "eager":
        return
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        parts = ((cfg.experts, "experts", layer.experts), (cfg.router, "router", layer.router))
        for node, group, part in parts:
            if not getattr(part, "graph_safe", True):
                raise UnavailableError(
                    f"{group}={option_name(node)} reads results on the host, so execution={cfg.execution.name} cannot "
                    "capture it; use execution=eager or another implementation"
                )


def build_input(cfg: DictConfig, model: nn.Module, device: torch.device) -> Tensor:
    """The one input of `model` that `cfg.workload` gives."""
    workload = locate(cfg.workload._target_)
    x: Tensor = workload(
        model=model,
        batch=cfg.batch,
        seq_len=cfg.seq_len,
        seed=cfg.seed,
        device=device,
        dtype=DTYPES[cfg.dtype.name],
        phase=cfg.workload.phase,
    )
    return x
