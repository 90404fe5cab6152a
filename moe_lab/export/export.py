"""export=netron: from a run's model to a folder with the pair, its manifest and its parity."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from moe_lab.config.checks import validate
from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.export import pair
from moe_lab.export.form import Form
from moe_lab.export.parity import check_graph, parity, versions
from moe_lab.export.trace import trace
from moe_lab.measure.memory import available_bytes
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import copied_to, parameter_bytes
from moe_lab.ops.library import DTYPES
from moe_lab.records import identity

_DEBUG = "__debug__"
_MOST_TOKENS = 1 << 22  # of an input to verify with
MakeInputs = Callable[[DictConfig, nn.Module, list[tuple[int, int]]], list[Tensor]]
"""(cfg, model, sizes (batch, seq_len)) -> an input of the model for each."""


def export(cfg: DictConfig, model: nn.Module, folder: Path, make_inputs: MakeInputs) -> dict[str, Any]:
    """Write the pair of `model` into `folder` and check it against the model; returns what the record says of it.

    Raises:
        ExportError: it cannot be traced or written as promised.
        MismatchError: ONNX Runtime computes something else than torch; then the folder is not there.
    """
    begun = time.perf_counter()
    model = _on_host(model)
    state = model.state_dict()
    n_layers = len(moe_layers(model))
    y_name = "logits" if getattr(model, "vocab_size", None) is not None else "y"
    routed = [f"{what}_{layer}" for layer in range(n_layers) for what in ("expert_ids", "weights")]
    with pair.beside(folder) as part, torch.inference_mode(False):
        traced = _traced(cfg, model, wide=False)
        graph = pair.finished(traced, list(state), [y_name], cfg.export.view)
        pair.save(graph, part, state)
        files = pair.described(part)
        report: dict[str, Any] = {"status": "not_verified", "reason": "export.verify=false"}
        if cfg.export.verify:
            if cfg.dtype.name != "fp32":
                traced = _traced(cfg, model, wide=True)
            debug = pair.finished(traced, list(state), [y_name, *routed], cfg.export.view)
            pair.on_same_params(debug, part, _DEBUG)
            report = parity(part, _DEBUG, model, make_inputs(cfg, model, _sizes(cfg, model)))
            (part / _DEBUG).unlink()
        report["sha256"] = {name: file["sha256"] for name, file in files.items()}
        pair.write_json(part / pair.PARITY, report)
        manifest = _manifest(cfg, files, graph, y_name)
        pair.write_json(part / pair.MANIFEST, manifest)
        entry = {
            "dir": str(folder),
            **{key: manifest[key] for key in ("opset", "view", "dynamic")},
            **manifest["counts"],
            "model_bytes": files[pair.MODEL]["bytes"],
            "params_bytes": files[pair.PARAMS]["bytes"],
            "seconds": time.perf_counter() - begun,
            "parity": {key: value for key, value in report.items() if key not in ("cases", "versions", "sha256")},
        }
        if report["status"] == "failed":
            raise MismatchError("export", f"export={cfg.export.name}: {report['reason']}", found=entry)
    return entry


def verify(folder: Path, rebuild: Callable[[DictConfig], nn.Module], make_inputs: MakeInputs) -> dict[str, Any]:
    """Check a pair that was written earlier against its manifest and against the model that this describes.

    Returns:
        As `parity`; of a type that ONNX Runtime does not compute, the graph is checked and nothing is computed.

    Raises:
        ExportError: a file is missing, truncated or changed, or the pair does not compute what the model does.
        ValueError: there is no export in `folder`, or its model cannot be built here.
    """
    manifest = pair.read_manifest(folder)
    pair.require_intact(folder, manifest)
    n_weights = pair.require_inside(folder)
    check_graph(folder / pair.MODEL)
    try:
        cfg = OmegaConf.create(manifest["config"])
        validate(cfg)
        _require_fit(cfg, n_weights)
        if cfg.dtype.name != "fp32":
            reason = (
                "the files are intact and the ONNX checker accepts the graph; "
                f"outputs in {cfg.dtype.name} are not compared"
            )
            return {"status": "intact", "reason": reason}
        model = rebuild(cfg)
        inputs = make_inputs(cfg, model, _sizes(cfg, model))
    except (ExportError, UnavailableError, ValueError):
        raise
    except Exception as error:  # of a configuration that no run of ours has left
        raise ValueError(f"{folder}: the manifest's config does not describe a model: {error}.") from error
    report = parity(folder, None, model, inputs)
    if report["status"] == "failed":
        raise ExportError(f"{folder}: {report['reason']}")
    return report


def _require_fit(cfg: DictConfig, n_weights: int) -> None:
    """Raise `ExportError` before anything is built that would never end."""
    if cfg.model.get("n_layers", 0) > n_weights:
        raise ExportError(f"model.n_layers={cfg.model.n_layers} of the manifest: the graph has {n_weights} weights")
    if int(cfg.batch) * int(cfg.seq_len) > _MOST_TOKENS:
        raise ExportError(f"batch={cfg.batch}, seq_len={cfg.seq_len} of the manifest: too many tokens to compare")


def require_exportable(cfg: DictConfig, model: nn.Module, folder: Path) -> None:
    """Raise before anything is timed if `export` would refuse.

    Raises:
        UnavailableError: the router cannot be expressed in ONNX, or there is not enough memory for a copy on the host.
        ValueError: the folder cannot be written.
    """
    for layer in moe_layers(model):
        if layer.router.not_exportable is not None:
            raise UnavailableError(
                f"export={cfg.export.name}: router={identity.option_name(cfg.router)} cannot be expressed in ONNX: "
                f"{layer.router.not_exportable}; use another router or export=none"
            )
    n_bytes = parameter_bytes(model)
    if any(parameter.is_cuda for parameter in model.parameters()):
        there = available_bytes(torch.device("cpu"))
        if there is not None and there < n_bytes:
            raise UnavailableError(
                f"export={cfg.export.name}: the model is copied to the host first, which needs {n_bytes / 1e9:.1f} GB, "
                f"but only {there / 1e9:.1f} GB are free; use export=none"
            )
    is_default = cfg.export.dir is None  # below the run's own folder: that is replaced with the run
    pair.require_room(folder, overwrite=is_default or cfg.export.overwrite, n_bytes=n_bytes)


def _on_host(model: nn.Module) -> nn.Module:
    if not any(parameter.is_cuda for parameter in model.parameters()):
        return model
    return copied_to(model, torch.device("cpu"))


def axes(model: Any, dynamic: Sequence[str]) -> list[str | None]:
    """The name of each axis of the model's input, None where it is fixed: because it always is, or as asked for."""
    shape, other_batch, other_length = model.input_shape(2, 3), model.input_shape(5, 3), model.input_shape(2, 7)
    found: list[str | None] = []
    for axis, size in enumerate(shape):
        of = [name for name, other in (("batch", other_batch), ("seq_len", other_length)) if other[axis] != size]
        name = of[0] if len(of) == 1 else "tokens"
        found.append(name if set(of) & set(dynamic) else None)
    return found


