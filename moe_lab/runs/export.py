"""The export of a run: inputs of its own workload, and an export of an earlier run looked at again."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from moe_lab.errors import ExportError, UnavailableError
from moe_lab.runs import build


def exporter() -> ModuleType:
    """The module that exports; what it is made with comes with an extra.

    Raises:
        UnavailableError: that is not installed.
    """
    try:
        return importlib.import_module("moe_lab.export.export")
    except ImportError as error:
        if error.name is not None and error.name.startswith("moe_lab"):
            raise
        raise UnavailableError(f"export=netron needs {error.name}; run pip install 'moe-lab[export]'") from error


def make_inputs(cfg: DictConfig, model: nn.Module, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Inputs of the run's own workload on the host, one of each (batch, seq_len), with seeds of their own."""
    device = torch.device("cpu")
    return [
        build.build_input(cfg, model, device, batch=batch, seq_len=seq_len, seed=cfg.seed + number)
        for number, (batch, seq_len) in enumerate(sizes)
    ]


def export(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Export the model of `cfg`, built on the host, into `folder`; what a record says of it.

    Raises:
        ExportError: the model cannot be exported.
        MismatchError: the pair does not compute what the model does.
    """
    module = exporter()
    model = build.build_model(cfg, torch.device("cpu"))
    module.require_exportable(cfg, model, folder)
    record: dict[str, Any] = module.export(cfg, model, folder, make_inputs)
    return record


def show(folder: Path) -> None:
    """Show the pair in `folder` in Netron, until that is stopped.

    Raises:
        UnavailableError: Netron is not installed.
    """
    importlib.import_module("moe_lab.export.netron").show(folder)


def verify(folder: Path) -> dict[str, Any]:
    """Check the pair in `folder` against its manifest and against the model that this describes.

    Raises:
        ExportError: a file is missing, truncated or changed, or the pair does not compute what the model does.
        ValueError: there is no export in `folder`, or its model cannot be built here.
    """
    module = exporter()

    def rebuild(cfg: DictConfig) -> nn.Module:
        needed, there = build.parameters_of(cfg), (folder / "__params__").stat().st_size
        if needed > there:
            raise ExportError(f"{folder}: the manifest's model has {needed} bytes of weights, __params__ only {there}")
        return build.build_model(cfg, torch.device("cpu"))

    report: dict[str, Any] = module.verify(folder, rebuild, make_inputs)
    return report
