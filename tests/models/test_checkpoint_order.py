"""models/checkpoint_order.py: the dimensions of heads that RoPE turns together, from the files' order to ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.checkpoint_order import order_of, reorder
from moe_lab.models.rope import frequencies, rope_tables
from moe_lab.ops.rotate import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("width", "rotary_dim", "interleaved", "order"),
    [
        pytest.param(6, 6, False, [0, 1, 2, 3, 4, 5], id="ours"),
        pytest.param(6, 6, True, [0, 2, 4, 1, 3, 5], id="interleaved"),
        pytest.param(8, 4, False, [0, 1, 4, 5, 2, 3, 6, 7], id="partial"),
        pytest.param(8, 4, True, [0, 2, 4, 5, 1, 3, 6, 7], id="partial_interleaved"),
        pytest.param(6, 2, False, [0, 2, 3, 1, 4, 5], id="one_pair"),
    ],
)
def test_the_order_by_hand(width: int, rotary_dim: int, interleaved: bool, order: list[int]) -> None:
    """A permutation: what turns together is width / 2 apart, and so is what does not turn."""
    assert order_of(width, rotary_dim, interleaved) == order


def turned(x_Sd: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """As the files mean it, in float64: pair by pair."""
    y, (f, _) = x_Sd.double().clone(), frequencies(rotary_dim, 50.0)
    for i in range(rotary_dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
        angle = torch.arange(len(x_Sd)) * f[i].double()
        y[:, a] = x_Sd[:, a] * angle.cos() - x_Sd[:, b] * angle.sin()
        y[:, b] = x_Sd[:, b] * angle.cos() + x_Sd[:, a] * angle.sin()
    return y


@pytest.mark.parametrize("interleaved", [pytest.param(False, id="halves"), pytest.param(True, id="interleaved")])
@pytest.mark.parametrize("rotary_dim", [pytest.param(n, id=f"{n}_of_8") for n in (2, 4, 6, 8)])
def test_in_our_order_our_rotation_is_the_files(rotary_dim: int, interleaved: bool) -> None:
    """Turning reordered vectors gives the turned ones, reordered."""
    x_Sd = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    order = order_of(8, rotary_dim, interleaved)
    got = rotate(x_Sd[:, order], *rope_tables(5, 8, 50.0, CPU, rotary_dim=rotary_dim))
    torch.testing.assert_close(got.double(), turned(x_Sd, rotary_dim, interleaved)[:, order], rtol=0, atol=1e-6)


def numbered(rows: int, columns: int | None = None) -> Tensor:
    values = torch.arange(rows, dtype=torch.float32)
    return values if columns is None else values.unsqueeze(1).repeat(1, columns)


def test_rows_of_queries_and_keys_are_put_into_order_head_by_head() -> None:
    """Weights, biases and norms, of a head or of all; nothing else."""
    names = ("q.weight", "k.bias", "q_norm.weight", "v.weight", "o.weight")
    parameters = {f"layers.3.attention.{name}": numbered(8) for name in names} | {"layers.0.mlp.k.weight": numbered(8)}
    parameters["layers.0.attention.k_norm.weight"] = numbered(4)
    reorder(parameters, [0, 2, 1, 3], head_dim=4, kv_down_dim=0)
    for name in ("q.weight", "k.bias", "q_norm.weight"):
        assert parameters[f"layers.3.attention.{name}"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert parameters["layers.0.attention.k_norm.weight"].tolist() == [0, 2, 1, 3]
    for name in ("layers.3.attention.v.weight", "layers.3.attention.o.weight", "layers.0.mlp.k.weight"):
        assert torch.equal(parameters[name], numbered(8))


def test_of_latent_attention_only_the_last_dimensions_are_turned() -> None:
    """Of each head of a query, and of the one key of all heads."""
    parameters = {
        "layers.0.attention.q_up.weight": numbered(12, 2),
        "layers.0.attention.kv_down.weight": numbered(9, 2),
        "layers.0.attention.kv_down.bias": numbered(9),
        "layers.0.attention.q_down.weight": numbered(12, 2),
    }
    reorder(parameters, [0, 2, 1, 3], head_dim=6, kv_down_dim=9)
    assert parameters["layers.0.attention.q_up.weight"][:, 1].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    for name in ("weight", "bias"):
        rows = parameters[f"layers.0.attention.kv_down.{name}"].reshape(9, -1)[:, 0]
        assert rows.tolist() == [0, 1, 2, 3, 4, 5, 7, 6, 8]
    assert torch.equal(parameters["layers.0.attention.q_down.weight"], numbered(12, 2))


def test_the_gate_behind_the_queries_keeps_its_order() -> None:
    """It meets the values, which are not turned."""
    names = ("q.weight", "q.bias", "k.weight")
    parameters = {f"layers.0.attention.{name}": numbered(8) for name in names}
    reorder(parameters, [0, 2, 1, 3], head_dim=4, kv_down_dim=0, gated=True)
    assert parameters["layers.0.attention.q.weight"].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert parameters["layers.0.attention.q.bias"].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert parameters["layers.0.attention.k.weight"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
