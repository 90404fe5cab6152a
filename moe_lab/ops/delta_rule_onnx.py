"""`gated_delta_rule` as an ONNX function: a Loop over the tokens."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def gated_delta_rule(q, k, v, g, beta):
        axis_2, axis_3 = op.Constant(value_ints=[2]), op.Constant(value_ints=[3])
        width, end = op.Shape(k, start=3), op.Constant(value_ints=[9223372036854775807])
        keys = op.Transpose(op.Unsqueeze(k, axis_3), perm=[2, 0, 1, 4, 3])  # [S, B, H, d_k, 1]
        queries = op.Transpose(op.Unsqueeze(q, axis_3), perm=[2, 0, 1, 3, 4])  # [S, B, H, 1, d_k]
        values = op.Transpose(op.Unsqueeze(v, axis_3), perm=[2, 0, 1, 3, 4])
        keeps, shares = op.Transpose(op.Exp(g), perm=[2, 0, 1]), op.Transpose(beta, perm=[2, 0, 1])
        last = op.Constant(value_ints=[2, 3])
        zeros = op.Expand(
            op.Constant(value_float=0.0), op.Concat(op.Shape(k, end=2), width, op.Shape(v, start=3), axis=0)
        )
        # The state, and below it the outputs so far: a loop carries one variable.
        kept = op.CastLike(zeros, v)
        for t in range(op.Squeeze(op.Shape(v, start=2, end=3))):
            before = op.Slice(kept, op.Constant(value_ints=[0]), width, axis_2)
            decayed = before * op.Unsqueeze(op.Gather(keeps, t), last)
            key = op.Gather(keys, t)
            read = op.MatMul(op.Transpose(key, perm=[0, 1, 3, 2]), decayed)
            correction = (op.Gather(values, t) - read) * op.Unsqueeze(op.Gather(shares, t), last)
            state = decayed + key * correction
            so_far = op.Slice(kept, width, end, axis_2)
            kept = op.Concat(state, so_far, op.MatMul(op.Gather(queries, t), state), axis=2)
        return op.Slice(kept, width, end, axis_2)

    return gated_delta_rule
