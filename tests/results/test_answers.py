"""results/answers.py: the sentences, from tables; no page is made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
import pytest

from moe_lab.records.schema import BUSY, DOES_NOT_HOLD, LAUNCH_BOUND
from moe_lab.results import columns
from moe_lab.results.answers import MOST, Answers, answers
from moe_lab.results.doubts import DOUBTFUL

Row = dict[str, Any]
_BITS = "quality.delta_bits_per_byte"


def row(variant: str, ratio: tuple[float, float, float] | None = None, **more: Any) -> Row:
    """A cell of the summary, and of the runs; the anchor has no ratio."""
    setting = f"{more.get('batch', 1)}-{more.get('seq_len', 64)}-{more.get('dtype', 'fp32')}-{more.get('model', 'm')}"
    paired = ratio is not None and more.get("status", "ok") == "ok"
    names = ("p50", "ci95_low", "ci95_high")
    ratios = {f"ratio_to_anchor.{name}": value for name, value in zip(names, ratio or (), strict=False)}
    found = {
        "model": "m",
        "router": variant,
        "dtype": "fp32",
        "batch": 1,
        "seq_len": 64,
        "status": "ok",
        "env_id": "e" * 12,
        "variant": variant,
        "setting_id": setting,
        "cell_id": f"{setting}-{variant}",
        "directory": f"{setting}-{variant}",
        "n_replicates": 3,
        "latency_ms.p50": 1.0 if ratio is None else ratio[0],
        "latency_ms.stable": True,
        "anchor": "native",
        "is_anchor": ratio is None,
        "ratio_to_anchor.paired": True if paired else None,
        "warnings": [],
        "router.causal": True,
        **ratios,
        **more,
    }
    return {key: value for key, value in found.items() if not (isinstance(value, float) and math.isnan(value))}


def quality(delta: float, half: float = 0.05, native: float = 2.0) -> Row:
    """Of a checkpoint on text."""
    ends = {f"{_BITS}_ci95_low": delta - half, f"{_BITS}_ci95_high": delta + half}
    return {"quality.bits_per_byte": native + delta, "quality.native_bits_per_byte": native, _BITS: delta, **ends}


def answered(rows: Iterable[Row]) -> Answers:
    """What the tables of these rows answer."""
    rows = list(rows)
    names = {"runs": columns.RUNS, "summary": columns.SUMMARY}
    wide = {name: {**kinds, "router.causal": columns.BOOL} for name, kinds in names.items()}
    tables = {name: columns.frame(columns.table(rows, kinds)) for name, kinds in wide.items()}
    return answers(tables["runs"], tables["summary"])


def texts(found: Answers, question: str) -> list[str]:
    """The sentences to one question, those that are folded too."""
    return [text for asked, text in (*found.shown, *found.folded) if asked == question]


NATIVE = row("native", **quality(0.0, 0.0))


def test_take_the_anchor_where_all_others_collapse() -> None:
    """Each is named with its price; that they are faster does not count."""
    found = answered([NATIVE, *(row(name, (0.8, 0.79, 0.81), **quality(1.62)) for name in ("sinkhorn", "hash"))])
    assert texts(found, "take") == ["Take native: the predictions of every other variant collapse"]
    assert texts(found, "price")[0] == (
        "sinkhorn: 1.25x faster than native [1.23, 1.27]; +1.62 bits per byte [+1.57, +1.67]: its predictions collapse"
    )


def test_models_with_other_weights_are_no_implementations_of_one() -> None:
    """Variants that differ in what was changed are judged by quality, also where none is surely faster."""
    fewer = [
        row(f"fewer{n}", (1.0, 0.9, 1.1), **quality(0.1 * n), **{"router": "native", "config.model.prune.experts": n})
        for n in (2, 4)
    ]
    whole = {**NATIVE, "config.model.prune.experts": None}
    (take,) = texts(answered([whole, *fewer]), "take")
    assert take.startswith("Take native: ") and "fewer" not in take.partition(":")[0]


def test_take_what_is_faster_and_no_worse() -> None:
    """With both numbers."""
    found = answered(
        [NATIVE, row("oea", (0.8, 0.79, 0.81), **quality(0.001, 0.005)), row("hash", (0.7, 0.7, 0.7), **quality(3))]
    )
    assert texts(found, "take") == [
        "Take oea: 1.25x faster than native [1.23, 1.27], +0.001 bits per byte [-0.004, +0.006]: no worse in quality; "
        "the predictions of hash collapse"
    ]


def test_an_anchor_that_is_not_native_is_not_what_bits_are_compared_with() -> None:
    """Speed is beside the anchor, bits per byte beside the checkpoint's own router."""
    found = answered([row("native", **quality(0.3)), row("oea", (0.8, 0.79, 0.81), **quality(0.1))])
    assert texts(found, "price") == [
        "oea: 1.25x faster than native [1.23, 1.27]; +0.10 bits per byte [+0.05, +0.15] over the checkpoint's own "
        "router"
    ]


