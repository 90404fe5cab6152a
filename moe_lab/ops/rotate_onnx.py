"""`rotate` as an ONNX function."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def rotate(x, cos, sin):
        wide = op.Cast(x, to=1)
        first, second = op.Split(wide, axis=-1, num_outputs=2)
        turned = wide * cos + op.Concat(-second, first, axis=-1) * sin
        return op.CastLike(turned, x)

    return rotate
