"""models/gated_delta_net.py, models/mixers.py: the layer by its formula in float64, and its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.models.gated_delta_net import GatedDeltaNet
from moe_lab.models.kv_cache import KVCache, StateCache
from moe_lab.models.mixers import make_mixer
from moe_lab.models.parameters import reference_twin

D, HEADS, DK, VALUE_HEADS, DV, WIDTH, EPS = 12, 2, 4, 6, 5, 3, 1e-6
SIZES: dict[str, Any] = {
    "n_heads": HEADS,
    "head_dim": DK,
    "n_value_heads": VALUE_HEADS,
    "value_dim": DV,
    "conv_width": WIDTH,
}
NO_TABLES = (torch.empty(0), torch.empty(0))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net_of(dtype: torch.dtype = torch.float32) -> GatedDeltaNet:
    net = make_mixer(D, EPS, kind="delta_net", **SIZES)
    assert isinstance(net, GatedDeltaNet)
    for seed, (name, parameter) in enumerate(net.named_parameters(), 1):
        values = random(*parameter.shape, seed=seed)
        parameter.data = (1 + 0.3 * values if "norm" in name else values / parameter.shape[-1] ** 0.5).to(
            torch.float32 if name.endswith("_H") else dtype
        )
    return net


def rederived(net: GatedDeltaNet, x_SD: Tensor) -> Tensor:
    """Of one sequence, token by token and head by head, in float64."""
    weights = {name: parameter.double() for name, parameter in net.named_parameters()}
    x = x_SD.double()
    projected, ba = x @ weights["qkvz.weight"].T, x @ weights["ba.weight"].T
    n_mixed = 2 * HEADS * DK + VALUE_HEADS * DV
    padded = F.pad(projected[:, :n_mixed].T, (WIDTH - 1, 0))
    mixed = torch.stack([(padded[:, t : t + WIDTH] * weights["conv.weight"][:, 0]).sum(1) for t in range(len(x))])
    mixed = mixed * mixed.sigmoid()
    y = torch.zeros(len(x), VALUE_HEADS, DV, dtype=torch.float64)
    for h in range(VALUE_HEADS):
        one = h // (VALUE_HEADS // HEADS)
        q, k = (mixed[:, start + one * DK : start + (one + 1) * DK] for start in (0, HEADS * DK))
        q, k = (part / (part.square().sum(1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        v = mixed[:, 2 * HEADS * DK :][:, h * DV : (h + 1) * DV]
        z = projected[:, n_mixed:][:, h * DV : (h + 1) * DV]
        state = torch.zeros(DK, DV, dtype=torch.float64)
        for t in range(len(x)):
            soft = torch.log1p((ba[t, VALUE_HEADS + h] + weights["dt_bias_H"][h]).exp())
            state = state * (-weights["a_log_H"][h].exp() * soft).exp()
            state = state + torch.outer(k[t], ba[t, h].sigmoid() * (v[t] - state.T @ k[t]))
            out = state.T @ q[t] / DK**0.5
            out = out / (out.square().mean() + EPS).sqrt() * weights["norm.weight"]
            y[t, h] = out * z[t] * z[t].sigmoid()
    return y.flatten(1) @ weights["out.weight"].T


@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (1, 5, 70)])
def test_the_layer_is_its_definition_in_float64(S: int) -> None:
    """Projections, convolution, the rule, norm and gate."""
    net, x = net_of(), random(2, S, D)
    y = net(x, *NO_TABLES)
    for b in range(2):
        torch.testing.assert_close(y[b].double(), rederived(net, x[b]), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("context", [pytest.param(c, id=f"context{c}") for c in (0, 1, 2, 8, 64)])
def test_token_by_token_behind_a_context_is_all_at_once(context: int) -> None:
    """Each step twice: it finds and leaves the same."""
    net, x = net_of(), random(2, context + 5, D)
    want, cache = net(x, *NO_TABLES), net.make_cache(2, context + 5)
    if context:
        torch.testing.assert_close(net(x[:, :context], *NO_TABLES, cache), want[:, :context], rtol=1e-4, atol=1e-5)
    for t in range(context, context + 5):
        for _ in range(2):
            y = net(x[:, t : t + 1], *NO_TABLES, cache, torch.tensor([t]))
            torch.testing.assert_close(y, want[:, t : t + 1], rtol=1e-4, atol=1e-5)


def test_several_tokens_go_on_from_the_cache() -> None:
    """As one pass over all of them."""
    net, x = net_of(), random(1, 80, D)
    want, cache = net(x, *NO_TABLES), net.make_cache(1, 80)
    net(x[:, :7], *NO_TABLES, cache)
    y = net(x[:, 7:], *NO_TABLES, cache, torch.arange(7, 80))
    torch.testing.assert_close(y, want[:, 7:], rtol=1e-4, atol=1e-5)


def test_the_cache_does_not_grow_with_its_length() -> None:
    """Two tokens of the convolution in the dtype of the parameters, and a matrix for each head in fp32."""
    kept = [KVCache([net_of(torch.bfloat16).make_cache(2, length)], length) for length in (1, 1000)]
    mixed = 2 * HEADS * DK + VALUE_HEADS * DV
    for cache in kept:
        assert cache.bytes_per_position == 0
        assert cache.state_bytes == 2 * (mixed * (WIDTH - 1) * 2 + VALUE_HEADS * DK * DV * 4)
    assert isinstance(kept[0].layers[0], StateCache)


def test_the_reference_is_computed_token_by_token_in_fp32() -> None:
    """So chunks are checked by the recurrence; a bf16 layer is near it."""
    net, x = net_of(torch.bfloat16), random(2, 70, D).bfloat16()
    twin = reference_twin(net)
    assert isinstance(twin, GatedDeltaNet) and twin.is_reference and not net.is_reference
    y, wide = net(x, *NO_TABLES), twin(x.float(), *NO_TABLES)
    assert (y.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert float((y.float() - wide).norm() / wide.norm()) < 0.03
    exact = reference_twin(net_of())(x.float(), *NO_TABLES)
    torch.testing.assert_close(net_of()(x.float(), *NO_TABLES), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["a_log_H", "dt_bias_H"])
def test_how_fast_a_head_forgets_is_fp32_in_every_dtype(name: str) -> None:
    """exp of it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = make_mixer(D, EPS, kind="delta_net", **SIZES)
    finally:
        torch.set_default_dtype(before)
    assert net.get_parameter(name).dtype == torch.float32
    assert net.get_parameter("qkvz.weight").dtype == torch.bfloat16
