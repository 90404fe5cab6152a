"""`experts_mlp_biased` as an ONNX function: `experts_mlp` with biases; clamped where `limit` is above 0, or GeGLU."""

from __future__ import annotations

from moe_lab.ops.onnx_function import function


def body(op):  # see `library.Op`
    @function(op)
    def experts_mlp_biased(
        x, ids, weights, w_gate_up, w_down, up_bias, down_bias, scales_input: int, alpha: float, limit: float, gelu: int
    ):
        used = op.Cast(op.Cast(ids, to=7) >= op.Constant(value_int=0), to=1)
        on_input = op.Constant(value_int=scales_input) == op.Constant(value_int=1)
        slot_weights = op.Reshape(op.Where(on_input, weights, used), op.Constant(value_ints=[-1, 1]))
        slots = op.Reshape(op.Cast(ids, to=7), op.Constant(value_ints=[-1]))
        n_slots, per_token, width = op.Shape(slots), op.Shape(ids, start=1), op.Shape(x, start=1)
        outputs = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), op.Concat(n_slots, width, axis=0))
        clamps = op.Constant(value_float=limit) > op.Constant(value_float=0.0)
        most, one = op.CastLike(op.Constant(value_float=limit), x), op.CastLike(op.Constant(value_float=1.0), x)
        steep = op.CastLike(op.Constant(value_float=alpha), x)
        outer = op.CastLike(op.Constant(value_float=1.5957691216057308), x)
        inner = op.CastLike(op.Constant(value_float=0.044715), x)
        is_gelu = op.Constant(value_int=gelu) == op.Constant(value_int=1)
        for expert in range(op.Squeeze(op.Shape(w_down, end=1))):
            mine = op.Transpose(op.NonZero(slots == expert), perm=[1, 0])
            row = op.Squeeze(mine, op.Constant(value_ints=[1]))
            x_mine = op.Gather(x, row / per_token)
            x_scaled = op.CastLike(op.Cast(x_mine, to=1) * op.Gather(slot_weights, row), x)
            w_up = op.Transpose(op.CastLike(op.Gather(w_gate_up, expert), x), perm=[1, 0])
            both = op.MatMul(x_scaled, w_up) + op.CastLike(op.Gather(up_bias, expert), x)
            gate, up = op.Split(both, axis=1, num_outputs=2)
            low = op.Min(gate, most)
            clamped = low * op.Sigmoid(steep * low) * (op.Max(op.Min(up, most), op.Neg(most)) + one)
            bent = op.Where(is_gelu, outer * (gate + inner * gate * gate * gate), gate)  # gelu(g) = g sigmoid(bent)
            h = op.Where(clamps, clamped, gate * op.Sigmoid(bent) * up)
            w_out = op.Transpose(op.CastLike(op.Gather(w_down, expert), x), perm=[1, 0])
            y_mine = op.MatMul(h, w_out) + op.CastLike(op.Gather(down_bias, expert), x)
            outputs = op.ScatterND(outputs, mine, y_mine)
        by_token = op.Cast(op.Reshape(outputs, op.Concat(op.Shape(ids), width, axis=0)), to=1)
        sum_weights = op.Unsqueeze(op.Where(on_input, used, weights), op.Constant(value_ints=[-1]))
        return op.CastLike(op.ReduceSum(by_token * sum_weights, op.Constant(value_ints=[1]), keepdims=0), x)

    return experts_mlp_biased
