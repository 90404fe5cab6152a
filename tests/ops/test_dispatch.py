"""dispatch: slots sorted by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops.dispatch import Dispatch, dispatch


def random_ids(T: int, E: int, K: int, unused: float = 0.0) -> Tensor:
    """K different experts per token, a share of the slots unused."""
    generator = torch.Generator().manual_seed(T + 31 * E + K)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].to(torch.int32)
    return ids_TK.masked_fill(torch.rand(T, K, generator=generator) < unused, -1)


def assert_sorts(order: Dispatch, expert_ids_TK: Tensor, n_experts: int) -> None:
    """The four tensors are int32 and equal to what numpy's bincount and stable argsort give."""
    flat_N = expert_ids_TK.cpu().numpy().reshape(-1)
    counts_E = np.bincount(flat_N[flat_N >= 0], minlength=n_experts)
    perm_N = np.argsort(np.where(flat_N < 0, n_experts, flat_N), kind="stable")
    assert all(tensor.dtype == torch.int32 and tensor.device == expert_ids_TK.device for tensor in order)
    assert order.counts_E.tolist() == counts_E.tolist()
    assert order.offsets_E1.tolist() == [0, *np.cumsum(counts_E).tolist()]
    assert order.perm_N.tolist() == perm_N.tolist()
    assert order.inverse_N.tolist() == np.argsort(perm_N).tolist()


SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(37, 1, 1, id="E=1"),
        pytest.param(199, 12, 3, id="T=199"),
    ],
)
UNUSED = pytest.mark.parametrize(
    "unused",
    [pytest.param(0.0, id="all used"), pytest.param(0.4, id="some unused"), pytest.param(1.1, id="none used")],
)


@SIZES
@UNUSED
def test_slots_are_sorted_stably_by_expert(T: int, E: int, K: int, unused: float, device: torch.device) -> None:
    """Counts, offsets, order and its inverse equal numpy's."""
    ids_TK = random_ids(T, E, K, unused).to(device)
    assert_sorts(dispatch(ids_TK, E), ids_TK, E)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data(), T=st.integers(0, 9), K=st.integers(1, 4), E=st.integers(1, 7))
def test_any_table_of_ids_is_sorted(data: st.DataObject, T: int, K: int, E: int) -> None:
    """Any ids, repeated within a token or not, used or not."""
    ids = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    ids_TK = torch.tensor(ids, dtype=torch.int32).view(T, K)
    assert_sorts(dispatch(ids_TK, E), ids_TK, E)


@SIZES
@UNUSED
def test_the_order_is_a_permutation_with_its_inverse(T: int, E: int, K: int, unused: float) -> None:
    """perm and inverse undo each other in both directions and cover every flat slot."""
    order = dispatch(random_ids(T, E, K, unused), E)
    identity_N = torch.arange(T * K, dtype=torch.int32)
    assert torch.equal(order.perm_N.sort().values, identity_N)
    assert torch.equal(order.perm_N[order.inverse_N], identity_N)
    assert torch.equal(order.inverse_N[order.perm_N], identity_N)


def test_each_expert_reads_its_own_slots_in_token_order() -> None:
    """Between an expert's offsets stand exactly its slots, tokens ascending."""
    ids_TK = random_ids(199, 7, 3, 0.3)
    order = dispatch(ids_TK, 7)
    for expert in range(7):
        slots_n = order.perm_N[order.offsets_E1[expert] : order.offsets_E1[expert + 1]]
        assert bool((ids_TK.reshape(-1)[slots_n] == expert).all())
        assert bool((slots_n.diff() > 0).all())


def test_unused_slots_come_last_in_their_own_order() -> None:
    """After the last offset stand the slots with id -1, ascending, and no others."""
    ids_TK = random_ids(37, 12, 5, 0.5)
    order = dispatch(ids_TK, 12)
    rest_N = order.perm_N[order.offsets_E1[-1] :]
    assert rest_N.tolist() == (ids_TK.reshape(-1) < 0).nonzero()[:, 0].tolist()


def test_a_table_that_is_a_view_is_read_in_its_own_order() -> None:
    """Strides of the id table change nothing."""
    ids_TK = random_ids(37, 12, 6, 0.2)[:, ::2]
    assert not ids_TK.is_contiguous()
    assert_sorts(dispatch(ids_TK, 12), ids_TK, 12)


def test_the_ids_keep_their_values() -> None:
    """The table is not written to."""
    ids_TK = random_ids(37, 5, 2, 0.5)
    before_TK = ids_TK.clone()
    dispatch(ids_TK, 5)
    assert torch.equal(ids_TK, before_TK)


@pytest.mark.gpu
def test_nothing_is_read_on_the_host(device: torch.device) -> None:
    """On CUDA no step waits for the device, so a graph can hold it."""
    ids_TK = random_ids(199, 12, 3, 0.3).to(device)
    dispatch(ids_TK, 12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = dispatch(ids_TK, 12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_sorts(order, ids_TK, 12)
