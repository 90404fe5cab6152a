"""Expert MLPs behind one class, `Experts` (base.py): `experts(x_TD, routing, weights, *, scale="output") -> y_TD`.

    y[t] = sum over the used slots s of token t:  w[t, s] * down_e(silu(gate_e(x[t])) * up_e(x[t])),  e = ids[t, s]

(SwiGLU: Shazeer, 2002.05202.) With scale="input" the weight multiplies the expert's input, x[t] above, instead.
The slots' outputs are weighted and summed in fp32, then rounded to x's dtype.
"""
