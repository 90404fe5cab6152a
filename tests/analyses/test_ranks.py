"""analyses/ranks.py: steps by hand, against a slow count of every message, and times against a discrete-event run."""

from __future__ import annotations

import heapq
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lab.analyses import ranks
from moe_lab.analyses.ranks import of_steps
from tests.analyses import traces

CFG: dict[str, Any] = {
    "ranks": [2],
    "step_tokens": 4,
    "token_bytes": 1000,
    "ranks_per_node": 2,
    "node_limit": 1,
    "alpha_us": 1.0,
    "node_gb_per_s": 10.0,
    "network_gb_per_s": 1.0,
}


def step(ids: list[list[int]], E: int, R: int, **changes: Any) -> dict[str, float]:
    """One step, by name."""
    values = of_steps(np.array(ids, np.int16), E, R, CFG | {"step_tokens": len(ids)} | changes)
    return dict(zip(ranks._OF_A_STEP, values[:, 0].tolist(), strict=True))


def test_a_step_by_hand() -> None:
    """Four experts on four ranks in two nodes, a token on each rank.

    Token 0 (rank 0) uses 0 and 1: one message to rank 1, in its node. Token 1 uses 2 and 3: two messages to the other
    node. Token 2 uses 0 and 2: one to the other node. Token 3 uses 2 only: one message to rank 2, in its node.
    """
    found = step([[0, 1], [2, 3], [2, 0], [2, -1]], 4, 4)
    assert (found["fullest"], found["slots"], found["experts"]) == (3, 7, 1)  # expert 2 is used three times
    assert (found["pairs"], found["nodes"], found["over"]) == (7, 5, 1)
    assert found["largest_pair"] == 1
    # Rank 1 sends two tokens of 1 kB beyond its node at 1 GB/s: 2 us, more than 0.1 us within it.
    assert found["us"] == pytest.approx(2 * (1 + 2))
    assert step([[0, 1], [2, 3], [2, 0], [2, -1]], 4, 4, ranks_per_node=4)["us"] == pytest.approx(2 * (1 + 0.2))


def test_two_experts_of_a_rank_are_one_message() -> None:
    """Experts 2 and 3 lie on rank 1; its own token stays."""
    found = step([[2, 3], [2, 3]], 4, 2)
    assert (found["pairs"], found["largest_pair"], found["experts"], found["fullest"]) == (2, 1, 2, 4)


def test_with_more_ranks_than_experts_there_are_copies() -> None:
    """Expert 0 is on ranks 0 and 1, expert 1 on 2 and 3; a rank sends to the copy of its parity."""
    found = step([[0], [0], [1], [0]], 2, 4)
    assert (found["fullest"], found["experts"], found["pairs"]) == (2, 1, 4)  # tokens 1 and 3 go to rank 1
    assert found["us"] == pytest.approx(2 * (1 + 1.0))  # token 3 goes to the other node


