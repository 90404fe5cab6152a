"""results/verdicts.py: sentences from a summary, with planted ratios."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.results import columns
from moe_lab.results.verdicts import SAME, Verdict, verdicts

Interval = tuple[float | None, float | None, float | None]
SLOWER, FASTER, SAME_, UNSURE = (2.1, 1.9, 2.3), (0.5, 0.4, 0.625), (1.0, 0.99, 1.01), (1.05, 0.9, 1.2)


def row(variant: str, batch: int = 1, ratio: Interval | None = None, **fields: Any) -> dict[str, Any]:
    """A row of the summary; without a ratio that of the anchor, torch."""
    model = fields.get("model", "decoder_moe")
    line = {
        "model": model,
        "batch": batch,
        "seq_len": 64,
        "setting_id": f"{model}{batch}{fields.get('seq_len', 64)}{fields.get('dtype')}",
        "variant": variant,
        "anchor": "torch",
        "is_anchor": ratio is None and variant == "torch",
        "status": "ok",
        "cell_id": "0" * 12,
        "directory": f"{variant}-{batch}",
        "ratio_to_anchor.paired": None if ratio is None else True,
    }
    if ratio is not None:
        line |= dict(zip((f"ratio_to_anchor.{name}" for name in ("p50", "ci95_low", "ci95_high")), ratio, strict=True))
    return line | fields


def judge(*rows: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a summary of these rows, typed as `aggregate` types it."""
    return verdicts(columns.frame(columns.table(rows, columns.SUMMARY)))


def texts(*rows: dict[str, Any]) -> list[str]:
    """Their sentences."""
    return [verdict.text for verdict in judge(*rows)]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        pytest.param(SLOWER, "sinkhorn is 2.1x slower than torch at T = 64, [1.9, 2.3]", id="slower"),
        pytest.param(FASTER, "sinkhorn is 2x faster than torch at T = 64, [1.6, 2.5]", id="faster"),
        pytest.param(SAME_, "sinkhorn takes as long as torch (within 3%) at T = 64, [0.99, 1.01]", id="same"),
        pytest.param(UNSURE, "sinkhorn against torch: inconclusive at T = 64", id="inconclusive"),
        pytest.param((2.1, None, None), "sinkhorn against torch: inconclusive at T = 64", id="no_interval"),
        pytest.param((1.02, 1.0002, 1.04), "sinkhorn is 1.02x slower than torch at T = 64, [1.0002, 1.04]", id="just"),
    ],
)
def test_a_cell_is_judged_by_its_interval(ratio: Interval, text: str) -> None:
    """Times slower and times faster both count upwards."""
    assert texts(row("torch"), row("sinkhorn", ratio=ratio)) == [text]


def test_steps_of_unlike_windows_are_compared_for_each_token() -> None:
    """Four tokens of each sequence in 1.5 times a step of one are faster, and are a pass of more tokens."""
    of_one = {"latency_ms.p50": 2.0, "throughput.time_per_output_token_ms": 2.0}
    of_four = {"latency_ms.p50": 3.0, "throughput.time_per_output_token_ms": 0.75}
    (text,) = texts(row("torch", 2, **of_one), row("window=4", 2, (1.5, 1.48, 1.52), **of_four))
    assert text == "window=4 is 2.67x faster than torch at T = 8, [2.63, 2.7]"
    (text,) = texts(row("torch", 2, **of_four), row("window=4", 2, (1.5, 1.48, 1.52), **of_four))
    assert text == "window=4 is 1.5x slower than torch at T = 8, [1.48, 1.52]"


def test_a_ratio_that_was_not_paired_is_no_verdict() -> None:
    """However large it is."""
    unpaired = row("sinkhorn", ratio=(9.0, None, None)) | {"ratio_to_anchor.paired": False}
    assert texts(row("torch"), unpaired) == ["sinkhorn and torch were not timed together at T = 64: no verdict"]


UNSTABLE = {"latency_ms.stable": False}