def test_where_anchors_differ_none_is_named_for_all() -> None:
    """Each ratio is beside the anchor of its own setting."""
    rows = [row("a", anchor="a"), row("b", (2.0, 1.9, 2.1), anchor="a"), row("c", (2.0, 1.9, 2.1), anchor="a")]
    rows += [row("b", anchor="b", batch=2), row("c", (2.0, 1.9, 2.1), anchor="b", batch=2)]
    prices = texts(answered(rows), "price")
    assert prices[1:] == ["b: 2x slower than a [1.9, 2.1]", "c: 2x slower than the anchor [1.9, 2.1]"]


def test_bits_of_a_model_that_is_not_a_checkpoint_stand_beside_the_anchors() -> None:
    """There is no native router to take the difference from."""

    def bits(value: float) -> Row:
        name = "quality.bits_per_byte"
        return {name: value, f"{name}_ci95_low": value - 0.1, f"{name}_ci95_high": value + 0.1}

    found = answered([row("native", **bits(5.0)), row("b", (0.5, 0.49, 0.51), **bits(5.05))])
    assert texts(found, "price") == [
        "b: 2x faster than native [1.96, 2.04]; 5.05 bits per byte [4.95, 5.15], the anchor 5.00"
    ]


def test_an_output_error_names_the_router_it_is_beside() -> None:
    """Within rounding it is the same output, and then the faster is to be taken."""

    def error(value: float) -> Row:
        names = ("output_rel_error", "floor.output_rel_error", "reference")
        return {f"agreement.{name}": each for name, each in zip(names, (value, 1e-6, "torch"), strict=True)}

    found = answered([row("native", **error(0.0)), row("b", (0.8, 0.79, 0.81), **error(0.2))])
    assert texts(found, "price") == ["b: 1.25x faster than native [1.23, 1.27]; output error 0.2 beside torch"]
    assert texts(found, "take")[0].startswith("No choice without a price: b is 1.25x faster than native, but changes")
    many = [[row("native", batch=n, **error(0.0)), row("b", (2.0, 1.9, 2.1), batch=n, **error(0.2))] for n in range(9)]
    assert texts(answered(itertools.chain(*many)), "price")[0].endswith("; output error 0.2 beside torch")
    same = answered([row("native", **error(0.0)), row("b", (0.8, 0.79, 0.81), **error(2e-6))])
    assert texts(same, "take") == ["Take b: 1.25x faster than native [1.23, 1.27], the same output, but for rounding"]


def test_quality_that_differs_between_settings_is_a_range() -> None:
    """A median of both and the hull of their intervals would be true of neither."""
    rows = []
    for batch, more in ((1, 0.284), (8, 0.075)):
        rows += [row("native", batch=batch, **quality(0.0, 0.0))]
        rows += [row("capacity", (1.1, 1.09, 1.11), batch=batch, **quality(more, 0.01))]
    (price,) = texts(answered(rows), "price")
    assert price == "capacity: 1.1x slower than native [1.09, 1.11]; +0.075 to +0.284 bits per byte"


@pytest.mark.parametrize(
    ("delta", "half", "said"),
    [
        pytest.param(0.0, 0.0, "+0.00 bits per byte [+0.00, +0.00]: no worse in quality", id="equal"),
        pytest.param(0.002, 0.002, "+0.002 bits per byte [+0.000, +0.004]: no worse in quality", id="small"),
        pytest.param(0.3, 0.5, "+0.30 bits per byte [-0.20, +0.80]: not surely worse in quality", id="wide"),
        pytest.param(-0.3, 0.1, "-0.30 bits per byte [-0.40, -0.20]: better", id="better"),
        pytest.param(1.6, math.nan, "+1.60 bits per byte, without an interval", id="no_interval"),
    ],
)
def test_quality_is_not_called_equal_unless_it_surely_is(delta: float, half: float, said: str) -> None:
    """A wide interval, or none, says little."""
    (price,) = texts(answered([NATIVE, row("b", (0.8, 0.79, 0.81), **quality(delta, half))]), "price")
    assert price == f"b: 1.25x faster than native [1.23, 1.27]; {said}"


