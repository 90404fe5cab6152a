"""The two files, `__model__` (the graph) and `__params__` (every weight), and the folder that holds them.

The folder is written beside its target and renamed: a failed export leaves nothing behind, and readers see the old pair
or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
from onnx_ir.passes import common as passes
from torch import Tensor

from moe_lab.errors import ExportError
from moe_lab.export.outline import outline
from moe_lab.export.simplify import simplify
from moe_lab.ops.library import OPS
from moe_lab.ops.onnx_function import DOMAIN

MODEL, PARAMS, MANIFEST, PARITY = "__model__", "__params__", "manifest.json", "parity.json"
_ALIGNMENT = 4096  # of every weight in the file, so that it can be mapped
_MANIFEST_BYTES = 1 << 20  # far more than one has
_MORE_BYTES = 1 << 20  # for what is not a weight


def finished(traced: ir.Model, names: Sequence[str], outputs: Sequence[str], view: str) -> ir.Model:
    """The graph that is written: the first outputs of the traced one, under these names, its ops with their bodies.

    Args:
        names: of the weights, as in the state_dict.
        view: modules (each a function) or flat.
    """
    model = traced.clone()
    graph = model.graph
    while len(graph.outputs) > len(outputs):
        graph.outputs.pop()
    simplify(model, names)
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    if view == "modules":
        outline(model)
    _attach_bodies(model)
    _constants_as_tensors(model)
    passes.RemoveUnusedOpsetsPass()(model)
    _forget_the_machine(model)
    return model


def _attach_bodies(model: ir.Model) -> None:
    """The function of every op of our own that is used."""
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    opset = getattr(onnxscript, f"opset{model.opset_imports['']}")
    for name in sorted({node.op_type for node in nodes if node.domain == DOMAIN and node.op_type in OPS}):
        module = OPS[name].onnx
        assert module is not None, f"{name} was traced without a body"
        body = importlib.import_module(module).body(opset)
        function = ir.serde.deserialize_function(body.to_function_proto())
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def _constants_as_tensors(model: ir.Model) -> None:
    """Of the ways to write a constant Netron shows this one beside its use, and the others as nodes."""
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for node in (node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type != "Constant":
            continue
        ((name, attribute),) = node.attributes.items()
        if name != "value" and not attribute.is_ref():
            dtype = ir.DataType.FLOAT if name.startswith("value_float") else ir.DataType.INT64
            del node.attributes[name]
            node.attributes.add(ir.AttrTensor("value", ir.tensor(attribute.value, dtype=dtype)))


def _forget_the_machine(model: ir.Model) -> None:
    """No source paths and no versions of tools: the same configuration gives the same bytes."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
            value.metadata_props.clear()
    for weight in model.graph.initializers.values():
        weight.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "moe-lab", None, None
    model.graph.name = "moe_lab"


