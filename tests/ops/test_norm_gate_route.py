"""norm_gate_route: when it is used, and that it is add_rms_norm and then gate_route."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.ops import cxx, extension
from moe_lab.ops.add_rms_norm import add_rms_norm
from moe_lab.ops.norm_gate_route import MOST_ELEMENTS, MOST_EXPERTS, MOST_WIDTH, norm_gate_route, norms_input
from moe_lab.ops.route import Routed, gate_route, route
from moe_lab.ops.selection import Selection

EPS = 1e-5
EXTENSION = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
DTYPE = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
)
SIZES = pytest.mark.parametrize(
    ("E", "k"),
    [pytest.param(E, k, id=f"E={E}") for E, k in ((2, 1), (7, 3), (8, 2), (60, 4), (64, 8), (128, 8), (256, 8))],
)
TOKENS = pytest.mark.parametrize(
    ("T", "D"),
    [
        pytest.param(T, D, id=f"T={T} D={D}")
        for T, D in ((1, 8), (1, 256), (1, 2048), (1, 4096), (2, 2048), (7, 256), (8, 2048), (8, 4096))
    ],
)


def normal(*shape: int) -> Tensor:
    """Seeded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(E: int, D: int, dtype: torch.dtype, T: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, the norm's weight and the gate; nothing that writes them is still running."""
    made = (normal(T, D), 2 * normal(T, D + 1)[:, 1:], 1 + normal(D) / 4, normal(E, D) / D**0.5)
    x_TD, residual_TD, weight_D, gate_ED = (tensor.to("cuda", dtype).contiguous() for tensor in made)
    torch.cuda.synchronize()
    return x_TD, residual_TD, weight_D, gate_ED


def exact_inputs(E: int, D: int, dtype: torch.dtype, T: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `inputs`, but logits are whole numbers times one number: no order of the sum rounds them, and many tie."""
    generator = torch.Generator().manual_seed(E + D)
    x_TD, residual_TD = torch.randint(-1, 2, (2, T, D), generator=generator)
    weight_D = 2.0 ** torch.randint(-1, 2, (D,), generator=generator)
    gate_ED = torch.randint(-2, 3, (E, D), generator=generator) / 2.0 ** (D.bit_length() // 2)
    made = [tensor.to("cuda", dtype) for tensor in (x_TD, residual_TD, weight_D, gate_ED)]
    torch.cuda.synchronize()
    return made[0], made[1], made[2], made[3]


def assert_norms(normed_TD: Tensor, total_TD: Tensor, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> None:
    """The sum has the bits of `add_rms_norm`, the norm all but the last."""
    expected_TD, sum_TD = add_rms_norm(x_TD, residual_TD, weight_D, EPS, "torch")
    assert torch.equal(total_TD, sum_TD) and normed_TD.dtype == x_TD.dtype
    steps_TD = normed_TD.view(torch.int16).int() - expected_TD.view(torch.int16).int()
    assert int(steps_TD.abs().max()) <= 1


def assert_same(found: Routed, expected: Routed) -> None:
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.gpu
@EXTENSION
@DTYPE
@SIZES
@TOKENS
def test_the_normed_is_multiplied_as_in_float64(E: int, k: int, T: int, D: int, dtype: torch.dtype) -> None:
    """The experts of the rounded logits, but where those round otherwise."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = inputs(E, D, dtype, T)
    normed_TD, total_TD, routed = norm_gate_route(x_TD, residual_TD, weight_D, EPS, gate_ED, Selection(k))
    assert_norms(normed_TD, total_TD, x_TD, residual_TD, weight_D)
    exact_TE = normed_TD.double() @ gate_ED.double().t()
    chosen_TK = exact_TE.gather(1, routed.expert_ids_TK.long())
    slack = 2 * torch.finfo(dtype).eps * float(exact_TE.abs().max())
    assert float((exact_TE.topk(k).values - chosen_TK).abs().max()) <= slack
    torch.testing.assert_close(routed.weights_TK.double(), chosen_TK.softmax(1), rtol=8 * slack, atol=1e-6)
    assert all(len(set(ids_K)) == k for ids_K in routed.expert_ids_TK.tolist())


@pytest.mark.gpu
@EXTENSION
@DTYPE
@SIZES
@TOKENS
def test_it_chooses_and_weighs_as_two_launches(E: int, k: int, T: int, D: int, dtype: torch.dtype) -> None:
    """Where no order of sums matters: the same experts, the lowest of equal ones."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = exact_inputs(E, D, dtype, T)
    for how in (Selection(k), Selection(k, renormalize=False, scale=2.5), Selection(k, "sqrt_softplus")):
        normed_TD, _, routed = norm_gate_route(x_TD, residual_TD, weight_D, EPS, gate_ED, how)
        assert_same(routed, route((normed_TD.double() @ gate_ED.double().t()).to(dtype), how, "cuda_ext"))
        if D % 32 == 0:
            assert_same(routed, gate_route(normed_TD, gate_ED, how))


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize(
    ("E", "how"),
    [
        pytest.param(E, how, id=f"E={E} {name}")
        for name, E, how in (
            ("DeepSeek-V3", 256, Selection(8, "sigmoid", 8, 4, "top2", True, 2.5)),
            ("groups", 256, Selection(6, "softmax", 8, 3, "max", False, 1.5)),
            ("one score", 64, Selection(8, "sigmoid")),
            ("softmax", 60, Selection(4)),
            ("softmax", 128, Selection(32)),
            ("groups", 8, Selection(2, "sigmoid", 4, 2, "top2", True, 2.5)),
        )
    ],
)
def test_biases_groups_and_scores(E: int, how: Selection) -> None:
    """A bias of the gate, and one that chooses."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = exact_inputs(E, 512, torch.bfloat16, 5)
    bias_E = normal(E).cuda()
    for biases in ({}, {"gate_bias_E": bias_E}, {"bias_E": bias_E}):
        normed_TD, _, routed = norm_gate_route(x_TD, residual_TD, weight_D, EPS, gate_ED, how, **biases)
        assert_same(routed, gate_route(normed_TD, gate_ED, how, **biases))


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (8, 64, 128, 256)])
def test_nan_stays_nan(E: int) -> None:
    """In the token it is everywhere; in a row of the gate that expert ranks first."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = inputs(E, 256, torch.bfloat16)
    gate_ED[E - 2, 17] = float("nan")
    torch.cuda.synchronize()
    normed_TD, _, routed = norm_gate_route(x_TD, residual_TD, weight_D, EPS, gate_ED, Selection(2))
    assert int(routed.expert_ids_TK[0, 0]) == E - 2 and bool(normed_TD.isfinite().all())
    x_TD[0, 3] = float("nan")
    normed_TD, _, routed = norm_gate_route(x_TD, residual_TD, weight_D, EPS, gate_ED, Selection(2))
    assert bool(normed_TD.isnan().all()) and routed.expert_ids_TK.tolist() == [[0, 1]]
    assert bool(routed.weights_TK.isnan().all())


@pytest.mark.gpu
@EXTENSION
@pytest.mark.parametrize(
    ("E", "D", "T"),
    [
        pytest.param(E, D, T, id=f"E={E} D={D} T={T}")
        for E, D, T in ((64, 2048, 1), (64, 2048, 8), (256, 4096, 1), (256, 4096, 8), (7, 256, 3))
    ],
)
def test_a_captured_graph_reads_what_the_kernel_before_wrote(E: int, D: int, T: int) -> None:
    """Twenty layers in a row, each reads the one before; replayed a thousand times over other inputs, the same bits."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = inputs(E, D, torch.bfloat16, T)
    how = Selection(min(4, E))

    def layers(norm_and_route: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Routed]]) -> list[Tensor]:
        x, total, found = x_TD, residual_TD, []
        for _ in range(20):
            x, total = add_rms_norm(x, total, weight_D, EPS, "triton")
            x, total, routed = norm_and_route(x, total)
            found += [x, total, routed.expert_ids_TK, routed.weights_TK]
        return found

    def fused(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Routed]:
        return norm_gate_route(x, residual, weight_D, EPS, gate_ED, how)

    layers(fused)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(fused)
    x_TD.copy_(x_TD.flip(1)), residual_TD.copy_(3 * residual_TD.roll(1, 1))
    wanted = []
    x, total = x_TD, residual_TD
    for _ in range(20):
        x, total = add_rms_norm(x, total, weight_D, EPS, "triton")
        torch.cuda.synchronize()
        x, total, routed = fused(x, total)
        torch.cuda.synchronize()
        wanted += [x, total, routed.expert_ids_TK, routed.weights_TK]
    differences = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        differences += sum((one != other).sum() for one, other in zip(found, wanted, strict=True))
    assert int(differences) == 0