def test_bits_per_byte_without_an_interval_choose_nothing() -> None:
    """Of one window, say."""
    found = answered([NATIVE, row("hash", (0.7, 0.69, 0.71), **quality(1.6, math.nan))])
    assert texts(found, "take") == ["By speed alone hash: what each does to the predictions has no interval"]


def test_an_anchor_that_cannot_generate_text_is_said_to() -> None:
    """It may be why another is taken at all."""
    found = answered([row("ec", anchor="ec", **{"router.causal": False}), row("b", (0.8, 0.79, 0.81), anchor="ec")])
    assert texts(found, "take") == ["Take b: 1.25x faster than ec [1.23, 1.27]; ec is not causal"]


@pytest.mark.parametrize(
    "ratio",
    [pytest.param((0.0, 0.0, 0.0), id="zero"), pytest.param((math.inf, 1.9, math.inf), id="infinite")],
)
def test_a_ratio_that_cannot_be_is_no_answer(ratio: tuple[float, float, float]) -> None:
    """Of a clock that stood still; quality still decides."""
    found = answered([NATIVE, row("b", ratio, **quality(2.0))])
    assert texts(found, "take") == ["Take native: the predictions of b collapse"] and not texts(found, "fastest")
    assert not any("inf" in text or "nan" in text for _, text in found.shown)


def test_no_choice_without_a_price() -> None:
    """The faster predicts worse, but does not collapse."""
    found = answered([NATIVE, row("few", (0.5, 0.49, 0.51), **quality(0.2))])
    assert texts(found, "take") == [
        "No choice without a price: few is 2x faster than native, which predicts better (0.20 fewer bits per byte)"
    ]


def test_between_the_fastest_and_the_best_are_those_that_are_surely_faster_and_better() -> None:
    """A slower one is not, nor one that predicts as badly as the fastest, nor one that may be as slow as the best."""
    between = row("between", (0.8, 0.79, 0.81), **quality(0.1, half=0.02))
    others = [
        row("slower", (1.2, 1.19, 1.21), **quality(0.1, half=0.02)),
        row("as-bad", (0.8, 0.79, 0.81), **quality(0.2)),
        row("unsure", (0.99, 0.9, 1.1), **quality(0.1, half=0.02)),
    ]
    found = answered([NATIVE, row("few", (0.5, 0.49, 0.51), **quality(0.2)), between, *others])
    (text,) = texts(found, "take")
    assert text.endswith("(0.20 fewer bits per byte); between them between (1.25x faster, +0.10 bits per byte)")


def test_without_quality_speed_alone_is_said_to_be_speed_alone() -> None:
    """Of routers that choose otherwise; of implementations of one router the fastest is to be taken."""
    others = answered([row("native"), row("sinkhorn", (0.5, 0.49, 0.51))])
    assert texts(others, "take")[0].startswith("By speed alone sinkhorn:")
    assert texts(others, "price")[0].startswith("No quality was measured")
    same = answered([row("torch", anchor="torch"), row("triton", (0.5, 0.49, 0.51), anchor="torch")])
    assert texts(same, "take") == ["Take triton: 2x faster than torch [1.96, 2.04]"]
    assert texts(same, "price")[0] == "No quality was measured: the variants compute the same router"


def test_a_router_that_is_not_causal_is_not_taken_and_said_not_to_generate() -> None:
    """Its bits per byte are flattered."""
    found = answered([NATIVE, row("ec", (0.5, 0.49, 0.51), **quality(-0.3), **{"router.causal": False})])
    assert texts(found, "take") == ["Take native: ec is not causal"]
    assert texts(found, "price")[0].endswith("not causal: it cannot generate text")


def test_neighbouring_settings_with_one_answer_are_one_sentence() -> None:
    """By the tokens of a pass; ties are said."""
    rows = []
    for batch, seq_len in itertools.product((1, 2, 4, 8), (8, 64)):
        size = {"batch": batch, "seq_len": seq_len}
        is_small = batch * seq_len <= 64
        rows += [row("native", **size), row("b", (1.0, 0.98, 1.02) if is_small else (0.7, 0.69, 0.71), **size)]
    found = answered(rows)
    assert texts(found, "fastest") == [
        "native and b: no difference seen between them at T <= 64",
        "b is the fastest at T >= 128: 1.43x faster than native [1.41, 1.45]",
    ]


