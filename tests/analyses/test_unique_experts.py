"""analyses/unique_experts.py: windows and batches by hand, chance by its formula, and against sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import unique_experts
from moe_lab.analyses.findings import Findings
from moe_lab.analyses.unique_experts import expert_masks, groups_of
from tests.analyses import traces


def found(path: Path, tokens: list[int], batch: list[int]) -> Findings:
    return traces.found(path, unique_experts, {"tokens": tokens, "batch": batch})


def test_windows_by_hand(tmp_path: Path) -> None:
    """Two sequences of four tokens with two of four experts each."""
    path = traces.write(
        tmp_path / "x.trace",
        [[[0, 1], [1, 0], [0, 2], [0, 3]], [[2, 3], [2, 3], [2, 3], [1, 3]]],
        4,
    )
    findings = found(path, [1, 2, 4], [1, 2])
    table = findings.tables["unique_experts"].set_index(["tokens", "batch"])
    unique = table["unique_experts"]
    # Windows of two: {0 1}, {0 2 3}; {2 3}, {1 2 3}. Of four: all of the four; {1 2 3}.
    assert (unique[1, 1], unique[2, 1], unique[4, 1]) == (2, 10 / 4, 7 / 2)
    # Batches of two: {0 1 2 3}, {0 1 2 3}, {0 2 3}, {0 1 3}; windows of two: {0 1 2 3}, {0 1 2 3}.
    assert (unique[1, 2], unique[2, 2]) == (14 / 4, 4)
    assert table["times_one_token"][2, 1] == 10 / 4 / 2
    share = np.array([4, 3, 4, 5]) / 8
    assert table["independent"][2, 1] == pytest.approx((1 - (1 - share) ** 2).sum())
    assert table["uniform"][2, 2] == pytest.approx(4 * (1 - (1 - 2 / 4) ** 4))
    assert table["mb_per_step"][2, 1] == pytest.approx(2 * 2.5)
    assert table["steps"].to_dict() == {(1, 1): 8, (1, 2): 4, (2, 1): 4, (2, 2): 2, (4, 1): 2, (4, 2): 1}


def test_it_counts_sets(tmp_path: Path) -> None:
    """More than 64 experts, unused slots, windows that do not fill a sequence."""
    rng = np.random.default_rng(0)
    sequences = [
        [list(rng.permutation(130)[: rng.integers(1, 6)]) for _ in range(rng.integers(5, 12))] for _ in range(7)
    ]
    path = traces.write(tmp_path / "x.trace", sequences, 130)
    table = found(path, [3], [1]).tables["unique_experts"]
    windows = [s[a : a + 3] for s in sequences for a in range(0, len(s) - 2, 3)]
    sizes = [len({expert for token in window for expert in token}) for window in windows]
    assert table["unique_experts"].item() == pytest.approx(np.mean(sizes)) and table["steps"].item() == len(windows)


def test_masks_by_hand() -> None:
    """A bit for each expert, in words of 64."""
    masks_TW = expert_masks(np.array([[0, 65], [3, -1], [-1, -1]]), 70)
    assert masks_TW.tolist() == [[1, 2], [8, 0], [0, 0]]


def test_a_batch_has_different_sequences() -> None:
    """At the same places; and none where there are too few."""
    sequence_N, place_N = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    groups_GB = groups_of(sequence_N, place_N, 3)
    assert groups_GB is not None and groups_GB.shape == (8, 3)
    assert all(len(set(group)) == 3 for group in sequence_N[groups_GB].tolist())
    assert all(len(set(group)) == 1 for group in place_N[groups_GB].tolist())
    assert groups_of(sequence_N, place_N, 7) is None


def test_what_a_trace_is_too_small_for_is_said(tmp_path: Path) -> None:
    """Long windows, large batches; and the sentences are about what there is."""
    path = traces.random(tmp_path / "x.trace", 12, 40)
    findings = found(path, [1, 4, 50], [1, 8, 64])
    (note,) = findings.notes
    assert "1 x 64" in note and "50 x 1" in note and "4 x 8" not in note
    first, last = findings.sentences
    assert "Verifying 4 tokens at batch 1 loads" in first and "at batch 8" in last
    table = findings.tables["unique_experts"].set_index(["tokens", "batch"])
    assert table["unique_experts"][4, 1] < table["independent"][4, 1] < table["uniform"][4, 1]
    path = traces.write(tmp_path / "y.trace", [[[0]]], 4)
    findings = found(path, [5], [1])
    assert findings.notes and not findings.sentences and not findings.tables