@pytest.mark.parametrize("ratio", [SLOWER, FASTER, SAME_, UNSURE], ids=["slower", "faster", "same", "inconclusive"])
@pytest.mark.parametrize(
    ("anchor", "other", "expected"),
    [
        pytest.param({}, UNSTABLE, "1 of 2", id="its_own"),
        pytest.param(UNSTABLE, {}, "2 of 2", id="the_anchors"),
        pytest.param(UNSTABLE, UNSTABLE, "2 of 2", id="both"),
        pytest.param({}, {}, None, id="none"),
    ],
)
def test_a_verdict_from_unstable_latencies_says_so(
    ratio: Interval, anchor: dict[str, Any], other: dict[str, Any], expected: str | None
) -> None:
    """In its own sentence, with how many; that of the anchor counts for each that is compared with it."""
    stable = {"latency_ms.stable": True}
    rows = [row("torch", batch, **{**stable, **anchor}) for batch in (1, 2)]
    rows += [row("sinkhorn", 1, ratio, **{**stable, **other}), row("sinkhorn", 2, ratio, **stable)]
    (verdict,) = judge(*rows)
    assert verdict.unstable == (0 if expected is None else int(expected[0]))
    assert ("not stable" in verdict.text) == (expected is not None)
    assert expected is None or verdict.text.endswith(f"; {expected} latencies are not stable")


def test_of_one_latency_none_is_counted() -> None:
    """`1 of 1 latencies are` is no sentence."""
    (verdict,) = judge(row("torch", 1, **UNSTABLE), row("sinkhorn", 1, SLOWER, **UNSTABLE))
    assert verdict.text.endswith("; its latency or the anchor's is not stable")


def test_an_unstable_anchor_of_another_machine_is_not_theirs() -> None:
    """Rows of one setting from two machines have an anchor each."""
    rows = [row("torch", env_id="a" * 12, **UNSTABLE), row("torch", env_id="b" * 12)]
    rows.append(row("sinkhorn", ratio=SLOWER, env_id="b" * 12))
    assert "not stable" not in " ".join(texts(*rows))


@pytest.mark.parametrize(
    ("slower", "same", "expected"),
    [
        pytest.param((1, 2, 4), (), ["slower at every size"], id="all"),
        pytest.param((1, 2), (4, 8), ["slower at T <= 128", "same at T >= 256"], id="small_ones"),
        pytest.param((4,), (1, 2), ["slower at T = 256", "same at T <= 128"], id="one"),
        pytest.param((1, 8), (2,), ["slower at T = 64 and 512", "same at T = 128"], id="a_list"),
        pytest.param((1, 4, 16), (2, 8), ["slower at T = 64, 256 and 1024", "same at T = 128 and 512"], id="comb"),
    ],
)
def test_cells_of_a_class_are_put_together(slower: tuple[int, ...], same: tuple[int, ...], expected: list[str]) -> None:
    """In words that hold for the sizes that were measured."""
    rows = [row("sinkhorn", batch, SLOWER) for batch in slower] + [row("sinkhorn", batch, SAME_) for batch in same]
    found = judge(*(row("torch", batch) for batch in (*slower, *same)), *rows)
    assert [f"{verdict.kind} {verdict.where}" for verdict in found] == expected
    assert sum(verdict.cells for verdict in found) == len(rows)


def test_equal_tokens_of_two_classes_are_told_apart_by_batch_and_seq_len() -> None:
    """128 tokens are slower in one shape and the same in another."""
    shapes = [(1, 128, SLOWER), (2, 64, SAME_), (4, 64, SAME_)]
    rows = [row("sinkhorn", batch, ratio, seq_len=seq_len) for batch, seq_len, ratio in shapes]
    found = judge(*(row("torch", batch, seq_len=seq_len) for batch, seq_len, _ in shapes), *rows)
    assert [verdict.where for verdict in found] == [
        "at batch 1 x seq_len 128",
        "at T = 256 and at batch 2 x seq_len 64",
    ]