def slowly(ids_TK: np.ndarray, E: int, R: int, cfg: dict[str, Any]) -> tuple[Counter[tuple[int, int]], Counter[int]]:
    """(tokens by pair of ranks, slots by rank) of one step, message by message."""
    pairs, load = Counter[tuple[int, int]](), Counter[int]()
    for token, row in enumerate(ids_TK.tolist()):
        source = token * R // len(ids_TK)
        targets = [e // (E // R) if R <= E else e * (R // E) + source % (R // E) for e in row if e >= 0]
        load.update(targets)
        pairs.update((source, target) for target in set(targets) if target != source)
    return pairs, load


@pytest.mark.parametrize(("E", "R"), [pytest.param(E, R, id=f"E{E}-R{R}") for E, R in ((16, 4), (16, 16), (8, 32))])
def test_it_counts_messages(E: int, R: int) -> None:
    """As many as a count of each, for three steps at once; unused slots are none."""
    rng = np.random.default_rng(0)
    ids_TK = rng.permuted(np.tile(np.arange(E), (3 * 64, 1)), axis=1)[:, :3].astype(np.int16)
    ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
    cfg = CFG | {"step_tokens": 64}
    values = of_steps(ids_TK, E, R, cfg)
    for index in range(3):
        found = dict(zip(ranks._OF_A_STEP, values[:, index], strict=True))
        pairs, load = slowly(ids_TK[index * 64 :][:64], E, R, cfg)
        assert found["fullest"] == max(load.values()) and found["slots"] == sum(load.values())
        assert found["largest_pair"] == max(pairs.values())
        us = 0.0
        for beyond, rate in ((False, 10.0), (True, 1.0)):
            for end in (0, 1):
                at_rank = Counter[int]()
                for pair, n in pairs.items():
                    if (pair[0] // 2 != pair[1] // 2) == beyond:
                        at_rank[pair[end]] += n
                us = max(us, max(at_rank.values(), default=0) / rate)
        assert found["us"] == pytest.approx(2 * (1 + us))


def events(pairs: Counter[tuple[int, int]], R: int, us_of_token: float) -> float:
    """How long all messages take, one after the other at each port: a sender begins with the rank after it, and goes on
    with the next that can receive, or waits for the first that can.
    """
    waiting = {r: [(r + k) % R for k in range(1, R) if pairs[r, (r + k) % R]] for r in range(R)}
    receives_until, queue = dict.fromkeys(range(R), 0.0), [(0.0, r) for r in range(R)]
    end = 0.0
    while queue:
        now, sender = heapq.heappop(queue)
        if not waiting[sender]:
            continue
        free = [target for target in waiting[sender] if receives_until[target] <= now]
        if not free:
            heapq.heappush(queue, (min(receives_until[target] for target in waiting[sender]), sender))
            continue
        waiting[sender].remove(free[0])
        done = now + pairs[sender, free[0]] * us_of_token
        receives_until[free[0]], end = done, max(end, done)
        heapq.heappush(queue, (done, sender))
    return end


def test_the_model_is_a_little_faster_than_a_discrete_event_run(tmp_path: Path) -> None:
    """On 8 ranks of one node: never slower than the messages one after the other, and some 4 % faster on average."""
    routes = traces.routes(traces.random(tmp_path / "x.trace", 40, 128, 64, 4, 1))
    cfg = CFG | {"ranks": [8], "step_tokens": 256, "ranks_per_node": 8, "alpha_us": 0.0}
    us_S = ranks.of_layer(routes, cfg, [routes.layer])[8][-1] / 2
    ids_TK = routes.ids_TK[routes.view.computed]
    ran_S = np.array([events(slowly(ids_TK[s * 256 :][:256], 64, 8, cfg)[0], 8, 0.1) for s in range(len(us_S))])
    assert len(us_S) == 20 and (ran_S >= us_S - 1e-9).all()
    assert 1 <= ran_S.mean() / us_S.mean() < 1.1 and (ran_S / us_S).max() < 1.3


def test_the_sentences_and_what_is_left_out(tmp_path: Path) -> None:
    """Ranks that do not fit are said, and so is a trace that is too short."""
    path = traces.random(tmp_path / "x.trace", 40, 32)
    findings = traces.found(path, ranks, CFG | {"ranks": [2, 3, 8, 64], "step_tokens": 64})
    table = findings.tables["ranks"].set_index("ranks")
    assert table.index.tolist() == [2, 8, 64] and "3 ranks: neither divides" in findings.notes[0]
    assert table["load"].is_monotonic_increasing and table["steps"].tolist() == [20] * 3
    assert table["ranks_per_token"].between(1, 2).all() and (table["all_to_all_us_p99"] >= table["all_to_all_us"]).all()
    assert "From 2 to 64 ranks" in findings.sentences[0] and f"{table['load'][64]:.2f}" in findings.sentences[0]
    assert traces.found(path, ranks, CFG | {"step_tokens": 10**6}).notes


def test_a_thousand_ranks() -> None:
    """One layer of 256 experts, 8 of them for each of 1024 tokens, ten steps."""
    rng = np.random.default_rng(0)
    ids_TK = np.argpartition(rng.random((10 * 1024, 256), np.float32), 8, axis=1)[:, :8].astype(np.int16)
    found = of_steps(ids_TK, 256, 1024, CFG | {"step_tokens": 1024})
    assert found.shape == (8, 10) and (found[0] >= 8).all() and (found[1] == 8 * 1024).all()
