"""ops/route_peers.py: other packages' kernels as implementations of a router."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.ops.route_peers import PEERS
from moe_lab.routers.base import Router
from moe_lab.routers.scored_topk import ScoredTopK
from tests.routers.cases import SCORED, make

CUDA = torch.device("cuda")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EACH = pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=peer, marks=() if peer == "transformers" else pytest.mark.gpu)  # that one runs anywhere
        for peer in PEERS
    ],
)
GROUPS = {"bias": True, "n_groups": 8, "top_groups": 4, "scale": 2.5}


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "transformers"])
def test_a_cpu_has_no_kernels_of_them(peer: str) -> None:
    with pytest.raises(UnavailableError, match=f"router.impl={peer}: needs device=cuda"):
        make("mixtral", 8, 2, impl=peer).compute_on(torch.device("cpu"))


@pytest.mark.parametrize("peer", PEERS)
def test_what_is_not_installed_says_how_to_get_it(peer: str) -> None:
    if importlib.util.find_spec(peer) is not None:
        pytest.skip(f"{peer} is installed")
    with pytest.raises(UnavailableError, match=f"pip install {peer}"):
        make("mixtral", 8, 2, impl=peer).compute_on(CUDA)


def peers_router(peer: str, new_router: Callable[..., Router], E: int, k: int, **keys: object) -> Router:
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    with torch.device(DEVICE):
        return new_router(E, k, impl=peer, **keys).compute_on(torch.device(DEVICE))


@EACH
@pytest.mark.parametrize("T", [1, 37, 199])
@pytest.mark.parametrize(("E", "k"), [(8, 2), (128, 8)], ids=["E8k2", "E128k8"])
def test_a_softmax_is_the_torch_router_s(peer: str, E: int, k: int, T: int) -> None:
    # Seeded: of other logits two may have one softmax in float32, and then either may come first.
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T)).to(DEVICE)
    routers = (make("torch", E, k), peers_router(peer, partial(make, "mixtral"), E, k))
    expected, got = (router.select(logits_TE) for router in routers)
    assert torch.equal(got.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(got.weights_TK, expected.weights_TK, rtol=1e-4, atol=1e-6)


@EACH
@pytest.mark.parametrize("T", [1, 37, 199])
def test_groups_are_the_torch_router_s(peer: str, T: int) -> None:
    logits_TE, bias_E = torch.randn(T, 256, device=DEVICE), torch.randn(256, device=DEVICE) / 8
    weights = []
    with torch.device(DEVICE):
        reference = SCORED(256, 8, impl="torch", **GROUPS)
    for router in (reference, peers_router(peer, SCORED, 256, 8, **GROUPS)):
        assert isinstance(router, ScoredTopK) and router.bias_E is not None
        router.bias_E.copy_(bias_E)
        routing = router.select(logits_TE)
        by_expert_TE = logits_TE.new_zeros(T, 256)
        weights.append(by_expert_TE.scatter_(1, routing.expert_ids_TK.long(), routing.weights_TK))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


@EACH
@pytest.mark.parametrize(
    "keys", [{"score": "sqrt_softplus"}, {"scale": 2.5}, {**GROUPS, "group_score": "max"}], ids=str
)
def test_what_a_peer_computes_otherwise_is_refused(peer: str, keys: dict[str, object]) -> None:
    with pytest.raises(UnavailableError, match=f"router.impl={peer}: supports only"):
        peers_router(peer, SCORED, 256, 8, **keys)
