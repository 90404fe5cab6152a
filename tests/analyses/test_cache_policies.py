"""analyses/cache_policies.py: by hand, against naive simulators, against each other, and the bound by enumeration."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.analyses import cache_policies
from moe_lab.analyses.cache_policies import POLICIES, implementation, next_uses
from tests.conftest import needs_cxx

policies = pytest.mark.parametrize("policy", [pytest.param(policy, id=policy) for policy in POLICIES])


@st.composite
def shared(draw: st.DrawFn, most_tokens: int = 12, most_experts: int = 4) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids of rows of several layers in turn [T, K], layer of each expert [E], a capacity); layers of unlike sizes."""
    sizes = draw(st.lists(st.integers(1, most_experts), min_size=1, max_size=4))
    layer_E = np.repeat(np.arange(len(sizes)), sizes)
    K = draw(st.integers(1, max(sizes)))
    rows = [
        [*(layer_E.searchsorted(layer) + np.array(draw(st.permutations(range(size)))[:K])), *[-1] * (K - size)]
        for _ in range(draw(st.integers(1, most_tokens)))
        for layer, size in enumerate(sizes)
    ]
    return np.array(rows, np.int16).reshape(len(rows), K), layer_E, draw(st.integers(1, len(layer_E) + 1))


@st.composite
def traces(draw: st.DrawFn, most_tokens: int = 30, most_experts: int = 8) -> tuple[np.ndarray, int, int]:
    """(ids [T, K] with unused slots, E, a capacity)."""
    E = draw(st.integers(1, most_experts))
    K = draw(st.integers(1, E))
    row = st.permutations(range(E)).map(lambda order: order[:K])
    rows = draw(st.lists(row, min_size=1, max_size=most_tokens))
    ids_TK = np.array(rows, np.int16).reshape(len(rows), K)
    unused = draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(0, K - 1)), max_size=3))
    for t, k in unused:
        ids_TK[t, k] = -1
    return ids_TK, E, draw(st.integers(1, E + 1))


Misses = tuple[np.ndarray, np.ndarray]


def simulate(
    policy: str,
    ids_TK: np.ndarray,
    layer_E: np.ndarray | int,
    capacity: int,
    guessed_TK: np.ndarray | None = None,
) -> Misses:
    """(misses, loads) of each row, [T]; one of three capacities that are asked for at once. An int: one layer's E."""
    layer_E = np.zeros(layer_E, int) if isinstance(layer_E, int) else layer_E
    rows_T = np.arange(len(ids_TK))
    misses_CT, loads_CT = cache_policies.simulate(policy, ids_TK, [1, capacity, 3], layer_E, rows_T, guessed_TK)
    return misses_CT[1], loads_CT[1]


def reference(
    policy: str,
    ids_TK: np.ndarray,
    layer_E: np.ndarray | int,
    capacity: int,
    guessed_TK: np.ndarray | None = None,
) -> Misses:
    """The same in Python."""
    layer_E = np.zeros(layer_E, int) if isinstance(layer_E, int) else layer_E
    return cache_policies.reference(policy, ids_TK, capacity, layer_E, guessed_TK)


def column(*experts: int) -> np.ndarray:
    return np.array(experts, np.int16).reshape(-1, 1)


@pytest.mark.parametrize(
    ("policy", "missed"),
    [
        # 0 1 0 2 1 0 with room for two. lru: 2 takes 1's place, 1 takes 0's, 0 takes 2's.
        pytest.param("lru", [1, 1, 0, 1, 1, 1], id="lru"),
        pytest.param("least_stale", [1, 1, 0, 1, 1, 1], id="least_stale"),  # with one layer the same
        # 2, needed once, is not worth more than 1: of two alike the later is kept, so 2 takes 1's place; then 1, needed
        # twice, takes 2's; 0 stays.
        pytest.param("lfu", [1, 1, 0, 1, 1, 0], id="lfu"),
        # After 2: 0 has 2 / 2, 1 has 1 / 3, 2 has 1 / 1, so 1 goes. After 1: 0 has 2 / 3, 2 has 1 / 2, 1 has 2 / 1.
        pytest.param("lfru", [1, 1, 0, 1, 1, 0], id="lfru"),
        # It begins with 0 and 1. 2 does not come again, so it passes through.
        pytest.param("belady", [0, 0, 0, 1, 0, 0], id="belady"),
        # 0 is in t2 after its second use. 2 sends 1 from t1 to b1. 1 comes back from there, so p = 1, and as t1 has no
        # more than that, 0 goes from t2 to b2.
        pytest.param("arc", [1, 1, 0, 1, 1, 1], id="arc"),
    ],
)
def test_a_case_by_hand(policy: str, missed: list[int]) -> None:
    """One expert a token, room for two."""
    for run in (simulate, reference):
        misses_T, loads_T = run(policy, column(0, 1, 0, 2, 1, 0), 3, 2)
        assert misses_T.tolist() == loads_T.tolist() == missed


