"""workloads/random.py: token ids and hidden states drawn from the seed."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

import moe_lab
from moe_lab.runs.build import build_input
from tests import tiny
from tests.tiny import VOCAB, D

CPU = torch.device("cpu")


def input_of(cfg: DictConfig) -> Tensor:
    return build_input(cfg, moe_lab.build_model(cfg), CPU)


def many(*overrides: str) -> Tensor:
    """Hidden states enough for statistics."""
    return input_of(tiny.moe_layer(*overrides, tokens=1000))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["router=sinkhorn"], id="router"),
        pytest.param(["dtype=bf16"], id="dtype"),
        pytest.param(["experts=loop"], id="experts"),
        pytest.param(["model.n_experts=3", "model.n_layers=1"], id="model_sizes"),
    ],
)
def test_ids_do_not_depend_on_what_is_compared(overrides: list[str]) -> None:
    """The cells of a group see the same tokens."""
    assert torch.equal(input_of(tiny.decoder_moe()), input_of(tiny.decoder_moe(*overrides)))


def test_a_dense_decoder_sees_the_tokens_of_the_moe_decoder() -> None:
    """The seed and the shape decide, not the model."""
    assert torch.equal(input_of(tiny.decoder_moe()), input_of(tiny.transformer_decoder()))


@pytest.mark.parametrize("vocab_size", [pytest.param(v, id=f"v{v}") for v in (1, 2, 97, 32000)])
def test_ids_are_in_the_vocabulary_and_reach_all_of_it(vocab_size: int) -> None:
    """int64 in [0, V), from end to end."""
    ids_BS = input_of(tiny.decoder_moe(f"model.vocab_size={vocab_size}", "batch=40", "seq_len=100"))
    assert ids_BS.shape == (40, 100) and ids_BS.dtype == torch.int64
    assert int(ids_BS.min()) >= 0 and int(ids_BS.max()) < vocab_size
    assert int(ids_BS.min()) <= vocab_size * 0.01 and int(ids_BS.max()) >= vocab_size * 0.99 - 1


def test_ids_are_uniform() -> None:
    """Each of 97 tokens about as often as another: chi-square below its 1e-4 quantile for 96 degrees of freedom."""
    counts_V = input_of(tiny.decoder_moe("batch=100", "seq_len=97")).flatten().bincount(minlength=VOCAB).double()
    chi_square = float(((counts_V - 100) ** 2 / 100).sum())
    assert chi_square < 156


@pytest.mark.parametrize("model", [pytest.param("decoder_moe", id="ids"), pytest.param("moe_layer", id="states")])
def test_another_seed_gives_another_input_and_the_same_seed_the_same(model: str) -> None:
    """The seed is all that chance there is."""
    make = tiny.decoder_moe if model == "decoder_moe" else tiny.moe_layer
    torch.manual_seed(1)
    first = input_of(make("seed=0"))
    torch.manual_seed(2)
    assert torch.equal(first, input_of(make("seed=0")))
    assert not torch.equal(first, input_of(make("seed=1")))


def test_hidden_states_have_mean_0_and_variance_1() -> None:
    """Uniform on +-sqrt(3): five standard errors of 32000 values."""
    x_TD = many()
    assert x_TD.shape == (1000, D) and x_TD.dtype == torch.float32
    assert abs(float(x_TD.mean())) < 5 / 32000**0.5
    assert float(x_TD.var()) == pytest.approx(1.0, abs=5 * (0.8 / 32000) ** 0.5)
    assert float(x_TD.abs().max()) <= 3**0.5 + 1e-6


def test_hidden_states_are_not_alike() -> None:
    """No two tokens and no two dimensions repeat each other."""
    x_TD = many()
    assert len(x_TD.unique(dim=0)) == 1000
    correlation_DD = torch.corrcoef(x_TD.T) - torch.eye(D)
    assert float(correlation_DD.abs().max()) < 0.2


def test_bf16_states_are_the_fp32_ones_rounded() -> None:
    """One input for every dtype."""
    assert torch.equal(many("dtype=bf16"), many("dtype=fp32").bfloat16())


def test_fewer_tokens_are_the_first_of_more() -> None:
    """A sweep over the batch adds tokens."""
    assert torch.equal(input_of(tiny.moe_layer(tokens=5)), input_of(tiny.moe_layer(tokens=9))[:5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
@pytest.mark.parametrize("model", [pytest.param("decoder_moe", id="ids"), pytest.param("moe_layer", id="states")])
def test_input_on_cuda_is_that_on_the_cpu_bit_for_bit(model: str, dtype: str) -> None:
    """The hash is integer arithmetic."""
    make = tiny.decoder_moe if model == "decoder_moe" else tiny.moe_layer
    on_cpu, on_cuda = (tiny.built(make(f"device={device}", f"dtype={dtype}")).built.x for device in ("cpu", "cuda"))
    assert on_cuda.is_cuda
    assert torch.equal(on_cpu, on_cuda.cpu())
