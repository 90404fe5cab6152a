"""A call of every CUDA kernel of the extension on small inputs: what compute-sanitizer looks at (test_extension.py)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from moe_lab.ops import extension
from moe_lab.ops.fused_experts import CAPABILITY, fused_experts
from moe_lab.ops.gemv import gemv, norm_gemv
from moe_lab.ops.norm_gate_route import norm_gate_route
from moe_lab.ops.one_token_attention import one_token_attention
from moe_lab.ops.route import gate_route, route
from moe_lab.ops.selection import Selection
from moe_lab.ops.sinkhorn import sinkhorn_route


def normal(*shape: int) -> Tensor:
    """Seeded, on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).cuda()


def main() -> None:
    """Lanes and warps, one block, a cluster and the grid, sorted and not; odd sizes."""
    extension.load()
    dsv3 = Selection(8, "sigmoid", 8, 4, "top2", True, 2.5)
    for T, E, k in ((1, 8, 2), (37, 60, 4), (199, 64, 8), (1100, 128, 8), (2300, 8, 2), (130, 256, 8), (37, 1000, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            for sort in (False, True):
                route(normal(T, E).to(dtype), Selection(k), "cuda_ext", sort=sort)
    for T in (16, 1100):
        for sort in (False, True):
            route(normal(T, 256), dsv3, "cuda_ext", bias_E=normal(256), sort=sort)
    route(normal(40000, 8), Selection(2), "cuda_ext", sort=True)  # its slots are sorted by two launches
    for T, E, k in ((1, 8, 2), (37, 12, 3), (199, 64, 8), (1100, 64, 8), (1100, 16, 9), (37, 1000, 32)):
        for scale in (1.0, 1e4):
            for tolerance in (0.0, 0.1):
                sinkhorn_route(normal(T, E) * scale, k, 2, 1.0, tolerance, "cuda_ext")
    sinkhorn_route(normal(8000, 1000), 32, 1, 1.0, 0.0, "cuda_ext")  # not all rows fit into shared memory
    few_tokens = ((1, 4096, 8, 2), (17, 96, 60, 4), (8, 7168, 256, 8), (31, 2048, 100, 6))
    for T, D, E, k in (*few_tokens, (199, 544, 7, 3), (2300, 96, 8, 2)):
        for dtype in (torch.float16, torch.bfloat16):
            gate_route(normal(T, D).to(dtype), normal(E, D).to(dtype), Selection(k))
    for T, D, E, how in (
        (1, 8, 2, Selection(1)),
        (3, 2048, 64, Selection(8)),
        (8, 264, 60, Selection(4)),
        (1, 4096, 256, dsv3),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            tokens = normal(T, D).to(dtype), normal(T, D + 1)[:, 1:].to(dtype).contiguous()
            weights = normal(D).to(dtype), 1e-6, normal(E, D).to(dtype)
            torch.cuda.synchronize()  # the kernel reads weights that nobody writes any more
            norm_gate_route(*tokens, *weights, how)
    gate_route(normal(100, 64).half(), normal(8, 64).half(), Selection(2, "sigmoid", 4, 2), bias_E=normal(8))
    sorts_and_sums()
    expert_mlps()
    decoding_steps()
    torch.cuda.synchronize()
    print("made all calls")


def decoding_steps() -> None:
    """One row and more, with and without a norm; a token on a cache, empty and long, by a block a head and more."""
    for T, N, K in ((1, 1, 8), (1, 37, 264), (1, 2201, 2048), (1, 5, 8192), (3, 37, 264), (8, 1100, 1032)):
        for dtype in (torch.float16, torch.bfloat16):
            x, weight, norm = normal(T, K).to(dtype), normal(N, K).to(dtype), normal(K).to(dtype)
            torch.cuda.synchronize()  # the kernels read weights, and what is cached, that nobody writes any more
            gemv(x, weight, weight[:, 0].contiguous())
            norm_gemv(x, x, norm, 1e-6, weight)
    for T, dtype in itertools.product((1, 4), (torch.float16, torch.bfloat16)):  # rows too wide for a norm
        x, weight = normal(T, 16384).to(dtype), normal(5, 16384).to(dtype)
        torch.cuda.synchronize()
        gemv(x, weight)
    attentions = ((1, 3, 1, 64, 0), (1, 16, 1, 128, 699), (30, 5, 1, 64, 41), (1, 4, 8, 128, 699), (40, 4, 3, 64, 41))
    for B, heads, G, d, position in attentions:
        for dtype in (torch.float16, torch.bfloat16):
            q, k, v = normal(B, (G + 2) * heads * d).to(dtype).split([G * heads * d, heads * d, heads * d], dim=1)
            caches = [normal(B, heads, 700, d).to(dtype) for _ in range(2)]
            turns = ((normal(1, d), normal(1, d)), torch.tensor([position]).cuda())
            torch.cuda.synchronize()
            one_token_attention(q, k, v, None, None, 1e-6, None, *turns, *caches)


def sorts_and_sums() -> None:
    """Slots without logits, by one block, a cluster and two launches; sums of rows of odd and even widths."""
    for slots, E in ((0, 5), (1, 1), (37, 60), (5000, 1024), (70000, 256)):
        for most in (0, E):  # of 0: all are unused
            ids = torch.randint(-1, most, (slots, 1), dtype=torch.int32).cuda()
            torch.ops.moe_lab.sort(ids, E)
    for T, K, D in ((0, 2, 8), (1, 8, 264), (37, 3, 33), (199, 33, 12), (2000, 4, 520)):
        ids = torch.randint(-1, 5, (T, K), dtype=torch.int32).cuda()
        _, _, _, inverse = torch.ops.moe_lab.sort(ids, 5)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            o = normal(2, T * K, D).to(dtype)
            for rows in (o, o[0]):
                torch.ops.moe_lab.combine(rows, inverse, ids, normal(T, K), dtype)
            torch.ops.moe_lab.combine(o[0], None, ids >= 0, None, torch.float32)


def expert_mlps() -> None:
    """Tiles of both kinds and none, rows that are gathered, copied and scaled, few slots and many, some unused."""
    if torch.cuda.get_device_capability() != CAPABILITY:
        return
    tiles = ((128, 16, 128, 32, 1), (128, 64, 128, 16, 3), (256, 32, 256, 96, 1), (256, 192, 256, 160, 1))
    for T, K, E, D, F in ((1, 2, 8, 64, 96), (37, 3, 5, 48, 80), (128, 8, 300, 64, 48), (700, 2, 7, 144, 208)):
        ids = torch.rand(T, E).topk(K).indices.int()
        ids[::3, 0] = -1
        for dtype in (torch.float16, torch.bfloat16):
            matrices = normal(E, 2 * F, D).to(dtype), normal(E, D, F).to(dtype)
            inputs = normal(T, D).to(dtype), ids.cuda(), normal(T, K), *matrices
            for one in (*tiles, (1, 1, 1, 1, 1)) if T == 1 else tiles:
                fused_experts(*inputs, one)
                fused_experts(*inputs, one, scales_input=True, activation="clamped", down_bias_ED=normal(E, D))


if __name__ == "__main__":
    main()
