"""Exports small enough for a test, and routers that a graph cannot hold."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.onnx._internal._lazy_import import onnxscript_apis

from moe_lab.export import export as exporting
from moe_lab.models.moe_layer import moe_layers
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs import build
from moe_lab.runs.export import make_inputs
from tests import quick

# torch asks for onnxscript's functions in every export, and they are parsed anew for a third of a second.
onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)

ROUTERS = sorted(path.stem for path in Path(quick.__file__).parents[1].glob("conf/router/*.yaml"))
"""Every option of the group."""


def compose(model: str, *overrides: str) -> DictConfig:
    """A quick run's configuration with `export=netron`."""
    return quick.compose(model, "export=netron", *overrides)


def export(
    cfg: DictConfig, folder: Path, make_router: Callable[[int, int], Router] | None = None
) -> tuple[dict[str, Any], nn.Module]:
    """What the record says of the export into `folder`, and the model; `make_router` replaces the routers."""
    model = build.build_model(cfg, torch.device("cpu"))
    if make_router is not None:
        for layer in moe_layers(model):
            layer.router = make_router(layer.weights.n_experts, layer.router.top_k)
    exporting.require_exportable(cfg, model, folder)
    return exporting.export(cfg, model, folder, make_inputs), model


def graph(folder: Path) -> onnx.ModelProto:
    """What `__model__` holds."""
    return onnx.load(folder / "__model__", load_external_data=False)


def functions(folder: Path) -> dict[str, list[str]]:
    """The operators in each function, constants left out."""
    return {
        function.name: [node.op_type for node in function.node if node.op_type != "Constant"]
        for function in graph(folder).functions
    }


class WithoutBody(Router):
    """Computed by an op that has none."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        return Routing(
            *torch.ops.moe_lab.route_triton(logits_TE, None, None, self.top_k, "softmax", 1, 1, "max", True, 1.0)
        )


class ReadsTheHost(Router):
    """Looks at values."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        ids_TK = torch.zeros(logits_TE.shape[0], 1, dtype=torch.int32)
        return Routing(ids_TK, torch.full((logits_TE.shape[0], 1), 1.0 if float(logits_TE.sum()) > 0 else 0.5))


class OtherExperts(SoftmaxTopK):
    """Exported, it chooses the neighbours."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        if torch.compiler.is_exporting():
            return routing._replace(expert_ids_TK=(routing.expert_ids_TK + 1) % self.n_experts)
        return routing


class OtherWeights(SoftmaxTopK):
    """Exported, its weights are 1 % larger."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        return routing._replace(weights_TK=routing.weights_TK * 1.01) if torch.compiler.is_exporting() else routing


def python(*arguments: str) -> list[str]:
    """A command line of this interpreter."""
    return [sys.executable, *arguments]
