"""experts=fused: who it is for, and on the device the whole layer beside the loop."""

from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.experts.auto import Auto
from moe_lab.experts.fused import Fused
from moe_lab.experts.loop import Loop
from moe_lab.experts.tiles import Tiles
from moe_lab.experts.weights import Clamped, ExpertWeights
from moe_lab.ops import fused_experts
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import Routing

CPU = torch.device("cpu")
NARROW, WIDE = Tiles(128, 16, 128, 16, 1), Tiles(256, 192, 256, 160, 1)


def layer(E: int = 8, D: int = 64, F: int = 96, dtype: torch.dtype = torch.bfloat16, **kind: Any) -> ExpertWeights:
    weights = ExpertWeights(E, D, F, **kind).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for matrix in weights.parameters():
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)
    return weights


def routing(T: int, K: int, E: int) -> Routing:
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.rand(T, E, generator=generator).topk(K).indices.int() if T else torch.empty(0, K, dtype=torch.int32)
    return Routing(ids_TK, torch.rand(T, K, generator=generator))


def test_a_cpu_has_none() -> None:
    with pytest.raises(UnavailableError, match=r"needs device=cuda .*; use experts=auto"):
        Fused().compute_on(CPU)


@pytest.mark.parametrize("tiles", [pytest.param(NARROW, id="tiles"), pytest.param(None, id="by-shape")])
@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        pytest.param((8, 72, 96), torch.bfloat16, "multiples of 16, not 72", id="D"),
        pytest.param((8, 64, 100), torch.bfloat16, "multiples of 16, not 100", id="F"),
        pytest.param((8, 64, 96), torch.float32, "needs dtype=bf16 or fp16", id="fp32"),
        pytest.param((1025, 16, 16), torch.bfloat16, "at most 1024 experts", id="E"),
    ],
)
def test_what_it_does_not_compute_is_said_beforehand(
    sizes: tuple[int, int, int], dtype: torch.dtype, message: str, tiles: Tiles | None
) -> None:
    weights = ExpertWeights(*sizes).to(dtype)
    experts = Fused(tiles).for_layer(weights, 2)
    x_TD = torch.zeros(3, sizes[1], dtype=dtype)
    with pytest.raises(UnavailableError, match=message):  # the first that a layer asks
        experts.reads_dispatch(x_TD)
    with pytest.raises(UnavailableError, match=message):
        experts.implementation(x_TD, weights)
    with pytest.raises(UnavailableError, match=message):
        experts(x_TD, routing(3, 2, 8), weights)


_OTHER_CLAMP = r"alpha=1\.702 and limit=7\.0 only, not .*; use experts=auto"


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        pytest.param(Clamped(1.702, 6.0), _OTHER_CLAMP, id="limit"),
        pytest.param(Clamped(1.6, 7.0), _OTHER_CLAMP, id="alpha"),
        pytest.param("gelu_tanh", "its kernels do not compute gelu_tanh; use experts=auto", id="gelu"),
    ],
)
def test_another_activation_than_those_of_the_kernels_is_refused_and_auto_takes_grouped(
    activation: Any, message: str
) -> None:
    weights = layer(activation=activation)
    x_TD = torch.zeros(3, 64, dtype=torch.bfloat16)
    for act in (
        lambda experts: experts.implementation(x_TD, weights),
        lambda experts: experts(x_TD, routing(3, 2, 8), weights),
    ):
        with pytest.raises(UnavailableError, match=message):
            act(Fused(NARROW).for_layer(weights, 2))
    assert list(Auto().for_layer(weights, 2).candidates) == ["grouped"]
    assert list(Auto().for_layer(layer(activation=Clamped()), 2).candidates) == ["fused", "grouped"]