def test_the_ratio_is_the_median_and_the_bracket_the_hull() -> None:
    """Over the cells of the class."""
    ratios = [(2.0, 1.9, 2.2), (3.2, 2.9, 3.4), (2.5, 1.5, 2.6)]  # their mean is another number
    found = judge(
        *(row("torch", n) for n in (1, 2, 4)), *(row("sinkhorn", 2**n, ratio) for n, ratio in enumerate(ratios))
    )
    assert [(one.ratio, one.low, one.high, one.cells) for one in found] == [(2.5, 1.5, 3.4, 3)]


def test_failures_and_skips_are_named_with_their_reasons() -> None:
    """Of the anchor too; and then what is said of the rest is not said of every size."""
    rows = [row("torch", 1), row("sinkhorn", 1, SLOWER), row("torch", 2), row("sinkhorn", 2, SLOWER)]
    rows += [row("torch", 4, status="failed", reason="out_of_memory"), row("sinkhorn", 4, status="skipped", reason="x")]
    assert texts(*rows) == [
        "torch failed at T = 256: out_of_memory",
        "sinkhorn is 2.1x slower than torch at every size timed together, [1.9, 2.3]",
        "sinkhorn was skipped at T = 256: x",
    ]


def test_each_model_and_each_other_setting_is_judged_apart() -> None:
    """Only what differs is named."""
    rows = [
        row(variant, ratio=ratio, model=model, dtype=dtype, device="cpu")
        for model, dtype in (("decoder_moe", "fp32"), ("decoder_moe", "bf16"), ("moe_layer", "bf16"))
        for variant, ratio in (("torch", None), ("sinkhorn", SLOWER))
    ]
    assert [verdict.group for verdict in judge(*rows)] == ["decoder_moe, fp32", "decoder_moe, bf16", "moe_layer, bf16"]


def test_a_record_without_a_variant_is_named_by_its_directory() -> None:
    """It failed before it was composed."""
    unknown = dict.fromkeys(("model", "variant", "batch", "seq_len", "setting_id", "anchor"))
    failed = row("x", status="failed", reason="error: y", directory="runs/x") | unknown
    assert texts(row("torch"), failed) == ["runs/x failed: error: y"]


def test_nothing_gives_nothing() -> None:
    """An empty summary has all columns and no row."""
    assert judge() == []
    assert judge(row("torch")) == []


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 4, 8, 16]),
            st.sampled_from([32, 64, 128]),
            st.sampled_from([SLOWER, FASTER, SAME_, UNSURE, "failed"]),
        ),
        unique_by=lambda cell: cell[:2],
    )
)
def test_every_cell_is_in_one_sentence_and_thresholds_hold(cells: list[tuple[int, int, Any]]) -> None:
    """ "T <= t" covers no size of another class."""
    rows = []
    for batch, seq_len, ratio in cells:
        rows.append(row("torch", batch, seq_len=seq_len))
        failed = {"status": "failed", "reason": "crash"} if ratio == "failed" else {}
        rows.append(row("sinkhorn", batch, None if failed else ratio, seq_len=seq_len, **failed))
    found = judge(*rows)
    assert sum(verdict.cells for verdict in found) == len(cells)
    kinds = {SLOWER: "slower", FASTER: "faster", SAME_: "same", UNSURE: "inconclusive", "failed": "failed"}
    for verdict in found:
        words = verdict.where.split()
        others = [batch * seq_len for batch, seq_len, ratio in cells if kinds[ratio] != verdict.kind]
        if verdict.kind != "failed":
            others = [b * s for b, s, ratio in cells if kinds[ratio] not in (verdict.kind, "failed")]
        if "<=" in words:
            assert all(tokens > int(words[words.index("<=") + 1]) for tokens in others)
        if ">=" in words:
            assert all(tokens < int(words[words.index(">=") + 1]) for tokens in others)
        if "every" in words:
            assert not others


def test_same_is_symmetric() -> None:
    """What bounds the interval above bounds its inverse below."""
    assert judge(row("torch"), row("x", ratio=(1, 1 / (1 + SAME), 1 + SAME)))[0].kind == "same"
    assert judge(row("torch"), row("x", ratio=(1, 0.97, 1.02)))[0].kind == "inconclusive"
