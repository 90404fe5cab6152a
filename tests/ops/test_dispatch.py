"""dispatch: slots sorted by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops import cxx, extension
from moe_lab.ops.dispatch import Dispatch, dispatch, dispatch_by_torch

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")


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


def sort(expert_ids_TK: Tensor, n_experts: int) -> Dispatch:
    """By the extension, which is built and loaded first."""
    extension.load()
    return Dispatch(*torch.ops.moe_lab.sort(expert_ids_TK, n_experts))


def tables(T: int, E: int, K: int) -> dict[str, Tensor]:
    """Ids at their limits: slots unused, one expert that takes all, the first and the last expert alone."""
    generator = torch.Generator().manual_seed(T + E)
    all_TK = torch.randint(0, E, (T, K), generator=generator, dtype=torch.int32)
    some_TK = all_TK.masked_fill(torch.rand(T, K, generator=generator) < 0.3, -1)
    return {
        "all used": all_TK,
        "some unused": some_TK,
        "none used": torch.full((T, K), -1, dtype=torch.int32),
        "one takes all": torch.full((T, K), E // 2, dtype=torch.int32),
        "first and last": torch.where(some_TK < 0, some_TK, some_TK % 2 * (E - 1)),
    }


@needs_cxx
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199, 5000)])
@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (1, 5, 60, 256, 513, 1024)])
def test_the_extension_sorts_as_numpy_does(T: int, E: int, device: torch.device) -> None:
    """Bit for bit what `dispatch` gives, with unused slots and without; few slots and many, which others sort."""
    for ids_TK in tables(T, E, min(E, 8)).values():
        assert_sorts(sort(ids_TK.to(device), E), ids_TK.to(device), E)


@needs_cxx
@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data(), T=st.integers(0, 9), K=st.integers(1, 4), E=st.integers(1, 7))
def test_the_extension_sorts_any_table(data: st.DataObject, T: int, K: int, E: int) -> None:
    """Any ids, repeated within a token or not, used or not."""
    ids = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    ids_TK = torch.tensor(ids, dtype=torch.int32).view(T, K)
    assert_sorts(sort(ids_TK, E), ids_TK, E)


@needs_cxx
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (37, 40000)])
def test_an_id_that_no_expert_has_is_an_unused_slot(T: int, device: torch.device) -> None:
    """Nothing is written beside the outputs, whatever the ids."""
    ids_TK = random_ids(T, 9, 3, 0.2).to(device)
    odd_K = torch.tensor([5 + 9, -(2**31), 2**31 - 1], dtype=torch.int32, device=device)
    assert_sorts(sort(torch.where(ids_TK == 4, odd_K, ids_TK), 9), ids_TK.masked_fill(ids_TK == 4, -1), 9)


@needs_cxx
def test_threads_of_a_cpu_share_the_slots() -> None:
    """Each has a part, whose order is that of the slots."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for T in (40000, 32768, 49999):
            ids_TK = random_ids(T, 9, 1, 0.2)
            assert_sorts(sort(ids_TK, 9), ids_TK, 9)
    finally:
        torch.set_num_threads(threads)


@needs_cxx
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 37, 9000, 20000)])
def test_the_out_variant_writes_every_element_and_nothing_else(T: int, device: torch.device) -> None:
    """Also of outputs that lie within a larger tensor."""
    ids_TK = random_ids(T, 60, 4, 0.3).to(device)
    expected = sort(ids_TK, 60)
    padded = [torch.full((len(tensor) + 64,), -7, dtype=torch.int32, device=device) for tensor in expected]
    inner = [whole[32 : len(whole) - 32] for whole in padded]
    torch.ops.moe_lab.sort.out(ids_TK, 60, counts=inner[0], offsets=inner[1], perm=inner[2], inverse=inner[3])
    for whole, part, wanted in zip(padded, inner, expected, strict=True):
        assert torch.equal(part, wanted)
        assert bool((whole[:32] == -7).all()) and bool((whole[len(whole) - 32 :] == -7).all())
    with pytest.raises(RuntimeError, match=r"counts: must be contiguous, on the device of the input, int32, with 60"):
        torch.ops.moe_lab.sort.out(ids_TK, 60, counts=inner[1], offsets=inner[1], perm=inner[2], inverse=inner[3])


