"""Tensor functions, one stem each: the plain-torch reference, its kernels, the torch.library op.

Shape suffixes: B batch, S sequence, T = B*S tokens, D model width, H heads, E experts, K slots per token,
N used slots, F expert hidden width, L layers, V vocabulary.
"""