def save(model: ir.Model, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the pair into `folder`.

    Raises:
        ExportError: a weight of `state` is not in the file under its name, or one is not in `__params__`.
    """
    ir.save(
        model, folder / MODEL, external_data=PARAMS, size_threshold_bytes=0, alignment=_ALIGNMENT, align_threshold=0
    )
    (folder / PARAMS).touch()  # where there is no weight at all
    written = onnx.load(folder / MODEL, load_external_data=False)
    places = {tensor.name: tensor for tensor in written.graph.initializer}
    inline = [name for name, tensor in places.items() if tensor.data_location != onnx.TensorProto.EXTERNAL]
    if inline:
        raise ExportError(f"weight {inline[0]} was not moved out of the graph ({len(inline)} in all)")
    tied: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    lost = [names[0] for names in tied.values() if not set(names) & set(places)]
    if lost:
        raise ExportError(f"weight {lost[0]} is not in the graph under its name ({len(lost)} in all)")


def on_same_params(model: ir.Model, folder: Path, name: str) -> Path:
    """Write another graph over the weights that lie in `folder` already."""
    kept = ir.load(folder / MODEL).graph.initializers
    for key, value in model.graph.initializers.items():
        value.const_value = kept[key].const_value
    ir.save(model, folder / name)
    return folder / name


def require_room(folder: Path, *, overwrite: bool, n_bytes: int) -> None:
    """Raise `ValueError` if a pair with `n_bytes` of weights cannot be written to `folder`."""
    if folder.exists() and not overwrite:
        raise ValueError(
            f"export.dir={folder}: already exists; choose another folder or set export.overwrite=true to replace it."
        )
    if folder.exists() and not (folder / MODEL).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"export.dir={folder}: not an export, so export.overwrite=true does not replace it; choose another folder."
        )
    above = next(path for path in folder.absolute().parents if path.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        raise ValueError(f"export.dir={folder}: cannot write to {above}; choose another folder.")
    free = shutil.disk_usage(above).free
    if free < n_bytes + _MORE_BYTES:
        raise ValueError(
            f"export.dir={folder}: the weights need {n_bytes / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free; "
            "choose a folder on another disk."
        )


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, that takes its name and place at the end, or is gone if something fails."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.part-*"):
        if not _lives(int(left.suffix.removeprefix(".part-"))):
            shutil.rmtree(left)  # of an export that was killed
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        yield part
        old = part.with_name(f"{part.name}.old")
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of both files."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in (MODEL, PARAMS)
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export, which anybody may have written. Raises `ValueError` if there is none."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError(f"larger than {_MANIFEST_BYTES} bytes")
        manifest: dict[str, Any] = json.loads(path.read_text())
        described, config = manifest["files"], manifest["config"]
        if set(described) != {MODEL, PARAMS}:
            raise ValueError(f"files: must be {MODEL} and {PARAMS}, not {', '.join(map(str, described))[:80]}")
        for name, entry in described.items():
            n_bytes = entry["bytes"]
            if isinstance(n_bytes, bool) or not isinstance(n_bytes, int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"files.{name}: must have bytes, an integer, and sha256, a text")
        if not isinstance(config, dict):
            raise ValueError("config: must be a mapping")
    except KeyError as error:
        raise ValueError(f"{folder}: no export found ({MANIFEST}: {error} is missing).") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: no export found ({MANIFEST}: {' '.join(str(error).split())}).") from error
    return manifest


def require_intact(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise `ExportError` if a file of the pair is not as the manifest says, or leads out of the folder."""
    for name, written in manifest["files"].items():
        path = folder / name
        if path.is_symlink():
            raise ExportError(f"{path} is a link; an export has its own files")
        if not path.is_file():
            raise ExportError(f"{path} is missing")
        size = path.stat().st_size
        if size != written["bytes"]:
            problem = "truncated" if size < written["bytes"] else "too long"
            raise ExportError(f"{path} is {problem}: {size} bytes instead of {written['bytes']}")
        if sha256(path) != written["sha256"]:
            raise ExportError(f"{path} was changed: its sha256 does not match the manifest")


def require_inside(folder: Path) -> int:
    """The number of weights, if every one lies in `__params__`. Raises `ExportError` if one lies elsewhere."""
    try:
        model = onnx.load(folder / MODEL, load_external_data=False)
    except Exception as error:  # protobuf's, and its decoder's own
        raise ExportError(f"{folder / MODEL} is not an ONNX file ({type(error).__name__})") from error
    size = (folder / PARAMS).stat().st_size
    for tensor in _tensors(model):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location", PARAMS) != PARAMS:
            raise ExportError(f"weight {tensor.name} lies in {where['location']}; every weight must lie in {PARAMS}")
        numbers = [where.get("offset", "0"), where.get("length", "0")]
        if not all(number.isdecimal() and len(number) < 20 for number in numbers) or sum(map(int, numbers)) > size:
            raise ExportError(f"weight {tensor.name} lies outside of {PARAMS}")
    return len(model.graph.initializer)


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor of a protobuf message, in attributes, subgraphs and functions too."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                yield from _tensors(child)


def write_json(path: Path, content: Any) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def counts(model: ir.Model) -> dict[str, int]:
    """Nodes of the graph itself and of all functions (constants too), functions, weights."""
    inside = sum(len(list(function)) for function in model.functions.values())
    return {
        "nodes": len(list(model.graph)),
        "nodes_in_functions": inside,
        "functions": len(model.functions),
        "weights": len(model.graph.initializers),
    }