def test_a_tie_among_losses_is_not_called_a_loss() -> None:
    """One is taken for all, for it is never surely slower."""
    rows = []
    for batch, ratio in ((8, (1.5, 1.4, 1.6)), (64, (1.4, 1.3, 1.5)), (512, (1.1, 0.7, 3.0))):
        same = {"batch": batch, "router": "olmoe", "anchor": "grouped"}
        rows += [row("grouped", **same), row("loop", ratio, **same)]
    assert texts(answered(rows), "take") == ["Take grouped: loop is slower or not surely faster"]


def test_that_most_speeds_are_doubtful_is_said_before_what_is_concluded_from_them() -> None:
    """A few are said below."""
    unstable = {"latency_ms.stable": False}
    rows = [row("native", **unstable), row("b", (2.0, 1.9, 2.1), **unstable)]
    assert [asked for asked, _ in answered(rows).shown][:3] == ["take", "not sure", "fastest"]
    assert answered(rows).shown[1].text.startswith(DOUBTFUL)
    rows += [cell for n in (2, 4) for cell in (row("native", batch=n), row("b", (2.0, 1.9, 2.1), batch=n))]
    assert [asked for asked, _ in answered(rows).shown][:2] == ["take", "fastest"]


def test_what_to_take_comes_before_all_else() -> None:
    """Though each setting has another answer."""
    rows = []
    for at, batch in enumerate((1, 8, 64, 512)):
        ratio = (0.5, 0.49, 0.51) if at % 2 else (1.5, 1.4, 1.6)
        same = {"batch": batch, "router": "olmoe", "anchor": "grouped"}
        rows += [row("grouped", **same), row("loop", ratio, **same)]
    found = answered(rows)
    assert [asked for asked, _ in found.shown[:4]] == ["take"] * 4 == ["take"] * len(texts(found, "take"))


def test_loads_are_nothing_to_take() -> None:
    """Though one is the fastest."""
    rows = [row("balanced", workload="random", anchor="balanced", setting_id="s")]
    rows += [row("hot", (1.5, 1.4, 1.6), workload="hot", anchor="balanced", setting_id="s")]
    found = answered(rows)
    assert texts(found, "take") == [] and texts(found, "fastest")[0].startswith("balanced is the fastest")


def test_ratios_without_an_interval_decide_nothing() -> None:
    """Quality still does; and what to do is said."""
    nan = math.nan
    found = answered([NATIVE, row("hash", (0.7, nan, nan), **quality(2.0))])
    assert texts(found, "take") == ["Take native: the predictions of hash collapse"]
    assert texts(found, "fastest") == []
    assert "about 0.7x as long as native, without an interval" in texts(found, "price")[0]
    assert texts(found, "not sure")[0] == (
        "The one ratio is without an interval, from too few rounds: raise measure.max_time_s"
    )
    speed_only = answered([row("native"), row("hash", (0.7, nan, nan))])
    assert texts(speed_only, "take") == texts(speed_only, "fastest") == []


def test_what_another_dominates_is_not_taken() -> None:
    """It is as good, and no speed is known; but it reads more of its experts."""
    mb = "routing.pooled.expert_mb"
    rows = [
        row("native", **quality(0.0), **{mb: 5.0}),
        row("more", (1.3, math.nan, math.nan), **quality(0.01), **{mb: 7.0}),
    ]
    assert texts(answered(rows), "take")[0].startswith("Take native: ")
    rows[1][mb] = 5.0
    assert texts(answered(rows), "take")[0].startswith("Take native or more: ")


@pytest.mark.parametrize(
    ("n", "bad", "said"),
    [
        pytest.param(2, 2, "Speeds are doubtful: both latencies are not stable (raise", id="both"),
        pytest.param(3, 3, "Speeds are doubtful: all 3 latencies are not stable (raise", id="all"),
        pytest.param(3, 2, "Speeds are doubtful: of 3 latencies 2 are not stable (raise", id="most"),
        pytest.param(3, 1, "Of 3 latencies 1 is not stable (raise", id="one"),
    ],
)
def test_bad_latencies_are_counted_as_a_person_would(n: int, bad: int, said: str) -> None:
    """All of them are no number of them."""
    rows = [row(f"v{at}", (2.0, 1.9, 2.1) if at else None, **{"latency_ms.stable": at >= bad}) for at in range(n)]
    assert texts(answered(rows), "not sure")[0].startswith(said)