@pytest.mark.gpu
@EXTENSION
def test_what_the_kernel_cannot_do_is_refused() -> None:
    """By name."""
    extension.load()
    x_TD, residual_TD, weight_D, gate_ED = inputs(64, 256, torch.bfloat16)
    for arguments, message in (
        ((x_TD.float(), residual_TD.float(), weight_D.float(), EPS, gate_ED.float()), "float16 or bfloat16"),
        ((x_TD, residual_TD.repeat(2, 1), weight_D, EPS, gate_ED), r"\[T, D\]"),
        ((x_TD.repeat(9, 1), residual_TD.repeat(9, 1), weight_D, EPS, gate_ED), "8 rows"),
        ((x_TD, residual_TD.half(), weight_D, EPS, gate_ED), "residual"),
        ((x_TD, residual_TD, weight_D.float(), EPS, gate_ED), "norm_weight"),
        ((x_TD, residual_TD, weight_D, EPS, gate_ED.repeat(1, 2)[:, :256]), "contiguous"),
        ((x_TD, residual_TD, weight_D, EPS, gate_ED.repeat(5, 1)), "256 experts"),
    ):
        with pytest.raises(RuntimeError, match=message):
            norm_gate_route(*arguments, Selection(2))


@pytest.mark.parametrize(
    ("computes", "T", "D", "E", "dtype", "expected"),
    [
        pytest.param("cuda_ext:sm_90", 1, 2048, 64, torch.bfloat16, True, id="OLMoE"),
        pytest.param("cuda_ext:sm_90", 1, 2048, 128, torch.float16, True, id="Qwen3"),
        pytest.param("cuda_ext:sm_90", 1, 4096, 256, torch.bfloat16, True, id="the most"),
        pytest.param("cuda_ext:sm_90", 1, 7168, 256, torch.bfloat16, False, id="DeepSeek-V3, too much for it"),
        pytest.param("cuda_ext:sm_90", 1, 1024, 257, torch.bfloat16, False, id="257 experts"),
        pytest.param("cuda_ext:sm_90", 1, 1024, 1, torch.bfloat16, False, id="one expert"),
        pytest.param("cuda_ext:sm_90", 1, 8200, 8, torch.bfloat16, False, id="too wide"),
        pytest.param("cuda_ext:sm_90", 1, 2044, 8, torch.bfloat16, False, id="D=2044"),
        pytest.param("cuda_ext:sm_90", 8, 2048, 64, torch.bfloat16, True, id="8 tokens"),
        pytest.param("cuda_ext:sm_90", 9, 2048, 64, torch.bfloat16, False, id="9 tokens"),
        pytest.param("cuda_ext:sm_90", 0, 2048, 64, torch.bfloat16, False, id="no token"),
        pytest.param("cuda_ext:sm_100", 1, 2048, 64, torch.bfloat16, False, id="newer"),
        pytest.param("cuda_ext:cpp", 1, 2048, 64, torch.bfloat16, False, id="CPU"),
        pytest.param("cuda_ext:sm_90", 1, 2048, 64, torch.float32, False, id="fp32"),
    ],
)
def test_when_one_kernel_does_it(computes: str, T: int, D: int, E: int, dtype: torch.dtype, expected: bool) -> None:
    """Elsewhere there are two launches."""
    gate_ED = torch.empty(E, D, dtype=dtype, device="meta")
    assert norms_input(computes, T, gate_ED.new_empty(D), gate_ED, dtype) is expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda weight_D, gate_ED: (weight_D.float(), gate_ED), id="a wide norm"),
        pytest.param(lambda weight_D, gate_ED: (weight_D, gate_ED.float()), id="a wide gate"),
        pytest.param(
            lambda weight_D, gate_ED: (weight_D, gate_ED.t().contiguous().t()), id="a gate that lies otherwise"
        ),
        pytest.param(
            lambda weight_D, gate_ED: (weight_D.new_empty(128)[::2], gate_ED), id="a norm that lies otherwise"
        ),
    ],
)
def test_weights_that_would_be_copied_are_for_two_launches(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """The kernel reads them before the copy has ended."""
    weights = torch.empty(64, dtype=torch.float16), torch.empty(16, 64, dtype=torch.float16)
    assert norms_input("cuda_ext:sm_90", 1, *weights, torch.float16)
    assert not norms_input("cuda_ext:sm_90", 1, *change(*weights), torch.float16)


@EXTENSION
def test_fake_tensors_have_the_real_shapes() -> None:
    """Four of them."""
    extension.load()
    with FakeTensorMode():
        x_TD = torch.empty(2, 64, dtype=torch.float16)
        normed_TD, total_TD, routed = norm_gate_route(
            x_TD, x_TD, x_TD[0], EPS, torch.empty(16, 64, dtype=torch.float16), Selection(3)
        )
    assert normed_TD.shape == total_TD.shape == x_TD.shape and normed_TD.dtype == total_TD.dtype == torch.float16
    assert routed.expert_ids_TK.shape == routed.weights_TK.shape == (2, 3)
    assert (routed.expert_ids_TK.dtype, routed.weights_TK.dtype) == (torch.int32, torch.float32)


def test_its_limits_are_the_kernels() -> None:
    """The header names them too."""
    header = (extension.sources() / "route.h").read_text()
    assert f"kMostNormWidth = {MOST_WIDTH}, kMostNormExperts = {MOST_EXPERTS};" in header
    assert f"kMostNormGate = 1 << {MOST_ELEMENTS.bit_length() - 1};" in header