def test_the_record_has_the_tiles() -> None:
    weights = layer()
    experts = Fused(WIDE).for_layer(weights, 2)
    assert experts.implementation(torch.zeros(3, 64, dtype=torch.bfloat16), weights) == {
        "experts": "fused",
        "tiles": "256-192-256-160-1",
    }


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        pytest.param((128, 16, 128, 16), "128-16-128-16: must be up_rows, up_tokens, down_rows, down_tok", id="four"),
        pytest.param((64, 16, 128, 16, 1), "must be 128 rows by 16, 32, 48, 64 tokens, or 256 rows by 32,", id="rows"),
        pytest.param((128, 80, 128, 16, 1), "must be 128 rows by 16", id="tokens-of-up"),
        pytest.param((128, 64, 256, 16, 1), "must be 128 rows by 16", id="tokens-of-down"),
        pytest.param((128, 16, 256, 32, 2), "pieces must be between 1 and 64, and 1 where down_rows is 256", id="wide"),
        pytest.param((128, 16, 128, 16, 65), "pieces must be between 1 and 64", id="most-pieces"),
        pytest.param((128, 16, 128, 16, 0), "pieces must be between 1 and 64", id="no-piece"),
    ],
)
def test_tiles_that_the_kernels_do_not_offer_are_a_mistake(tiles: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^experts\.tiles=.*{message}"):
        Fused(tiles)


@pytest.mark.parametrize(
    ("F", "pieces", "most"),
    [
        pytest.param(64, 2, 1, id="one-step"),
        pytest.param(96, 3, 2, id="three-of-two"),
        pytest.param(576, 8, 5, id="eight-of-nine"),  # two steps each
        pytest.param(768, 7, 6, id="seven-of-twelve"),
        pytest.param(128, 2, None, id="full"),
        pytest.param(336, 3, None, id="last-one-short"),
    ],
)
def test_more_pieces_than_the_kernels_make_are_a_mistake(F: int, pieces: int, most: int | None) -> None:
    """The record would have what was asked for. As kernels/ops_experts.cpp lowers them."""
    steps = -(-F // 64)
    each = -(-steps // pieces)
    assert -(-steps // each) == (most or pieces)
    experts = Fused((128, 16, 128, 16, pieces))
    if most is None:
        assert experts.for_layer(layer(F=F), 2).tiles == (128, 16, 128, 16, pieces)
    else:
        with pytest.raises(ValueError, match=rf"^experts\.tiles=128-16-128-16-{pieces}: .*dim={F} .*; use {most}\.$"):
            experts.for_layer(layer(F=F), 2)


@pytest.mark.parametrize(
    ("tiles", "T", "reads"),
    [
        pytest.param(NARROW, 512, False, id="1024-slots"),
        pytest.param(NARROW, 513, True, id="more"),
        pytest.param(WIDE, 1, True, id="wide-down"),
        pytest.param(Tiles(256, 64, 128, 64, 1), 255, False, id="wide-up"),
    ],
)
def test_few_slots_are_sorted_by_the_kernels(tiles: Tiles, T: int, reads: bool) -> None:
    experts = Fused(tiles).for_layer(layer(), 2)
    assert experts.reads_dispatch(torch.empty(T, 64, dtype=torch.bfloat16)) is reads


def test_rows_that_are_copied_need_sorted_slots() -> None:
    assert fused_experts.reads_dispatch((256, 64, 128, 64, 1), 480, 5)  # 96 tokens an expert
    assert not fused_experts.reads_dispatch((256, 64, 128, 64, 1), 479, 5)
    assert not fused_experts.reads_dispatch((128, 64, 128, 64, 1), 480, 5)
    assert not fused_experts.reads_dispatch((256, 192, 128, 64, 1), 512, 1024)
    assert fused_experts.reads_dispatch((256, 192, 128, 64, 1), 513, 1024)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("T", [0, 1, 37, 199, 3000])
@pytest.mark.parametrize("scale", ["output", "input"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bias": True}, id="biases"),
        pytest.param({"bias": True, "activation": Clamped()}, id="as gpt-oss"),
    ],
)
def test_it_agrees_with_the_loop(kind: dict[str, Any], dtype: torch.dtype, T: int, scale: str) -> None:
    weights, chosen = layer(dtype=dtype, **kind).cuda(), routing(T, 2, 8)
    on_gpu = Routing(chosen.expert_ids_TK.cuda(), chosen.weights_TK.cuda())
    x_TD = torch.randn(T, 64, device="cuda").to(dtype)
    experts = Fused()
    experts.compute_on(torch.device("cuda"))
    for made in (None, dispatch(on_gpu.expert_ids_TK, 8)):
        y_TD = experts(x_TD, on_gpu._replace(dispatch=made), weights, scale=scale)  # type: ignore[arg-type]
        expected_TD = Loop()(x_TD.double(), on_gpu, weights.double(), scale=scale)  # type: ignore[arg-type]
        weights.to(dtype)
        assert (y_TD - expected_TD).norm() <= 6e-3 * expected_TD.norm()