def _traced(cfg: DictConfig, model: Any, *, wide: bool) -> Any:
    dynamic = list(cfg.export.dynamic)
    # What is traced with length 1 stays 1.
    batch = max(cfg.batch, 2) if "batch" in dynamic else cfg.batch
    length = max(cfg.seq_len, 3) if "seq_len" in dynamic else cfg.seq_len
    shape = model.input_shape(batch, length)
    takes_ids = model.vocab_size is not None
    dtype = torch.int64 if takes_ids else torch.float32 if wide else DTYPES[cfg.dtype.name]
    x, name = torch.zeros(shape, dtype=dtype), "ids" if takes_ids else "x"
    return trace(Form(model, wide=wide), x, axes(model, dynamic), cfg.export.opset, name=name)


def _sizes(cfg: DictConfig, model: Any) -> list[tuple[int, int]]:
    """(batch, seq_len) of the inputs to compare on: the run's first; along free axes also one token and odd sizes."""
    dynamic, B, S = cfg.export.dynamic, cfg.batch, cfg.seq_len
    wanted = [(B, S), (1, S), (1, 1), (3, S // 2 + 1), (5, 7), (7, 11)]
    longest = getattr(model, "max_positions", None) or max(S, 11)
    shapes = {
        model.input_shape(b, s): (b, s)
        for batch, length in wanted
        if (b := batch if "batch" in dynamic else B) and (s := min(length, longest) if "seq_len" in dynamic else S)
    }
    return list(shapes.values())


def _manifest(cfg: DictConfig, files: dict[str, Any], graph: Any, y_name: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    config["export"] = {**config["export"], "dir": None}
    kept = ("model", "router", "experts", "workload", "device", "dtype", "execution", "measure", "export")
    return {
        "schema": 1,
        "name": cfg.name,
        "opset": cfg.export.opset,
        "view": cfg.export.view,
        "dynamic": list(cfg.export.dynamic),
        "input": {"name": graph.graph.inputs[0].name, "shape": [str(size) for size in graph.graph.inputs[0].shape]},
        "output": y_name,
        "counts": pair.counts(graph),
        "files": files,
        "versions": versions(),
        "config": {key: config[key] for key in (*kept, "batch", "seq_len", "seed", "name", "overrides", "sweep")},
    }