@needs_cxx
@pytest.mark.parametrize(
    ("ids_TK", "n_experts", "message"),
    [
        pytest.param(torch.zeros(3, 2), 5, "ids: must be int32", id="dtype"),
        pytest.param(torch.zeros(3, 4, dtype=torch.int32)[:, ::2], 5, "contiguous", id="strides"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int32), 0, "n_experts=0: must be between 1 and 1024", id="E=0"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int32), 1025, "n_experts=1025: must be", id="E=1025"),
    ],
)
def test_the_extension_refuses_what_it_cannot_sort(ids_TK: Tensor, n_experts: int, message: str) -> None:
    """In a sentence, before anything is computed."""
    with pytest.raises(RuntimeError, match=message):
        sort(ids_TK, n_experts)


@needs_cxx
def test_the_sort_has_a_fake_form(device: torch.device) -> None:
    """Shapes and dtypes of fake tensors are those of real ones, so torch.compile takes it."""
    extension.load()
    for T in (0, 37):
        arguments = (random_ids(T, 12, 3, 0.3).to(device), 12)
        torch.library.opcheck(torch.ops.moe_lab.sort.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda ids_TK: torch.ops.moe_lab.sort(ids_TK, 12), fullgraph=True, backend="aot_eager")
    assert_sorts(Dispatch(*compiled(*arguments[:1])), *arguments)


@needs_cxx
def test_dispatch_takes_the_extension_where_it_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of any integers and strides; more experts than it takes are sorted by torch. On a CPU it is not asked."""
    extension.load()
    assert not extension.sorts(torch.device("cpu"), 12)
    monkeypatch.setattr(extension, "sorts", lambda device, n_experts: n_experts <= 1024)
    calls: list[int] = []
    op = torch.ops.moe_lab.sort
    monkeypatch.setattr(torch.ops.moe_lab, "sort", lambda ids, E: calls.append(E) or op(ids, E))  # type: ignore[func-returns-value]
    ids_TK = random_ids(37, 12, 6, 0.2)
    for table_TK in (ids_TK, ids_TK[:, ::2], ids_TK.long()):
        assert_sorts(dispatch(table_TK, 12), table_TK.int(), 12)
    assert calls == [12, 12, 12]
    assert_sorts(dispatch(ids_TK, 1025), ids_TK, 1025)
    assert calls == [12, 12, 12]


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [pytest.param(n, id=f"{n} slots") for n in (1, 512, 513, 8192, 65536, 65544, 600000)])
@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (8, 60, 511, 512, 1023, 1024)])
def test_the_extension_sorts_as_torch_does_on_cuda(slots: int, E: int, device: torch.device) -> None:
    """On both sides of each limit between one block, a cluster and two launches."""
    for ids_TK in tables(slots, E, 1).values():
        ids_TK = ids_TK.to(device)
        for found, expected in zip(sort(ids_TK, E), dispatch_by_torch(ids_TK, E), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
def test_dispatch_uses_the_extension_on_cuda(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is loaded; nothing is read on the host."""
    extension.load()
    ids_TK, op, calls = random_ids(199, 12, 3, 0.3).to(device), torch.ops.moe_lab.sort, []
    monkeypatch.setattr(torch.ops.moe_lab, "sort", lambda *given: calls.append(given) or op(*given))
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = dispatch(ids_TK, 12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 1
    assert_sorts(order, ids_TK, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (4, 300, 40000)])
def test_a_graph_sorts_what_stands_in_its_input(T: int, device: torch.device) -> None:
    """Twenty calls in a graph, replayed over other ids; then a thousand times with the same bits."""
    ids_TK = random_ids(T, 60, 4, 0.3).to(device)
    sort(ids_TK, 60)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            order = sort(ids_TK, 60)
    ids_TK.copy_(random_ids(T, 60, 4, 0.5).flip(0))
    graph.replay()
    assert_sorts(order, ids_TK, 60)
    first = [tensor.clone() for tensor in order]
    differences = torch.zeros((), device=device, dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        for tensor, wanted in zip(order, first, strict=True):
            differences += (tensor != wanted).sum()
    assert int(differences) == 0
