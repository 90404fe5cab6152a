"""What the `_onnx` files share: an op's function in the domain `moe_lab`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import script, values

DOMAIN = "moe_lab"


def function(op: Any) -> Callable[[Any], Any]:
    """Decorator: the ONNX function that the decorated lines say, in the operators of `op` (opset 18 or later).

    onnxscript translates the source: `for` over a range is a Loop, arguments with a Python type are attributes. A loop
    may carry one variable: of several the order, and so the bytes of the graph, would change from process to process.
    """
    decorator: Callable[[Any], Any] = script(values.Opset(DOMAIN, 1), default_opset=op)
    return decorator
