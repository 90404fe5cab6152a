"""From a module to a flat ONNX graph, by torch.onnx; the custom ops stay nodes of their own."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, nn

from moe_lab.errors import ExportError
from moe_lab.ops.library import OPS, Op
from moe_lab.ops.onnx_function import DOMAIN

_ATTRIBUTES = {
    "FloatType": OpSchema.AttrType.FLOAT,
    "IntType": OpSchema.AttrType.INT,
    "BoolType": OpSchema.AttrType.INT,
}
_TYPES = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double", "int32", "int64", "bool")]


def trace(module: nn.Module, x: Tensor, axes: Sequence[str | None], opset: int, *, name: str = "x") -> ir.Model:
    """The graph of `module`, a function of x.

    Args:
        name: of the graph's input.
        x: an example; where an axis has a name, it must be longer than 1.
        axes: the name of each axis that stays free, None for one that is fixed.
        opset: version of ONNX's operators.

    Raises:
        ExportError: torch cannot trace or translate it, or a named axis became fixed.
    """
    free = {axis: torch.export.Dim.DYNAMIC for axis, name in enumerate(axes) if name is not None}
    with warnings.catch_warnings(), _quiet(), _translations() as table:
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                (x,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(free,),
                custom_translation_table=table,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"torch cannot export the model: {_cause(error, axes)}") from error
    assert program is not None
    model: ir.Model = program.model
    model.graph.inputs[0].name = name
    _name_axes(model, axes)
    return model


def _name_axes(model: ir.Model, axes: Sequence[str | None]) -> None:
    """torch calls the lengths s27 and s77; a length of which they are is an expression of them."""
    shape = model.graph.inputs[0].shape
    assert shape is not None
    names: dict[str, str] = {}
    for axis, name in enumerate(axes):
        size = shape[axis]
        if name is not None and isinstance(size, int):
            raise ExportError(_fixed(name, size))
        if name is not None:
            names[str(size)] = name
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                assert value.shape is not None
                value.shape[axis] = re.sub(r"\b[su]\d+\b", lambda found: names.get(found[0], found[0]), size.value)


def _fixed(axis: str | None, size: object) -> str:
    return (
        f"axis {axis} is fixed to {size}: the model works for no other length; "
        "remove it from export.dynamic or fix the model"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the graphs and warnings that torch's exporter prints; errors are in the exception."""
    names = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException, axes: Sequence[str | None]) -> str:
    """One line: the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error)):
        return (
            f"the op {missing[1]} has no ONNX body; pass one with moe_lab.ops.library.register(..., onnx=MODULE), or "
            "use other ops if torch.compiler.is_exporting()"
        )
    if fixed := re.search(r"static shape of (\d+) for dimension .*shape\[(\d+)\]", str(error)):
        return _fixed(axes[int(fixed[2])], fixed[1])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _translations() -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """How torch.onnx writes each custom op that has a body, as one node; and a stable sort, which it cannot translate.

    onnxscript makes a node only of an op whose schema the process knows. onnx's checker would then trust the schema,
    which infers no types, rather than the body in the graph, so it is forgotten afterwards.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: _stable_sort}
    known = []
    try:
        for op in OPS.values():
            if op.onnx is not None:
                onnx.defs.register_schema(_schema(op))
                known.append(op.name)
                table[getattr(torch.ops.moe_lab, op.name).default] = _node(op)
        yield table
    finally:
        for name in known:
            onnx.defs.deregister_schema(name, 1, DOMAIN)


def _kinds(op: Op) -> dict[str, str]:
    return {argument.name: argument.type.kind() for argument in op.schema.arguments}


def _schema(op: Op) -> OpSchema:
    """Tensors are inputs, numbers attributes; each may be of any type."""
    inputs = [name for name, kind in _kinds(op).items() if kind == "TensorType"]
    outputs = [f"y{index}" for index in range(len(op.schema.returns))]
    return OpSchema(
        op.name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in inputs],
        outputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in outputs],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTES[kind], required=True)
            for name, kind in _kinds(op).items()
            if kind in _ATTRIBUTES
        ],
        type_constraints=[(f"T_{name}", _TYPES, "") for name in (*inputs, *outputs)],
    )


def _node(op: Op) -> Callable[..., Any]:
    kinds = _kinds(op)
    make = getattr(values.Opset(DOMAIN, 1), op.name)

    def translate(*arguments: Any, **named: Any) -> Any:
        given = dict(zip(kinds, arguments, strict=False)) | named
        return make(
            *(given[name] for name, kind in kinds.items() if kind == "TensorType"),
            **{name: given[name] for name, kind in kinds.items() if kind in _ATTRIBUTES},
        )

    return translate


def _stable_sort(x: Any, dim: int = -1, descending: bool = False, stable: bool = True) -> Any:
    """TopK of all: it orders ties by their place."""
    op: Any = onnxscript.opset18
    return op.TopK(
        x, op.Gather(op.Shape(x), op.Constant(value_ints=[dim])), axis=dim, largest=int(descending), sorted=1
    )