def test_a_setting_that_was_not_judged_is_not_counted_for_the_sentence() -> None:
    """It may be otherwise there."""
    rows = []
    for batch in (1, 2, 4):
        ratio = (0.7, 0.69, 0.71) if batch < 4 else (0.7, math.nan, math.nan)
        rows += [row("native", batch=batch), row("b", ratio, batch=batch)]
    assert texts(answered(rows), "fastest") == ["b is the fastest at T <= 128: 1.43x faster than native [1.41, 1.45]"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        pytest.param([row("a"), row("b", (1.05, 0.9, 1.2))], "the interval has 1 in it", id="spans_one"),
        pytest.param(
            [row("a"), row("b", (2.0, 1.9, 2.1), **{"latency_ms.stable": False})], "1 is not stable", id="unstable"
        ),
        pytest.param([row("a", warnings=[f"{BUSY}others"]), row("b", (2, 1.9, 2.1))], "busy machine", id="busy"),
        pytest.param([row("a", warnings=[f"{LAUNCH_BOUND}7 %"]), row("b", (2, 1.9, 2.1))], "cuda_graph", id="launch"),
        pytest.param(
            [row("a", n_replicates=1), row("b", (2, 1.9, 2.1), n_replicates=1)], "one process", id="replicates"
        ),
        pytest.param([row("a")], "Nothing was compared", id="alone"),
        pytest.param(
            [row("a", status="failed", reason="timeout: build"), row("b", (2.0, 1.9, 2.1), is_anchor=False)],
            "the anchor of the setting did not run",
            id="no_anchor",
        ),
    ],
)
def test_what_is_not_sure_is_said_with_its_reason(rows: list[Row], said: str) -> None:
    """One sentence for each reason."""
    if "did not run" in said:
        rows[1] = {k: v for k, v in rows[1].items() if not k.startswith("ratio")}
    assert any(said in text for text in texts(answered(rows), "not sure"))


def test_failures_and_skips_are_counted_by_reason() -> None:
    """Also where nothing ran at all; then there is no other sentence."""
    rows = [row(name, status="failed", reason="out_of_memory") for name in ("a", "b")]
    found = answered([*rows, row("c", status="skipped", reason="unavailable: no GPU")])
    assert found.shown == [
        ("failed", "2 of 3 cells failed: out_of_memory"),
        ("skipped", "1 of 3 cells skipped: unavailable: no GPU"),
    ]


def test_a_property_that_does_not_hold_is_named() -> None:
    """Before the other failures."""
    lies = row("mine", status="failed", reason="mismatch: causal", **{"check.causal": DOES_NOT_HOLD})
    assert texts(answered([row("native"), lies]), "failed")[0] == "mine declares causal, which does not hold"


def test_a_large_sweep_answers_in_ten_sentences_and_folds_the_rest() -> None:
    """Every question keeps a sentence; nothing is lost."""
    rows = [NATIVE, *(row(f"r{n}", (1 + n / 10, 1.05 + n / 10, 1.1 + n / 10), **quality(0.1 * n)) for n in range(30))]
    rows.append(row("broken", status="failed", reason="error: no"))
    rows.append(row("noisy", (1.0, 0.8, 1.2), **quality(0.2)))
    found = answered(rows)
    assert len(found.shown) == MOST and {asked for asked, _ in found.shown} == {
        "dominated",
        "take",
        "fastest",
        "price",
        "not sure",
        "failed",
    }
    assert len(texts(found, "price")) == 31


@pytest.mark.parametrize("n", [pytest.param(n, id=str(n)) for n in (0, 1)])
def test_next_to_nothing_is_no_sentence_about_variants(n: int) -> None:
    """An empty folder, a single run."""
    found = answered([row("native")] * n)
    assert {asked for asked, _ in found.shown} == ({"not sure"} if n else set())
    assert isinstance(found.folded, list) and not pd.isna(len(found.shown))


def test_several_models_and_dtypes_are_told_apart() -> None:
    """Where their answers differ."""
    rows = []
    for model, dtype in itertools.product(("x", "y"), ("bf16", "fp32")):
        ratio = (0.7, 0.69, 0.71) if dtype == "bf16" else (1.5, 1.4, 1.6)
        rows += [row("native", model=model, dtype=dtype), row("b", ratio, model=model, dtype=dtype)]
    assert texts(answered(rows), "fastest") == [
        "b is the fastest at bf16: 1.43x faster than native [1.41, 1.45]",
        "native is the fastest at fp32: b takes 1.5x as long [1.4, 1.6]",
    ]
