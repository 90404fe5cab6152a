"""The written pair in ONNX Runtime against the model in torch, on inputs of several shapes.

A debug twin of the graph, over the same `__params__`, gives the routing of each layer too. The error that decides is
against the fp32 reference with that routing forced, for a near-tie may flip an expert and that is no error; which
experts were chosen is checked apart, as in `verify`. Types that ONNX Runtime does not compute on a CPU are checked
through a twin that casts the same weights to fp32: `verified_in_fp32`, never `passed`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from moe_lab.errors import ExportError, MismatchError
from moe_lab.export.pair import MODEL
from moe_lab.measure.layer_probe import LayerProbe
from moe_lab.measure.memory import give_back_free_memory
from moe_lab.measure.tolerances import exact_products, tolerance_of
from moe_lab.models.moe_layer import indexed_moe_layers
from moe_lab.models.parameters import reference_twin
from moe_lab.routers.base import Routing
from moe_lab.routers.contract import members

TOLERANCE = 1e-5  # of ||y - reference|| / ||reference||
_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "onnx-ir", "torch")


def versions() -> dict[str, str]:
    """Of what makes and runs a graph."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_graph(path: Path) -> None:
    """onnx's full check, shapes and types inferred. Raises `ExportError`."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX checker rejects {path.name}: {_first_line(error)}") from error


def load(path: Path, *, optimized: bool) -> onnxruntime.InferenceSession:
    """A session on the file at `path`. Raises `ExportError` if ONNX Runtime cannot take it."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may be at work on these cores
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load {path.name}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def parity(folder: Path, debug: str | None, model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What `parity.json` says.

    Args:
        debug: the file in `folder` with the twin that gives the routing too; None: then the reference routes itself.
        model: on the CPU; its reference twin is what the graph is held against.
        inputs: of the model's dtype where they are not token ids.
    """
    dtype = next(model.parameters()).dtype
    is_wide = dtype != torch.float32  # then the debug twin computes in fp32
    report: dict[str, Any] = {"status": "verified_in_fp32" if is_wide else "passed", "reason": None}
    if is_wide:
        report["reason"] = _why_not(folder / MODEL, dtype)
    try:
        check_graph(folder / MODEL)
        cases = list(_cases(folder, debug, model, inputs, is_wide=is_wide))
        report |= _summary(cases)
        if not report["rel_error"] <= TOLERANCE:
            raise ExportError(f"the relative error is {report['rel_error']:.2e} (allowed: {TOLERANCE:.0e})")
    except (ExportError, MismatchError) as error:
        report |= {"status": "failed", "reason": str(error)}
    return {**report, "tolerance": TOLERANCE, "versions": versions()}


def _why_not(path: Path, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    try:
        load(path, optimized=False)
    except ExportError as error:
        return f"ONNX Runtime does not support {name} here; a copy with the weights cast to fp32 was checked: {error}"
    return f"ONNX Runtime runs {name} in fp32 with casts on a CPU; a copy with the weights cast to fp32 was checked"


def _cases(
    folder: Path, debug: str | None, model: nn.Module, inputs: Sequence[Tensor], *, is_wide: bool
) -> Iterator[dict[str, Any]]:
    """Every input, with ONNX Runtime's optimisations and without."""
    twin = reference_twin(model)
    fed = [x.float() if x.is_floating_point() else x for x in inputs]
    for optimized in (True, False):
        graphs = [name for name in (None if is_wide else MODEL, debug) if name is not None]
        results = []
        for name in graphs:  # one session at a time
            results.append(_outputs(load(folder / name, optimized=optimized), fed))
            give_back_free_memory()
        for number, x in enumerate(fed):
            yield {
                "shape": list(x.shape),
                "optimized": optimized,
                **_compare(twin, x, [outputs[number] for outputs in results]),
            }


def _outputs(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    name = session.get_inputs()[0].name
    try:
        return [[torch.from_numpy(array) for array in session.run(None, {name: x.numpy()})] for x in inputs]
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the graph: {_first_line(error)}") from error


@torch.inference_mode()
def _compare(twin: nn.Module, x: Tensor, results: Sequence[list[Tensor]]) -> dict[str, Any]:
    """One input: outputs of the graph (unless it cannot run) and, last, of the debug twin with its routing."""
    _, *routed = results[-1]
    routings = [Routing(ids_TK, weights_TK) for ids_TK, weights_TK in zip(routed[::2], routed[1::2], strict=True)]
    probe = LayerProbe(twin, twin, tolerance_of(twin, torch.float32, fuses=True))
    try:
        with exact_products():
            reference = twin(x, forced_routing=routings or None).y
            free = twin(x)
    finally:
        probe.close()
    errors = [_error(outputs[0], reference) for outputs in results]
    case = {key: max(error[key] for error in errors) for key in errors[0]}
    case["argmax_agreement"] = min(
        float((outputs[0].argmax(-1) == free.y.argmax(-1)).double().mean()) for outputs in results
    )
    agreement = {}
    for (index, layer), ran, chosen in zip(indexed_moe_layers(twin), routings, free.routings, strict=bool(routings)):
        E = layer.weights.n_experts
        same_T = (members(ran.expert_ids_TK, E) == members(chosen.expert_ids_TK, E)).all(-1)
        agreement[str(index)] = float(same_T.double().mean())
    return {**case, "id_agreement": agreement, "near_ties": probe.near_ties}


def _error(y: Tensor, reference: Tensor) -> dict[str, float]:
    if y.shape != reference.shape:
        raise ExportError(
            f"the output has shape {list(y.shape)}, but the model's output has shape {list(reference.shape)}"
        )
    off = (y.double() - reference.double()).abs()
    relative = float(off.norm() / reference.double().norm().clamp(min=1e-300))
    errors = {"rel_error": relative, "max_abs_error": float(off.max()), "mean_abs_error": float(off.mean())}
    return {key: value if np.isfinite(value) else float("inf") for key, value in errors.items()}


def _summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of all cases, and the cases."""
    worst = {key: max(case[key] for case in cases) for key in ("rel_error", "max_abs_error", "mean_abs_error")}
    layers = cases[0]["id_agreement"]
    return {
        **worst,
        "argmax_agreement": min(case["argmax_agreement"] for case in cases),
        "id_agreement": {layer: min(case["id_agreement"][layer] for case in cases) for layer in layers},
        "near_ties": sum(case["near_ties"] for case in cases),
        "cases": cases,
    }