def test_least_stale_by_hand() -> None:
    """Two layers with experts 0 1 and 2 3, room for three; the tokens use 0 2, 0 3, 1 2.

    For 1, lru gives up 2, which was needed longest ago and comes next. least_stale gives up 0: the token at hand did
    not use it, and will not, as it has passed its layer.
    """
    ids, layer_E = column(0, 2, 0, 3, 1, 2), np.array([0, 0, 1, 1])
    for run in (simulate, reference):
        assert run("least_stale", ids, layer_E, 3)[0].tolist() == [1, 1, 0, 1, 1, 0]
        assert run("lru", ids, layer_E, 3)[0].tolist() == [1, 1, 0, 1, 1, 1]


def test_a_prefetch_by_hand() -> None:
    """What is guessed and held costs nothing; what is guessed and not needed is loaded in vain."""
    guessed = column(-1, 1, 2, 0)
    for run in (simulate, reference):
        misses_T, loads_T = run("lru", column(0, 1, 0, 2), 3, 1, guessed)
        assert misses_T.tolist() == [1, 0, 1, 1]  # 1 was guessed; 2 and 0 were not the ones
        assert loads_T.tolist() == [1, 1, 2, 1]  # 0 is held when it is guessed for the last token


@needs_cxx
def test_the_compiled_one_is_what_runs_here() -> None:
    """Else the tests below compare the reference with itself."""
    assert implementation() == "cpp"


def test_without_a_compiler_the_reference_runs(no_compiler: None) -> None:
    """And says so."""
    from moe_lab.ops import cxx

    cxx.library.cache_clear()
    assert implementation() == "python"
    assert simulate("lru", column(0, 1, 0), 2, 1)[0].tolist() == [1, 1, 1]
    cxx.library.cache_clear()


