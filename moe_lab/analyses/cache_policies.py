"""A cache of experts under each policy: which of a token's experts it holds, and what is loaded.

The cache is that of one layer, or one that all layers share. A row of the trace is a token, or a token in one of the
layers, which come one after the other. Before a row, the cache holds at most C experts. Those that the row needs and
the cache does not hold are its misses; each is loaded. After the row, the cache keeps the C experts of largest priority
among those that it held and those that were needed; an expert that is not kept has passed through (through a buffer
that is not counted). Of two alike the one with the smaller number is kept. The priority of expert e after row t:

    lru           last(e), the last row that needed it
    least_stale   whether the token used it, then how soon its layer comes, see below; of two alike the later last(e)
    lfu           count(e), how many rows needed it so far, whether it was held or not; of two alike the later last(e)
    lfru          count(e) / (t + 1 - last(e)): recency weighted by frequency, as vLLM's expert cache (pull request
                  37190) is described; its exact weights are not
    belady        - the next row that needs it: the bound, which no policy exceeds, for it knows what comes (Belady
                  1966, with bypass; Mattson et al. 1970). It begins with the experts that are needed first; the others
                  begin empty
    arc           no priority, but two lists and their ghosts: Megiddo and Modha, FAST 2003, figure 4; the experts of a
                  row are used in the order of its slots

least_stale is after SpecMD (2602.03921). An expert is stale if the token at hand did not use it so far. Stale experts
go first, and of these, as of the others, those whose layer comes again last: layers that the token has passed, the
nearest one first, then layers that are still to come, the farthest one first. This follows descriptions of the policy.
They agree that stale experts go first and that the order of layers protects those that are needed soon, but not on how:
some give up the first layer first. In a cache of one layer it is lru.

With a prefetch, some experts are guessed before the row. Those of them that are not held are loaded into a buffer of
their own; the row finds them there, and they stay only if they are needed and kept.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx

POLICIES = ("lru", "least_stale", "lfu", "lfru", "belady", "arc")
"""In the order in which cache_policies.cpp numbers them."""
MOST_EXPERTS = 2**15 - 1
"""Of a cache; their numbers are int16."""


def simulate(
    policy: str,
    ids_TK: np.ndarray,
    capacities: Sequence[int],
    layer_E: np.ndarray,
    unit_T: np.ndarray,
    guessed_TK: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(misses, loads) of each unit for each capacity, [C, U] int64, from ids [T, K] with -1 for unused slots.

    `layer_E` has the layer of each expert, from 0 (all 0: the cache of one layer); row t is of layer t mod their
    number. `unit_T` says which unit a row belongs to. `guessed_TK`: experts that are prefetched before each row, as
    ids. Loads are the misses and what was prefetched.
    """
    assert policy in POLICIES and min(capacities) >= 1 and len(ids_TK) < 2**31 and len(layer_E) <= MOST_EXPERTS
    (T, K), E, n, U = ids_TK.shape, len(layer_E), len(capacities), int(unit_T.max(initial=-1)) + 1
    misses_CU, loads_CU = np.zeros((n, U), np.int64), np.zeros((n, U), np.int64)
    function = _compiled()
    if function is None:
        for place, capacity in enumerate(capacities):
            found = reference(policy, ids_TK, capacity, layer_E, guessed_TK)
            for sums_CU, values_T in zip((misses_CU, loads_CU), found, strict=True):
                np.add.at(sums_CU[place], unit_T, values_T)
        return misses_CU, loads_CU
    ids_TK = np.ascontiguousarray(ids_TK, np.int16)
    guessed = None if guessed_TK is None else np.ascontiguousarray(guessed_TK, np.int16)
    unit_T, layer_E, sizes = (np.ascontiguousarray(values, np.int32) for values in (unit_T, layer_E, capacities))
    function(
        POLICIES.index(policy),
        ids_TK.ctypes.data,
        None if guessed is None else guessed.ctypes.data,
        unit_T.ctypes.data,
        layer_E.ctypes.data,
        T,
        K,
        E,
        int(layer_E.max()) + 1,
        sizes.ctypes.data,
        n,
        U,
        misses_CU.ctypes.data,
        loads_CU.ctypes.data,
    )
    return misses_CU, loads_CU


def implementation() -> str:
    """Who computes `simulate` here: `cpp`, or `python` where there is no C++ compiler (a hundred times as slow)."""
    return "python" if _compiled() is None else "cpp"


def _compiled() -> Callable[..., None] | None:
    try:
        function: Any = cxx.library(Path(__file__).with_suffix(".cpp")).simulate
    except UnavailableError:
        return None
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    sizes = [long, number, number, number, pointer, number, long]
    function.argtypes = [number, *[pointer] * 4, *sizes, pointer, pointer]
    function.restype = None
    return function  # type: ignore[no-any-return]


