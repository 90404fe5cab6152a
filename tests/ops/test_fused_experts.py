"""The op `experts`: its C++ form here, and on the device the kernels for Hopper, against the formula in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx, extension, fused_experts
from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.norm_gate_route import norm_gate_route
from moe_lab.ops.selection import Selection

pytestmark = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]
ALL_TILES = [
    pytest.param((128, 16, 128, 16, 1), id="narrow-16"),
    pytest.param((128, 48, 128, 64, 1), id="narrow"),
    pytest.param((128, 64, 128, 32, 3), id="pieces"),
    pytest.param((256, 32, 256, 32, 1), id="wide-32"),
    pytest.param((256, 192, 256, 160, 1), id="wide"),
    pytest.param((256, 96, 128, 48, 2), id="wide-up"),
    pytest.param((256, 192, 128, 64, 1), id="wide-up-192"),
    pytest.param((128, 32, 256, 128, 1), id="wide-down"),
]
SIZES = [  # T, K, E, D, F
    pytest.param((0, 2, 5, 32, 48), id="T0"),
    pytest.param((1, 2, 8, 64, 96), id="T1"),
    pytest.param((37, 3, 5, 48, 80), id="T37-E5"),
    pytest.param((40, 5, 5, 144, 208), id="K-is-E"),
]
ON_THE_DEVICE = [
    pytest.param((199, 8, 60, 208, 176), id="T199-E60"),
    pytest.param((199, 1, 1, 128, 64), id="one-expert"),
    pytest.param((1000, 2, 7, 512, 336), id="T1000-E7"),
    pytest.param((4, 8, 300, 64, 48), id="32-slots-E300"),  # of a warp's lanes, more experts than threads
    pytest.param((64, 8, 256, 256, 128), id="E256"),
    pytest.param((64, 8, 1024, 256, 48), id="512-slots-E1024"),  # leaves the least memory to the stages
    pytest.param((128, 8, 1024, 256, 48), id="1024-slots-E1024"),  # would leave too little
    pytest.param((205, 5, 8, 256, 48), id="1025-slots"),
    pytest.param((700, 8, 1000, 64, 48), id="E1000"),
]
# Of the roundings of h and o to 8 bits of bf16, or 11 of fp16; float64 has none.
MOST = {torch.bfloat16: 5e-3, torch.float16: 8e-4}

ONE_TOKEN = (1, 1, 1, 1, 1)
OF_ONE_TOKEN = [
    pytest.param((0, 2, 5, 32, 48), id="T0"),
    pytest.param((1, 1, 1, 16, 16), id="least"),
    pytest.param((1, 3, 5, 48, 80), id="K3"),
    pytest.param((1, 5, 5, 144, 208), id="K-is-E"),
    pytest.param((1, 32, 40, 256, 128), id="K32"),
    pytest.param((1, 4, 6, 1040, 1072), id="two-parts"),
    pytest.param((1, 8, 64, 2048, 1024), id="olmoe", marks=pytest.mark.gpu),
    pytest.param((1, 4, 32, 2880, 2880), id="gpt-oss", marks=pytest.mark.gpu),
    pytest.param((1, 3, 4, 7168, 16640), id="most-vectors", marks=pytest.mark.gpu),
]


class Case:
    """Inputs of one layer."""

    def __init__(self, sizes: tuple[int, ...], device: str, dtype: torch.dtype, *, unused: bool = False, seed: int = 0):
        T, K, self.E, D, F = sizes
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator) * scale

        scores_TE = torch.rand(T, self.E, generator=generator)
        self.ids_TK = scores_TE.topk(K).indices.int()
        if unused:
            self.ids_TK[torch.rand(T, K, generator=generator) < 0.3] = -1
            self.ids_TK[::5] = -1
        self.weights_TK = torch.rand(T, K, generator=generator)
        self.x_TD = normal(T, D).to(dtype)
        self.w_up = normal(self.E, 2 * F, D, scale=D**-0.5).to(dtype)
        self.w_down = normal(self.E, D, F, scale=F**-0.5).to(dtype)
        self.b_up, self.b_down = normal(self.E, 2 * F), normal(self.E, D)
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def run(self, tiles: tuple[int, ...], **keys: object) -> Tensor:
        """By the op."""
        return fused_experts.fused_experts(
            self.x_TD,
            self.ids_TK,
            self.weights_TK,
            self.w_up,
            self.w_down,
            tiles,
            **keys,  # type: ignore[arg-type]
        )

    def expected(self, *, scales_input: bool = False, activation: str = "silu", bias: bool = False) -> Tensor:
        """By the formula, in float64."""
        y_TD = torch.zeros(self.x_TD.shape, dtype=torch.float64)
        x_TD, weights_TK = self.x_TD.double().cpu(), self.weights_TK.double().cpu()
        for e in range(self.E):
            t, k = (self.ids_TK.cpu() == e).nonzero(as_tuple=True)
            weight_N1 = weights_TK[t, k, None]
            x_ND = x_TD[t]
            if scales_input:
                x_ND = (x_ND * weight_N1).to(self.x_TD.dtype).double()
            gate, up = (x_ND @ self.w_up[e].double().cpu().T + bias * self.b_up[e].double().cpu()).chunk(2, -1)
            if activation == "clamped":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
            h_NF = gate * torch.sigmoid((1.702 if activation == "clamped" else 1) * gate) * up
            o_ND = h_NF @ self.w_down[e].double().cpu().T + bias * self.b_down[e].double().cpu()
            y_TD.index_add_(0, t, o_ND if scales_input else o_ND * weight_N1)
        return y_TD

    def assert_agrees(self, y_TD: Tensor, **formula: object) -> None:
        expected_TD = self.expected(**formula)  # type: ignore[arg-type]
        assert y_TD.dtype == self.x_TD.dtype
        assert y_TD.shape == self.x_TD.shape
        error = (y_TD.double().cpu() - expected_TD).norm()
        assert error <= MOST[y_TD.dtype] * expected_TD.norm()


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    extension.load()


@pytest.mark.thinned(2, empty=("T0",))
@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tiles", ALL_TILES)
def test_it_computes_the_formula(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], tiles: tuple[int, ...]
) -> None:
    case = Case(sizes, device, dtype)
    case.assert_agrees(case.run(tiles))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("sizes", ON_THE_DEVICE)
@pytest.mark.parametrize("tiles", ALL_TILES)
def test_it_computes_larger_layers(dtype: torch.dtype, sizes: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    case = Case(sizes, "cuda", dtype)
    case.assert_agrees(case.run(tiles))


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("tiles", ALL_TILES)
@pytest.mark.parametrize("T", [pytest.param(37, id="few"), pytest.param(300, id="many", marks=pytest.mark.slow)])
def test_unused_slots_and_input_scaling(device: str, tiles: tuple[int, ...], T: int) -> None:
    case = Case((T, 3, 5, 48, 80), device, torch.bfloat16, unused=True)
    case.weights_TK[case.ids_TK < 0] = float("nan")
    case.assert_agrees(case.run(tiles))
    case.assert_agrees(case.run(tiles, scales_input=True), scales_input=True)
    y_TD = case.run(tiles)
    assert not y_TD[::5].any()  # a token without an expert
    case.ids_TK[case.ids_TK < 0] = case.E  # as `sort` says, this is none either
    assert torch.equal(y_TD, case.run(tiles))


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("tiles", ALL_TILES)
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_biases_and_activations(device: str, tiles: tuple[int, ...], activation: str) -> None:
    case = Case((70, 2, 5, 48, 80), device, torch.bfloat16)
    case.x_TD *= 4  # so that both clamps are reached
    y_TD = case.run(tiles, activation=activation, gate_up_bias_E2F=case.b_up, down_bias_ED=case.b_down)
    case.assert_agrees(y_TD, activation=activation, bias=True)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("tiles", ALL_TILES)
def test_one_expert_takes_all_and_a_dispatch_may_be_given(device: str, tiles: tuple[int, ...]) -> None:
    case = Case((300, 2, 5, 48, 80), device, torch.bfloat16)
    case.ids_TK[:] = torch.tensor([3, 1], dtype=torch.int32)
    y_TD = case.run(tiles)
    case.assert_agrees(y_TD)
    assert torch.equal(y_TD, case.run(tiles, dispatch=dispatch(case.ids_TK, case.E)))


@pytest.mark.thinned(2, empty=("T0",))
@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("sizes", OF_ONE_TOKEN)
def test_one_token(device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """All experts, some, the same one twice, none."""
    case = Case(sizes, device, dtype)
    case.assert_agrees(case.run(ONE_TOKEN))
    biases = {"gate_up_bias_E2F": case.b_up, "down_bias_ED": case.b_down}
    case.assert_agrees(case.run(ONE_TOKEN, **biases, activation="clamped"), bias=True, activation="clamped")
    case.assert_agrees(case.run(ONE_TOKEN, **biases, scales_input=True), bias=True, scales_input=True)
    case.ids_TK[:, 1:] = case.ids_TK[:, :1]
    case.ids_TK[:, 2:3] = case.E
    case.weights_TK[:, 2:3] = float("nan")
    case.assert_agrees(case.run(ONE_TOKEN))
    case.ids_TK[:] = -1
    assert not case.run(ONE_TOKEN, **biases).any()


@pytest.mark.gpu
def test_replays_of_one_token() -> None:
    """Each reads the ids of its time, and gives the same bits on two streams at once, whatever stood in the scratch."""
    case, poison = (Case((1, 8, 60, 2048, 768), "cuda", torch.bfloat16, seed=seed) for seed in (0, 1))
    poison.x_TD.fill_(float("nan"))
    routings, expected = [case.ids_TK.clone(), case.ids_TK.flip(1)], []
    for ids_TK in routings:
        case.ids_TK.copy_(ids_TK)
        expected.append(case.run(ONE_TOKEN))
    assert not torch.equal(*expected)
    graphs, results = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            poison.run(ONE_TOKEN)
            results.append(case.run(ONE_TOKEN))
    streams, differs = [torch.cuda.Stream() for _ in range(2)], torch.zeros((), device="cuda")
    for turn in range(500):
        case.ids_TK.copy_(routings[turn % 2])
        for y_TD, graph, stream in zip(results, graphs, streams, strict=True):
            y_TD.fill_(float("nan"))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        for y_TD, stream in zip(results, streams, strict=True):
            torch.cuda.current_stream().wait_stream(stream)
            differs += (y_TD != expected[turn % 2]).any()
    assert not differs


@pytest.mark.gpu
def test_one_token_reads_what_the_kernel_before_wrote() -> None:
    """Each begins before the one ahead has ended: 20 layers in a graph, as when the host waits for every kernel."""
    case = Case((1, 8, 60, 2048, 768), "cuda", torch.bfloat16)
    starts = [case.x_TD.clone(), case.x_TD.flip(1)]
    norm_D, start_1D = torch.ones(2048, device="cuda", dtype=torch.bfloat16), case.x_TD.clone()
    gate_ED = case.w_up[:, 0].contiguous()
    torch.cuda.synchronize()

    def layers(finish: Callable[[], None]) -> Tensor:
        y_1D, total_1D, outputs = start_1D, start_1D, []
        for _ in range(20):
            case.x_TD, total_1D, routed = norm_gate_route(y_1D, total_1D, norm_D, 1e-5, gate_ED, Selection(8))
            finish()
            case.ids_TK, case.weights_TK = routed.expert_ids_TK, routed.weights_TK
            outputs.append(y_1D := case.run(ONE_TOKEN))
            finish()
        return torch.cat(outputs)

    expected = []
    for start in starts:
        start_1D.copy_(start)
        expected.append(layers(torch.cuda.synchronize))
    assert expected[0].isfinite().all() and not torch.equal(*expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layers(lambda: None)
    differs = torch.zeros((), device="cuda")
    for turn in range(500):
        start_1D.copy_(starts[turn % 2])
        graph.replay()
        differs += (outputs != expected[turn % 2]).any()
    assert not differs


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 2, 5, 48, 80), id="T2"),
        pytest.param((1, 33, 40, 48, 80), id="K33"),
        pytest.param((1, 1, 1, 50_016, 16), id="D"),
        pytest.param((1, 4, 4, 16, 12_512), id="K-F"),
    ],
)
def test_the_kernel_of_one_token_refuses(device: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="must have one token, at most 32 slots, and at most 50000"):
        Case(sizes, device, torch.bfloat16).run(ONE_TOKEN)


@pytest.mark.parametrize("device", ON)
def test_not_a_number_stays_with_its_token(device: str) -> None:
    case = Case((70, 2, 5, 48, 80), device, torch.bfloat16)
    whole_TD = case.run((128, 16, 128, 16, 1))
    case.x_TD[7] = float("nan")
    case.x_TD[9, 3] = float("inf")
    for tiles in ((128, 16, 128, 16, 1), (256, 64, 256, 64, 1)):
        y_TD = case.run(tiles)
        assert y_TD[7].isnan().all()
        assert not y_TD[9].isfinite().all()
        rest = [t for t in range(70) if t not in (7, 9)]
        np.testing.assert_allclose(y_TD[rest].float().cpu(), whole_TD[rest].float().cpu(), atol=0.05)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"tiles": (64, 16, 128, 16, 1)}, "tiles: must have", id="rows"),
        pytest.param({"tiles": (128, 80, 128, 16, 1)}, "tiles: must have", id="tokens"),
        pytest.param({"tiles": (256, 16, 128, 16, 1)}, "tiles: must have", id="tokens-of-256"),
        pytest.param({"tiles": (128, 16, 256, 32, 2)}, "pieces: must be", id="pieces"),
        pytest.param({"tiles": (128, 16, 128, 16, 0)}, "pieces: must be", id="no-piece"),
        pytest.param({"activation": "relu"}, "activation=relu: must be silu or clamped", id="activation"),
        pytest.param({"D": 40}, "must be multiples of 16", id="width"),
        pytest.param({"dtype": torch.float32}, "x: must be float16 or bfloat16", id="dtype"),
    ],
)
def test_what_it_refuses(device: str, change: dict[str, object], message: str) -> None:
    case = Case((5, 2, 5, change.pop("D", 48), 80), device, change.pop("dtype", torch.bfloat16))  # type: ignore[arg-type]
    tiles = change.pop("tiles", (128, 16, 128, 16, 1))
    with pytest.raises(RuntimeError, match=message):
        case.run(tiles, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("T", [pytest.param(0, id="T0"), pytest.param(37, id="T37")])
def test_the_op_has_a_fake_form_and_writes_where_it_is_told(device: str, T: int) -> None:
    case, op = Case((T, 3, 5, 48, 80), device, torch.bfloat16), torch.ops.moe_lab.experts
    inputs = (case.x_TD, case.ids_TK, case.weights_TK, case.w_up, case.w_down, case.b_up, case.b_down)
    order = dispatch(case.ids_TK, case.E)[1:]
    keys = ("silu", False, 256, 96, 256, 128, 1)
    torch.library.opcheck(op.default, (*inputs, *order, *keys), test_utils=("test_schema", "test_faketensor"))
    y_TD = torch.full_like(case.x_TD, float("nan"))
    op.out(*inputs, None, None, None, *keys, y=y_TD)
    assert torch.equal(y_TD, op(*inputs, *order, *keys))
    with pytest.raises(RuntimeError, match="offsets, perm and inverse: give all of them, or none"):
        op(*inputs, order[0], None, None, *keys)
    with pytest.raises(RuntimeError, match="y: must be as x, contiguous"):
        op.out(*inputs, None, None, None, *keys, y=y_TD.float())


def test_who_has_no_such_kernels() -> None:
    with pytest.raises(UnavailableError, match=r"needs device=cuda \(this run is on cpu\)"):
        fused_experts.require(torch.device("cpu"))
    with pytest.raises(UnavailableError, match=r"needs dtype=bf16 or fp16, not torch\.float32"):
        fused_experts.require_computable(torch.float32, 8, 64)
    with pytest.raises(UnavailableError, match=r"multiples of 16, not 72"):
        fused_experts.require_computable(torch.bfloat16, 8, 64, 72)
    with pytest.raises(UnavailableError, match="at most 1024 experts"):
        fused_experts.require_computable(torch.bfloat16, 1025, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", ALL_TILES)
def test_a_thousand_replays_give_the_same_bits(tiles: tuple[int, ...]) -> None:
    case = Case((150, 8, 60, 512, 336), "cuda", torch.bfloat16, unused=True)
    poison = Case((150, 8, 60, 512, 336), "cuda", torch.bfloat16)
    poison.x_TD.fill_(float("nan"))
    first_TD = case.run(tiles)
    graph, y_TD = torch.cuda.CUDAGraph(), torch.full_like(first_TD, float("nan"))
    with torch.cuda.graph(graph):
        poison.run(tiles)  # leaves NaN in shared memory and in the scratch
        y_TD.copy_(case.run(tiles))
    differs = torch.zeros((), device="cuda")
    for _ in range(1000):
        y_TD.fill_(float("nan"))
        graph.replay()
        differs += (y_TD != first_TD).any()
    assert not differs


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", ALL_TILES)
@pytest.mark.parametrize("T", [pytest.param(60, id="few"), pytest.param(150, id="many")])
def test_each_replay_reads_the_ids_of_its_time(tiles: tuple[int, ...], T: int) -> None:
    """`down` reads them before the kernels before it have ended."""
    case, expected = Case((T, 8, 60, 512, 336), "cuda", torch.bfloat16), []
    routings = [case.ids_TK.clone(), case.ids_TK.flip(0)]
    for ids_TK in routings:
        case.ids_TK.copy_(ids_TK)
        expected.append(case.run(tiles))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = case.run(tiles)
    differs = torch.zeros((), device="cuda")
    for turn in range(200):
        case.ids_TK.copy_(routings[turn % 2])
        graph.replay()
        differs += (y_TD != expected[turn % 2]).any()
    assert not differs


@pytest.mark.gpu
def test_torch_compile_takes_it() -> None:
    case = Case((37, 3, 5, 48, 80), "cuda", torch.bfloat16)
    compiled = torch.compile(lambda: case.run((128, 16, 128, 16, 1)) * 2, fullgraph=True)
    assert torch.equal(compiled(), case.run((128, 16, 128, 16, 1)) * 2)