@policies
@given(traces(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_both_are_one(policy: str, trace: tuple[np.ndarray, int, int], random: object) -> None:
    """With and without a prefetch."""
    ids_TK, E, C = trace
    previous_TK = np.concatenate([np.full_like(ids_TK[:1], -1), ids_TK[:-1]])
    for guessed_TK in (None, previous_TK):
        fast, slow = (run(policy, ids_TK, E, C, guessed_TK) for run in (simulate, reference))
        assert all(np.array_equal(*pair) for pair in zip(fast, slow, strict=True))


@policies
@given(shared())
@settings(max_examples=25, deadline=None)
def test_both_are_one_where_layers_share(policy: str, trace: tuple[np.ndarray, np.ndarray, int]) -> None:
    """With and without a prefetch of what the layer's token before used."""
    ids_TK, layer_E, C = trace
    n_layers = int(layer_E.max()) + 1
    previous_TK = np.concatenate([np.full_like(ids_TK[:n_layers], -1), ids_TK[:-n_layers]])
    for guessed_TK in (None, previous_TK):
        fast, slow = (run(policy, ids_TK, layer_E, C, guessed_TK) for run in (simulate, reference))
        assert all(np.array_equal(*pair) for pair in zip(fast, slow, strict=True))


@policies
def test_both_are_one_with_many_experts(policy: str) -> None:
    """More than 256, among which the compiled one does not search for what to give up; some are liked better."""
    rng, layer_E = np.random.default_rng(0), np.repeat(np.arange(5), 80)
    liked = rng.gumbel(size=(20, 5, 80)) + rng.normal(0, 1.5, (5, 80))
    ids_TK = (np.argsort(-liked, axis=2)[:, :, :6] + 80 * np.arange(5)[:, None]).reshape(-1, 6)
    for capacity in (60, 180):
        fast, slow = (run(policy, ids_TK, layer_E, capacity) for run in (simulate, reference))
        assert np.array_equal(fast[0], slow[0]) and 0 < fast[0].sum() < ids_TK.size, capacity


@given(shared())
@settings(deadline=None)
def test_least_stale_is_a_naive_least_stale(trace: tuple[np.ndarray, np.ndarray, int]) -> None:
    """What is held as a list, the next to go at its front, made anew after each row: stale, layer, age, number."""
    ids_TK, layer_E, C = trace
    n_layers, used, held, wanted = int(layer_E.max()) + 1, dict[int, int](), set[int](), []
    for t, row in enumerate(ids_TK.tolist()):
        needed = {expert for expert in row if expert >= 0}
        wanted.append(len(needed - held))
        used |= dict.fromkeys(needed, t)
        here, everything, to_go = t % n_layers, held | needed, list[int]()
        stale = {expert for expert in everything if used[expert] < t - here}
        for group in (stale, everything - stale):
            for layer in [*range(here, -1, -1), *range(n_layers - 1, here, -1)]:
                of_layer = [expert for expert in group if layer_E[expert] == layer]
                to_go += sorted(of_layer, key=lambda expert: (used[expert], -expert))
        held = set(to_go[max(len(to_go) - C, 0) :])
    assert simulate("least_stale", ids_TK, layer_E, C)[0].tolist() == wanted


@given(traces())
@settings(deadline=None)
def test_least_stale_is_lru_in_a_cache_of_one_layer(trace: tuple[np.ndarray, int, int]) -> None:
    """Every expert is stale and of the layer at hand."""
    ids_TK, E, C = trace
    assert np.array_equal(simulate("least_stale", ids_TK, E, C), simulate("lru", ids_TK, E, C))


@given(st.sampled_from(POLICIES), shared(), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_units_are_sums_of_rows(policy: str, trace: tuple[np.ndarray, np.ndarray, int], units: int) -> None:
    """Of misses and of loads."""
    ids_TK, layer_E, C = trace
    unit_T = np.arange(len(ids_TK)) * 7 % units
    of_units = cache_policies.simulate(policy, ids_TK, [C], layer_E, unit_T)
    for sums_CU, values_T in zip(of_units, simulate(policy, ids_TK, layer_E, C), strict=True):
        assert sums_CU[0].tolist() == np.bincount(unit_T, values_T).tolist()


@given(traces())
@settings(deadline=None)
def test_lru_is_a_naive_lru(trace: tuple[np.ndarray, int, int]) -> None:
    """An ordered dictionary, expert by expert; of one token's experts the one with the largest number goes first."""
    ids_TK, E, C = trace
    cache: OrderedDict[int, None] = OrderedDict()
    wanted = []
    for row in ids_TK.tolist():
        needed = [expert for expert in row if expert >= 0]
        wanted.append(sum(expert not in cache for expert in needed))
        for expert in sorted(needed, reverse=True):
            cache.pop(expert, None)
            cache[expert] = None
        while len(cache) > C:
            cache.popitem(last=False)
    assert simulate("lru", ids_TK, E, C)[0].tolist() == wanted


@given(
    traces(most_tokens=7, most_experts=4).map(lambda trace: (trace[0], np.zeros(trace[1], int), trace[2]))
    | shared(most_tokens=3, most_experts=2)
)
@settings(max_examples=60, deadline=None)
def test_belady_is_the_best_of_all_choices(trace: tuple[np.ndarray, np.ndarray, int]) -> None:
    """Every choice of what to hold before the first and after every row, enumerated; and nothing is below it."""
    ids_TK, layer_E, C = trace
    E = len(layer_E)
    fewest = {frozenset(held): 0 for size in range(C + 1) for held in itertools.combinations(range(E), size)}
    for row in ids_TK.tolist():
        needed, after = frozenset(expert for expert in row if expert >= 0), dict[frozenset[int], int]()
        for held, misses in fewest.items():
            everything = held | needed
            for kept in itertools.combinations(sorted(everything), min(C, len(everything))):
                choice, cost = frozenset(kept), misses + len(needed - held)
                after[choice] = min(cost, after.get(choice, cost))
        fewest = after
    bound = int(simulate("belady", ids_TK, layer_E, C)[0].sum())
    assert bound == min(fewest.values())
    assert all(int(simulate(policy, ids_TK, layer_E, C)[0].sum()) >= bound for policy in POLICIES)


@policies
@given(traces())
@settings(max_examples=30, deadline=None)
def test_a_cache_with_room_for_all_misses_each_once(policy: str, trace: tuple[np.ndarray, int, int]) -> None:
    """And a larger cache, where the policy has inclusion, does not miss more."""
    ids_TK, E, _ = trace
    used = 0 if policy == "belady" else len(set(ids_TK[ids_TK >= 0].tolist()))
    assert int(simulate(policy, ids_TK, E, E)[0].sum()) == used
    if policy in ("lru", "lfu", "belady"):
        misses = [int(simulate(policy, ids_TK, E, C)[0].sum()) for C in range(1, E + 1)]
        assert misses == sorted(misses, reverse=True)


def test_next_uses_by_hand() -> None:
    """T where there is none."""
    assert next_uses(np.array([[0, 2], [1, -1], [2, 0], [-1, 1]])).tolist() == [[2, 2], [3, 4], [4, 4], [4, 4]]


_TEXTBOOK = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
_ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("pages", "frames", "lru", "best", "saved"),
    [
        # Silberschatz, Galvin and Gagne, Operating System Concepts, "Page replacement"; saved: 4 passes through
        pytest.param(_TEXTBOOK, 3, 12, 9, 1, id="textbook"),
        # The string of Belady, Nelson and Shedler, CACM 12 (1969), in which FIFO has its anomaly
        pytest.param(_ANOMALY, 3, 10, 7, 0, id="anomaly-3"),
        pytest.param(_ANOMALY, 4, 8, 6, 0, id="anomaly-4"),
    ],
)
def test_published_page_faults(pages: list[int], frames: int, lru: int, best: int, saved: int) -> None:
    """Our bound has the first pages from the start, and need not give a frame to every page: it may save some more."""
    for run in (simulate, reference):
        assert int(run("lru", column(*pages), 8, frames)[0].sum()) == lru
        assert int(run("belady", column(*pages), 8, frames)[0].sum()) == best - frames - saved