def next_uses(ids_TK: np.ndarray) -> np.ndarray:
    """For each slot the next row that needs its expert, [T, K] int64; T where none does or the slot is unused."""
    (T, K), flat_N = ids_TK.shape, ids_TK.reshape(-1)
    order_N = np.argsort(flat_N, kind="stable")  # by expert, then by row
    row_N = order_N // max(K, 1)
    next_N = np.full(T * K, T, np.int64)
    same_N = flat_N[order_N][1:] == flat_N[order_N][:-1]
    next_N[order_N[:-1][same_N]] = row_N[1:][same_N]
    next_N[flat_N < 0] = T
    return next_N.reshape(T, K)


def reference(
    policy: str, ids_TK: np.ndarray, capacity: int, layer_E: np.ndarray, guessed_TK: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(misses, loads) of each row for one capacity, [T] each, step by step: what the compiled one is compared with."""
    cache = _Arc(capacity) if policy == "arc" else _Ranked(policy, capacity, layer_E.tolist())
    next_TK = next_uses(ids_TK)
    if policy == "belady":
        first = dict.fromkeys(range(len(layer_E)), len(ids_TK))
        for t in range(len(ids_TK) - 1, -1, -1):
            first |= {expert: t for expert in ids_TK[t].tolist() if expert >= 0}
        cache.use(-1, first)
    misses, loads = [], []
    for t, row in enumerate(ids_TK.tolist()):
        needed = {expert: int(next_TK[t, slot]) for slot, expert in enumerate(row) if expert >= 0}
        guessed = {e for e in guessed_TK[t].tolist() if e >= 0 and e not in cache} if guessed_TK is not None else set()
        missed = [expert for expert in needed if expert not in cache and expert not in guessed]
        misses.append(len(missed))
        loads.append(len(missed) + len(guessed))
        cache.use(t, needed)
    return np.array(misses, np.int64), np.array(loads, np.int64)


class _Ranked:
    """Keeps the experts of largest priority."""

    def __init__(self, policy: str, capacity: int, layers: list[int]):
        self.policy, self.capacity, self.layers = policy, capacity, layers
        self.held: set[int] = set()
        self.last: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.next: dict[int, int] = {}

    def __contains__(self, expert: int) -> bool:
        return expert in self.held

    def use(self, t: int, needed: dict[int, int]) -> None:
        """After row t, which needed these experts; with each the next row that does."""
        self.next |= needed
        for expert in needed:
            self.last[expert], self.count[expert] = t, self.count.get(expert, 0) + 1
        n_layers = max(self.layers) + 1

        def priority(expert: int) -> tuple[Any, float, int]:
            last, count = self.last[expert], self.count[expert]
            if self.policy == "least_stale":
                is_current = last // n_layers == t // n_layers
                return (is_current, -((self.layers[expert] - t - 1) % n_layers)), last, -expert
            rank = {"lru": last, "lfu": count, "lfru": count / (t + 1 - last), "belady": -self.next[expert]}
            return rank[self.policy], last if self.policy == "lfu" else 0, -expert

        self.held = set(sorted(self.held | needed.keys(), key=priority)[-self.capacity :])


class _Arc:
    """Adaptive Replacement Cache: t1, t2 are held, b1, b2 their ghosts; the least recent of a list stands first."""

    def __init__(self, capacity: int):
        self.c, self.p = capacity, 0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict[int, None]() for _ in range(4))

    def __contains__(self, expert: int) -> bool:
        return expert in self.t1 or expert in self.t2

    def use(self, _: int, needed: dict[int, int]) -> None:
        """After a row, which needed these experts."""
        for expert in needed:
            self._use(expert)

    def _use(self, e: int) -> None:
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        if e in t1 or e in t2:
            (t1 if e in t1 else t2).pop(e)
            t2[e] = None
        elif e in b1 or e in b2:
            if e in b1:
                self.p = min(c, self.p + max(len(b2) // len(b1), 1))
            else:
                self.p = max(0, self.p - max(len(b1) // len(b2), 1))
            self._replace(is_in_b2=e in b2)
            (b1 if e in b1 else b2).pop(e)
            t2[e] = None
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    self._replace(is_in_b2=False)
                else:
                    t1.popitem(last=False)
            elif (total := len(t1) + len(t2) + len(b1) + len(b2)) >= c:
                if total == 2 * c:
                    b2.popitem(last=False)
                self._replace(is_in_b2=False)
            t1[e] = None

    def _replace(self, *, is_in_b2: bool) -> None:
        from_t1 = len(self.t1) > 0 and (len(self.t1) > self.p or (is_in_b2 and len(self.t1) == self.p))
        held, ghosts = (self.t1, self.b1) if from_t1 else (self.t2, self.b2)
        expert, _ = held.popitem(last=False)
        ghosts[expert] = None
