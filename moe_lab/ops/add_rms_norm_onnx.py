"""`add_rms_norm` as an ONNX function."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def add_rms_norm(x, residual, weight, eps: float):
        total = x + residual
        wide = op.Cast(total, to=1)
        mean = op.ReduceMean(wide * wide, op.Constant(value_ints=[-1]), keepdims=1)
        normed = wide / op.Sqrt(mean + op.Constant(value_float=eps)) * op.Cast(weight, to=1)
        return op.CastLike(normed, x), total

    return add_rms_norm
