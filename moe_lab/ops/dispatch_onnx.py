"""`dispatch` as an ONNX function."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def dispatch(ids, n_experts: int):
        flat = op.Cast(op.Reshape(ids, op.Constant(value_ints=[-1])), to=7)
        experts = op.Constant(value_int=n_experts)
        key = op.Where(flat < op.Constant(value_int=0), experts, flat)  # unused slots last
        n_slots = op.Shape(key)
        # TopK orders ties by their place, as a stable sort does.
        _, perm = op.TopK(key, n_slots, largest=0, sorted=1)
        _, inverse = op.TopK(perm, n_slots, largest=0, sorted=1)
        every = op.Range(op.Constant(value_int=0), experts + 1, op.Constant(value_int=1))
        before = op.Unsqueeze(key, op.Constant(value_ints=[1])) < op.Unsqueeze(every, op.Constant(value_ints=[0]))
        offsets = op.ReduceSum(op.Cast(before, to=7), op.Constant(value_ints=[0]), keepdims=0)
        first, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        end, most = op.Constant(value_ints=[-1]), op.Constant(value_ints=[9223372036854775807])
        counts = op.Slice(offsets, last, most) - op.Slice(offsets, first, end)
        return op.Cast(counts, to=6), op.Cast(offsets, to=6), op.Cast(perm, to=6), op.Cast(inverse, to=6)

    return dispatch
