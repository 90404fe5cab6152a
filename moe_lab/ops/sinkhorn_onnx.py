"""`sinkhorn_scores` as an ONNX function: the iterations are a Loop."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def sinkhorn_scores(logits, iters: int, temperature: float, tolerance: float):
        wide = op.Cast(logits, to=1)
        n_tokens, n_experts = op.Shape(wide, end=1), op.Shape(wide, start=1)
        axis_0, axis_1 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        shifted = op.Max(wide - op.ReduceMax(wide, axis_1), op.Constant(value_float=-1e30))
        log_k = shifted / op.Constant(value_float=temperature)
        log_share = op.Log(op.Cast(n_tokens, to=1) / op.Cast(n_experts, to=1))
        log_b = op.Expand(op.Constant(value_float=0.0), n_experts)
        for _ in range(op.Constant(value_int=iters)):
            columns = op.ReduceLogSumExp(op.LogSoftmax(log_k + log_b, axis=1), axis_0, keepdims=0)
            step = log_share - columns
            off = op.ReduceMax(op.Abs(op.Exp(op.Neg(step)) - op.Constant(value_float=1.0)), axis_0)
            is_near = op.And(
                op.Constant(value_float=tolerance) > op.Constant(value_float=0.0),
                off <= op.Constant(value_float=tolerance),
            )
            log_b = log_b + op.Where(is_near, op.Constant(value_float=0.0), step)
        log_p = op.LogSoftmax(log_k + log_b, axis=1)
        return op.Where(n_tokens == op.Constant(value_ints=[1]), wide, log_p)

    return sinkhorn_scores
