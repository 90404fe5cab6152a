"""results/regions.py: which answer holds where."""

from __future__ import annotations

import itertools

import pytest

from moe_lab.results.regions import Place, regions

GRID: list[Place] = [{"T": b * s, "batch": b, "seq_len": s} for b in (1, 2, 4, 8) for s in (8, 16, 32)]


def said(answers: list[str], places: list[Place]) -> dict[str, str]:
    """The answers by region."""
    return {region.where: region.answer for region in regions(answers, places)}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        pytest.param(["a"] * 12, {"": "a"}, id="everywhere"),
        pytest.param(["a" if p["T"] <= 32 else "b" for p in GRID], {"T <= 32": "a", "T >= 64": "b"}, id="tokens"),
        pytest.param(
            ["a" if p["batch"] <= 2 else "b" for p in GRID], {"batch 1 to 2": "a", "batch 4 to 8": "b"}, id="batch"
        ),
        pytest.param(
            ["a" if p["batch"] == 2 else "b" for p in GRID],
            {"batch 1": "b", "batch 2": "a", "batch 4 to 8": "b"},
            id="in_the_middle",
        ),
    ],
)
def test_neighbours_with_one_answer_are_one_region(answers: list[str], expected: dict[str, str]) -> None:
    """Cut along the axis that explains them."""
    assert said(answers, GRID) == expected


def test_names_are_grouped_and_numbers_are_not() -> None:
    """Two dtypes with one answer are one region; batch 1 and 4 without 2 are two."""
    places: list[Place] = [{"dtype": d, "batch": b} for d in ("bf16", "fp16", "fp32") for b in (1, 2, 4)]
    assert said(["b" if p["dtype"] == "fp16" else "a" for p in places], places) == {"fp16": "b", "bf16 and fp32": "a"}


def test_a_cut_within_a_cut() -> None:
    """One model changes its answer with the size, the other does not."""
    places: list[Place] = [{"T": t, "model": m} for m in ("x", "y") for t in (1, 2, 4, 8)]
    answers = ["a" if p["model"] == "x" or p["T"] <= 2 else "b" for p in places]
    assert said(answers, places) == {"x": "a", "y, T <= 2": "a", "y, T >= 4": "b"}


def test_a_few_odd_ones_among_hundreds_are_counted_and_make_no_region() -> None:
    """Each region says how many of its settings have its answer."""
    places: list[Place] = [{"T": b * s, "batch": b, "seq_len": s} for b in range(1, 21) for s in range(1, 21)]
    answers = ["a"] * 400
    answers[7] = answers[211] = "b"
    (one,) = regions(answers, places)
    assert (one.where, one.answer, one.at) == ("", "a", " (398 of 400 settings)")


def test_two_settings_with_two_answers_make_two() -> None:
    """Nothing is odd among two."""
    assert said(["a", "b"], [{"batch": 1}, {"batch": 8}]) == {"batch 1": "a", "batch 8": "b"}


@pytest.mark.slow
def test_every_setting_is_in_one_region_and_never_counted_for_another_answer() -> None:
    """Whatever the answers are."""
    for answers in itertools.product("abc", repeat=6):
        places: list[Place] = [
            {"T": b * s, "b": b, "s": s, "m": m} for b in (1, 2) for s, m in ((1, "x"), (2, "y"), (4, "x"))
        ]
        found = regions(answers, places)
        members = [index for region in found for index in region.members]
        assert len(members) == len(set(members)) and sum(region.size for region in found) == 6
        assert all(answers[index] == region.answer for region in found for index in region.members)


def test_a_key_that_a_model_lacks_is_said() -> None:
    """As a value of its own; a value of the configuration has its key."""
    places: list[Place] = [{"seq_len": None, "config.model.top_k": 1}, {"seq_len": 8, "config.model.top_k": 2}]
    assert set(said(["a", "b"], places)) <= {"no seq_len", "seq_len=8", "top_k 1", "top_k 2"}
    assert regions([], []) == []
