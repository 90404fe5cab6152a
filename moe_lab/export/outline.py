"""Modules become functions of the graph, as nested as the modules are; equal ones share one function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

from moe_lab.export.simplify import Scope, scope_of
from moe_lab.ops.onnx_function import DOMAIN

_TRANSPARENT = ("ModuleList",)


def outline(model: ir.Model) -> None:
    """In place. A module that is one op of our own stays that node."""
    nodes = list(model.graph)
    Outliner(model).run(nodes, depth=1)  # the first module is the model itself
    passes.TopologicalSortPass()(model)


class Outliner:
    """Groups nodes by module and turns each group into a call."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.functions: dict[object, ir.Function] = {}
        self.names: Counter[str] = Counter()

    def run(self, nodes: Sequence[ir.Node], depth: int) -> list[ir.Node]:
        """The nodes that stand for `nodes` when all modules at `depth` of their scopes, and below, are calls."""
        members: dict[tuple[str, str], list[ir.Node]] = {}
        rest: list[ir.Node] = []
        for node in nodes:
            scope = scope_of(node)
            if len(scope) > depth:
                members.setdefault(scope[depth], []).append(node)
            else:
                rest.append(node)
        for (path, kind), inside in members.items():
            scope = scope_of(inside[0])[:depth]
            grouped = self.run(inside, depth + 1)
            ops = [node for node in grouped if node.op_type != "Constant"]
            if kind in _TRANSPARENT or (len(ops) == 1 and ops[0].domain == DOMAIN):
                ops[0].name = path if len(ops) == 1 else ops[0].name
                rest += grouped
            else:
                rest.append(self.call(path, kind, grouped, scope))
        return rest

    def call(self, path: str, kind: str, nodes: Sequence[ir.Node], scope: Scope) -> ir.Node:
        """Replace `nodes` by a call of the function that they are."""
        graph, inside = self.model.graph, set(nodes)
        ordered = [node for node in graph if node in inside]
        produced = {value: None for node in ordered for value in node.outputs}  # in order
        inputs = list(dict.fromkeys(v for node in ordered for v in node.inputs if v is not None and v not in produced))
        inputs.sort(key=lambda value: value.name in graph.initializers)  # weights last
        outputs = [v for v in produced if v.is_graph_output() or any(user not in inside for user, _ in v.uses())]
        call = ir.Node(DOMAIN, kind, inputs, num_outputs=len(outputs), name=path)
        call.meta["scope"] = scope
        for new, old in zip(call.outputs, outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
        graph.insert_after(ordered[-1], call)
        for new, old in zip(call.outputs, outputs, strict=True):
            for user, index in list(old.uses()):
                if user not in inside:
                    user.replace_input_with(index, new)
            for index, value in enumerate(graph.outputs):
                if value is old:
                    graph.outputs[index] = new
        graph.remove(ordered)
        self._define(call, kind, path, inputs, outputs, ordered)
        return call

    def _define(
        self,
        call: ir.Node,
        kind: str,
        path: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        nodes: Sequence[ir.Node],
    ) -> None:
        """Make `nodes`, which are in no graph any more, the body of the function that `call` calls."""
        formal = [ir.Value(name=_within(path, value.name), shape=value.shape, type=value.type) for value in inputs]
        swap = dict(zip(inputs, formal, strict=True))
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value in swap:
                    node.replace_input_with(index, swap[value])
        opsets = {"": self.model.opset_imports[""], DOMAIN: 1}
        body = ir.Graph(formal, outputs, nodes=nodes, opset_imports=opsets)
        key = (kind, _structure(body))
        if key not in self.functions:
            self.names[kind] += 1
            name = kind if self.names[kind] == 1 else f"{kind}_{self.names[kind]}"
            function = self.functions[key] = ir.Function(DOMAIN, name, graph=body, attributes=[])
            self.model.functions[function.identifier()] = function
        call.op_type = self.functions[key].name


def _within(path: str, name: str | None) -> str:
    """A weight's name as seen from the module at `path`: less what both have in common."""
    assert name is not None
    outer, inner = path.split("."), name.split(".")
    same = 0
    while same < min(len(outer), len(inner) - 1) and outer[same] == inner[same]:
        same += 1
    return ".".join(inner[same:])


def _structure(graph: ir.Graph) -> object:
    """Equal for graphs that compute the same: names do not count."""
    numbers: dict[ir.Value | None, int] = {None: -1}
    for value in graph.inputs:
        numbers[value] = len(numbers)
    rows = []
    for node in graph:
        attributes = tuple((name, _content(node.attributes[name])) for name in sorted(node.attributes))
        rows.append((node.domain, node.op_type, tuple(numbers[value] for value in node.inputs), attributes))
        for value in node.outputs:
            numbers[value] = len(numbers)
    return len(graph.inputs), tuple(rows), tuple(numbers[value] for value in graph.outputs)


def _content(attribute: ir.Attr) -> object:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
    assert attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS), "a module contains a Loop of torch"
    return repr(attribute.value)
