"""`fill_up` as an ONNX function: the rounds are a Loop."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def fill_up(ids, scores, room):
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        axis_0, axis_1, axis_2 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
        n_experts, n_slots = op.Squeeze(op.Shape(scores, start=1)), op.Squeeze(op.Shape(ids, start=1))
        experts = op.Unsqueeze(op.Range(zero, n_experts, one), axis_0)
        filled = op.Cast(ids, to=7)
        for _ in range(n_slots + n_experts):
            named = op.Cast(op.Unsqueeze(filled, axis_2) == op.Unsqueeze(experts, axis_0), to=7)
            has = op.ReduceSum(named, axis_1, keepdims=0)
            left = room - op.ReduceSum(has, axis_0, keepdims=0)
            closed = op.Or(has > zero, left <= zero)
            wanted = op.Where(closed, op.Constant(value_float=float("-inf")), scores)
            best_score, best = op.TopK(wanted, op.Constant(value_ints=[1]), axis=1)
            free = op.Cast(filled < zero, to=7)
            asks = op.And(op.ReduceMax(free, axis_1) > zero, op.Not(op.IsInf(best_score)))
            asked = op.Where(asks, best, op.Constant(value_int=-1))
            asks_expert = op.Cast(asked == experts, to=7)
            among_first = op.Cast(op.CumSum(asks_expert, zero) <= left, to=7)
            served = op.ReduceMax(asks_expert * among_first, axis_1) > zero
            first_free = op.And(free > zero, op.CumSum(free, one) == one)
            filled = op.Where(op.And(first_free, served), asked, filled)
        return op.Cast(filled, to=6)

    return fill_up
