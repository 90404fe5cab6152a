"""The traced graph as a person would draw it: weights under their names, constants beside their use, plain reshapes.

torch.onnx's own optimizer is not used: it folds transposed weights into new ones and merges equal weights.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from moe_lab.export.form import WRAPPED

Scope = tuple[tuple[str, str], ...]
"""The modules that a node is inside of, outermost first: (path, class name) of each."""

_SMALL = 1024  # bytes: what is folded is a shape or a small table


def simplify(model: ir.Model, names: Iterable[str]) -> None:
    """In place; `names` are those of the weights. Every node then has its `scope_of`."""
    graph = model.graph
    weights = {f"{WRAPPED}.{name}" for name in names} & set(graph.initializers)
    _fold(model, weights)
    _note_scopes(graph)
    _plain_reshapes(graph)
    _drop_what_does_nothing(graph)
    passes.RemoveUnusedNodesPass()(model)
    _own_constants(graph, weights)
    _move_in(graph)
    passes.RemoveUnusedNodesPass()(model)
    for name in sorted(weights & set(graph.initializers)):
        value = graph.initializers.pop(name)
        value.name = name.removeprefix(f"{WRAPPED}.")
        graph.initializers[value.name] = value


def scope_of(node: ir.Node) -> Scope:
    """The modules around a node."""
    scope: Scope = node.meta["scope"]
    return scope


def _fold(model: ir.Model, weights: set[str]) -> None:
    """Compute what depends on no input; weights stay as they are."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in weights for v in node.inputs) else None

    log = logging.getLogger("onnxscript.optimizer._constant_folding")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        optimizer.fold_constants(model, input_size_limit=_SMALL, output_size_limit=_SMALL, should_fold=should_fold)
    finally:
        log.setLevel(before)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _note_scopes(graph: ir.Graph) -> None:
    """From torch's metadata, which is text; a node that a pass made stands where the one before it does."""
    scope: Scope = ()
    for node in graph:
        paths = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "None"))
        kinds = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "None"))
        if paths is not None and kinds is not None:
            # First the traced module itself, last the node.
            modules = zip(paths[:-1], kinds[:-1], strict=True)
            scope = tuple(
                (path.removeprefix(f"{WRAPPED}."), kind.rsplit(".", 1)[-1])
                for path, kind in modules
                if path.startswith(WRAPPED)
            )
        node.meta["scope"] = scope


def _constant(value: ir.Attr, name: str, scope: Scope) -> ir.Node:
    node = ir.Node("", "Constant", [], [value])
    node.outputs[0].name, node.meta["scope"] = name, scope
    return node


def _plain_reshapes(graph: ir.Graph) -> None:
    """Targets as constants, 0 for an axis that stays as it is; or, of two new free axes, the shape of another value.

    The shapes that torch knows say which; it computes every target from the lengths of the graph's inputs.
    """
    before: list[ir.Value] = [*graph.inputs]
    for node in graph:
        if node.op_type == "Reshape" and not node.domain:
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            if x.shape is not None and y.shape is not None:
                _plain_reshape(graph, node, x, y, before)
        before += node.outputs


def _plain_reshape(graph: ir.Graph, node: ir.Node, x: ir.Value, y: ir.Value, before: list[ir.Value]) -> None:
    assert x.shape is not None and y.shape is not None
    target = []
    for axis, size in enumerate(y.shape.dims):
        stays = axis < len(x.shape) and x.shape[axis] == size and (isinstance(size, int) or size.value is not None)
        target.append(size if isinstance(size, int) else 0 if stays else -1)
    if target.count(-1) <= 1 and not any(size == 0 for size in y.shape.dims):
        shape_node = _constant(ir.AttrInt64s("value_ints", target), f"{y.name}_shape", scope_of(node))
    else:
        known = all(isinstance(size, int) or size.value is not None for size in y.shape.dims)
        like = next((v for v in reversed(before) if known and v.shape is not None and v.shape == y.shape), None)
        if like is None:
            return
        shape_node = ir.Node("", "Shape", [like])
        shape_node.outputs[0].name, shape_node.meta["scope"] = f"{y.name}_shape", scope_of(node)
    graph.insert_before(node, shape_node)
    node.replace_input_with(1, shape_node.outputs[0])
    node.attributes.pop("allowzero", None)


def _drop_what_does_nothing(graph: ir.Graph) -> None:
    """Casts to the type that is there."""
    for node in list(graph):
        if node.op_type == "Cast" and not node.domain and not node.outputs[0].is_graph_output():
            x = node.inputs[0]
            if x is not None and x.dtype is not None and x.dtype == ir.DataType(node.attributes["to"].as_int()):
                ir.convenience.replace_all_uses_with(node.outputs[0], x)
                graph.remove(node, safe=True)


def _own_constants(graph: ir.Graph, weights: set[str]) -> None:
    """Every use of a small constant has a node of its own, in the module of its user: no weight among the weights."""
    for name in [name for name in graph.initializers if name not in weights]:
        value = graph.initializers[name]
        assert value.const_value is not None
        _copy_to_users(graph, value, ir.AttrTensor("value", value.const_value))
        if not value.uses():
            del graph.initializers[name]
    for node in list(graph):
        if node.op_type == "Constant" and not node.domain:
            (attribute,) = node.attributes.values()
            _copy_to_users(graph, node.outputs[0], attribute)


def _copy_to_users(graph: ir.Graph, value: ir.Value, content: ir.Attr) -> None:
    for number, (user, index) in enumerate(list(value.uses())):
        copy = _constant(content, f"{value.name}_{number}", scope_of(user))
        copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
        graph.insert_before(user, copy)
        user.replace_input_with(index, copy.outputs[0])


def _move_in(graph: ir.Graph) -> None:
    """A length of the input that only one module reads is read there."""
    for node in reversed(list(graph)):
        users = [user for output in node.outputs for user, _ in output.uses()]
        if users and node.op_type in ("Shape", "Squeeze"):
            around = scope_of(users[0])
            for user in users[1:]:
                other = scope_of(user)
                same = 0
                while same < min(len(around), len(other)) and around[same] == other[same]:
                    same += 1
                around = around[:same]
            if len(around) > len(scope_of(node)) and around[: len(scope_of(node))] == scope_of(node):
                node.meta["scope"] = around
