"""quality.py: bits, KL and agreement against their formulas in float64; intervals against what they should cover."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import moe_lab
from moe_lab.measure import quality as quality_module
from moe_lab.measure.quality import domain_information, quality
from moe_lab.models import Output
from moe_lab.models.parameters import shareable
from moe_lab.workloads.text import Windows, read_domains, windows
from tests import quick, tiny

CPU = torch.device("cpu")
NAMES = ("code", "prose")
NUMBERS = ("bits_per_byte", "nats_per_token", "delta_bits_per_byte", "kl_to_native", "top1_agreement")
FIELDS = {"tokens", "windows", "bytes", "native_bits_per_byte", *NUMBERS} | {
    f"{name}_ci95_{end}" for name in NUMBERS for end in ("low", "high")
}


class Fixed(nn.Module):
    """Logits looked up by the id of a token, so that a test can look them up too; counts its passes."""

    def __init__(self, logits_VV: Tensor):
        super().__init__()
        self.logits_VV = logits_VV
        self.batches: list[int] = []

    def forward(self, ids_BS: Tensor) -> Output:
        self.batches.append(len(ids_BS))
        return Output(self.logits_VV[ids_BS])


def random_logits(V: int, seed: int, scale: float = 2.0) -> Tensor:
    """[V, V] float64."""
    return scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_models(V: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Fixed, Fixed]:
    """A run and its native model that agree on about three in four first choices."""
    native = random_logits(V, 1, scale)
    return Fixed((native + random_logits(V, 2, scale / 2)).to(dtype)), Fixed(native.to(dtype))


def some_windows(W: int, S: int, V: int, seed: int = 0, n_domains: int = 2) -> Windows:
    """Random tokens of 1 to 4 bytes; domains in turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (W, S + 1), generator=generator)
    return Windows(
        ids_WS=ids[:, :-1],
        targets_WS=ids[:, 1:],
        domain_W=torch.arange(W) % n_domains,
        bytes_W=torch.randint(1, 5, (W, S), generator=generator).sum(-1),
        names=NAMES[:n_domains],
        left_out=(),
    )


def by_formula(model: Fixed, native: Fixed, windows: Windows, some: list[int]) -> dict[str, float]:
    """The numbers of the windows `some`, token by token in numpy's float64."""
    p_VV, q_VV = (
        np.exp(m.logits_VV.double().numpy()) / np.exp(m.logits_VV.double().numpy()).sum(-1, keepdims=True)
        for m in (model, native)
    )
    nats = native_nats = kl = same = tokens = n_bytes = 0.0
    for w in some:
        n_bytes += int(windows.bytes_W[w])
        for i, target in zip(windows.ids_WS[w].tolist(), windows.targets_WS[w].tolist(), strict=True):
            tokens += 1
            nats -= np.log(p_VV[i, target])
            native_nats -= np.log(q_VV[i, target])
            kl += (q_VV[i] * np.log(q_VV[i] / p_VV[i])).sum()
            same += p_VV[i].argmax() == q_VV[i].argmax()
    return {
        "tokens": tokens,
        "windows": len(some),
        "bytes": n_bytes,
        "bits_per_byte": nats / np.log(2) / n_bytes,
        "nats_per_token": nats / tokens,
        "native_bits_per_byte": native_nats / np.log(2) / n_bytes,
        "delta_bits_per_byte": (nats - native_nats) / np.log(2) / n_bytes,
        "kl_to_native": kl / tokens,
        "top1_agreement": same / tokens,
    }


def without_intervals(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers themselves."""
    return {key: found[key] for key in found if "ci95" not in key and key in FIELDS}


@pytest.mark.parametrize(
    ("dtype", "rel"),
    [pytest.param(torch.float32, 1e-5, id="fp32"), pytest.param(torch.bfloat16, 1e-5, id="bf16")],
)
@pytest.mark.parametrize("batch", [pytest.param(b, id=f"batch={b}") for b in (1, 3, 12)])
@pytest.mark.parametrize("at_once", [pytest.param(n, id=f"at_once={n}") for n in (1, 100, 1 << 26)])
def test_the_numbers_are_those_of_the_formulas(
    dtype: torch.dtype, rel: float, batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overall and by domain, whatever the batch and the pieces in which it is computed; bf16 logits lose nothing."""
    monkeypatch.setattr(quality_module, "_ELEMENTS_AT_ONCE", at_once)
    V, windows = 23, some_windows(W=12, S=7, V=23)
    model, native = two_models(V, dtype=dtype)
    found, _ = quality(model, native, windows, batch, CPU)
    assert without_intervals(found) == pytest.approx(by_formula(model, native, windows, list(range(12))), rel=rel)
    for d, name in enumerate(NAMES):
        expected = by_formula(model, native, windows, list(range(d, 12, 2)))
        assert without_intervals(found["domains"][name]) == pytest.approx(expected, rel=rel)
    assert model.batches == native.batches == [batch] * (12 // batch)


def test_it_has_the_fields_it_promises_and_they_go_into_json() -> None:
    """Plain numbers."""
    found, _ = quality(Fixed(random_logits(9, 1)), Fixed(random_logits(9, 2)), some_windows(6, 4, 9), 2, CPU)
    assert set(found) == FIELDS | {"windows_left_out", "domains", "domain_information"}
    assert {frozenset(domain) for domain in found["domains"].values()} == {frozenset(FIELDS)}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_uniform_model_of_bytes_needs_8_bits_a_byte() -> None:
    """log2 256, whatever the logits' common height; every window alike, so the interval has no width."""
    windows = some_windows(6, 50, 256)._replace(bytes_W=torch.full((6,), 50))
    found, _ = quality(Fixed(torch.full((256, 256), 30.0)), None, windows, 2, CPU)
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert found["nats_per_token"] == pytest.approx(math.log(256), rel=1e-6)
    assert found["bits_per_byte_ci95_low"] == pytest.approx(8, rel=1e-6)
    assert found["bits_per_byte_ci95_high"] == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("twice", [pytest.param(True, id="same_model_twice"), pytest.param(False, id="native_itself")])
def test_a_model_is_as_good_as_itself(twice: bool) -> None:
    """KL 0, agreement 1, no difference, each for certain; one pass will do for the native one."""
    model = Fixed(random_logits(31, 1))
    found, _ = quality(model, Fixed(model.logits_VV) if twice else model, some_windows(8, 5, 31), 4, CPU)
    for name, value in (("kl_to_native", 0), ("top1_agreement", 1), ("delta_bits_per_byte", 0)):
        assert [found[name], found[f"{name}_ci95_low"], found[f"{name}_ci95_high"]] == [value] * 3
    assert found["native_bits_per_byte"] == found["bits_per_byte"]
    assert model.batches == [4, 4]


@pytest.mark.parametrize("noise", [pytest.param(10.0**-n, id=f"1e-{n}") for n in (1, 2, 3, 4)])
def test_a_small_kl_is_not_lost_in_the_rounding_of_fp32(noise: float) -> None:
    """Of models that nearly agree, and never below 0; the plain sum of q ln(q/p) in fp32 gives up near 1e-7."""
    V, windows = 200, some_windows(4, 20, 200)
    native = Fixed(random_logits(V, 1).float())
    model = Fixed((native.logits_VV + noise * random_logits(V, 2, scale=1)).float())
    found, _ = quality(model, native, windows, 2, CPU)
    exact = by_formula(model, native, windows, list(range(4)))["kl_to_native"]
    assert exact == pytest.approx(noise**2 / 2, rel=0.3)
    assert found["kl_to_native"] == pytest.approx(exact, rel=1e-3, abs=1e-8)
    assert found["kl_to_native"] > -1e-8


@pytest.mark.parametrize(
    ("W", "batch", "left_out"),
    [pytest.param(7, 3, 1, id="7/3"), pytest.param(5, 4, 1, id="5/4"), pytest.param(8, 4, 0, id="8/4")],
)
def test_an_incomplete_batch_is_left_out_and_counted(W: int, batch: int, left_out: int) -> None:
    """The numbers are those of the windows that fill batches; no pass has fewer rows."""
    windows = some_windows(W, 5, 11)
    model, native = two_models(11)
    found, _ = quality(model, native, windows, batch, CPU)
    assert found["windows_left_out"] == left_out and found["windows"] == W - left_out
    expected = by_formula(model, native, windows, list(range(W - left_out)))
    assert without_intervals(found) == pytest.approx(expected, rel=1e-5)
    assert sum(domain["windows"] for domain in found["domains"].values()) == W - left_out
    assert set(model.batches) == {batch}


def test_fewer_windows_than_a_batch_is_a_mistake() -> None:
    """How many there are, and what to do."""
    with pytest.raises(ValueError, match=r"workload\.path: .*3 windows.*batch=4; lower batch"):
        quality(Fixed(random_logits(9, 1)), None, some_windows(3, 5, 9), 4, CPU)


def test_one_window_has_no_interval_and_none_no_numbers() -> None:
    """None, not 0: of a domain with one window the numbers are known, of one without any nothing is."""
    windows = some_windows(2, 5, 9, n_domains=1)._replace(domain_W=torch.tensor([0, 0]), names=NAMES)
    found, _ = quality(Fixed(random_logits(9, 1)), Fixed(random_logits(9, 2)), windows, 1, CPU)
    assert found["domains"]["code"]["bits_per_byte_ci95_low"] is not None
    empty = found["domains"]["prose"]
    assert {key: empty[key] for key in ("tokens", "windows", "bytes")} == {"tokens": 0, "windows": 0, "bytes": 0}
    assert {empty[key] for key in FIELDS - {"tokens", "windows", "bytes"}} == {None}
    model = Fixed(random_logits(9, 1))
    one, _ = quality(model, model, windows._replace(domain_W=torch.tensor([0, 1])), 1, CPU)
    for domain in one["domains"].values():
        assert domain["bits_per_byte"] > 0 and domain["kl_to_native"] == 0
        assert {value for key, value in domain.items() if "ci95" in key} == {None}


@pytest.mark.parametrize("broken", [pytest.param(x, id=str(x)) for x in (math.nan, math.inf)])
@pytest.mark.parametrize("whose", [pytest.param(name, id=name) for name in ("run", "native")])
def test_logits_that_are_not_finite_leave_numbers_unknown(broken: float, whose: str) -> None:
    """Those that depend on them and no others: the other domain's stand, and of the other model what is its own."""
    windows = some_windows(8, 5, 10)
    ids_WS = windows.ids_WS % 5 + 5 * windows.domain_W.unsqueeze(1)  # a domain has tokens of its own
    windows = windows._replace(ids_WS=ids_WS)
    bad, good = random_logits(10, 1), random_logits(10, 2)
    bad[7:, 3] = broken
    model, native = (Fixed(bad), Fixed(good)) if whose == "run" else (Fixed(good), Fixed(bad))
    found, _ = quality(model, native, windows, 4, CPU)
    json.dumps(found, allow_nan=False)
    own = {"bits_per_byte", "nats_per_token"} if whose == "run" else {"native_bits_per_byte"}
    unknown = own | {"delta_bits_per_byte", "kl_to_native", "top1_agreement"}
    for numbers in (found, found["domains"]["prose"]):
        assert {key for key, value in without_intervals(numbers).items() if value is None} == unknown
        assert {numbers.get(f"{key}_ci95_{end}") for key in unknown for end in ("low", "high")} == {None}
    assert None not in found["domains"]["code"].values()


def test_a_target_that_is_ruled_out_is_infinitely_unlikely() -> None:
    """A logit of -inf: no number for its bits, yet the first choices are known."""
    logits = random_logits(9, 1)
    logits[:, 4] = -torch.inf
    found, _ = quality(Fixed(logits), Fixed(random_logits(9, 2)), some_windows(8, 9, 9), 4, CPU)
    assert found["bits_per_byte"] is None and found["delta_bits_per_byte"] is None and found["kl_to_native"] is None
    assert found["native_bits_per_byte"] is not None and 0 <= found["top1_agreement"] < 1


# Intervals


def interval(found: dict[str, Any], name: str) -> tuple[float, float]:
    return found[f"{name}_ci95_low"], found[f"{name}_ci95_high"]


def test_the_interval_is_about_that_of_a_jackknife() -> None:
    """Leaving out one window at a time; with Student's t of 59 degrees of freedom, as scipy has it."""
    W, V = 60, 23
    windows = some_windows(W, 7, V)
    model, native = two_models(V)
    found, _ = quality(model, native, windows, 5, CPU)
    left_out = [by_formula(model, native, windows, [w for w in range(W) if w != out]) for out in range(W)]
    for name in NUMBERS:
        values = np.array([numbers[name] for numbers in left_out])
        half = stats.t.ppf(0.975, W - 1) * math.sqrt((W - 1) / W * np.square(values - values.mean()).sum())
        low, high = interval(found, name)
        assert (low + high) / 2 == pytest.approx(found[name], rel=1e-6)
        assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_of_windows_of_equal_weight_it_is_students_interval_of_the_mean() -> None:
    """Three windows with as many tokens: nats per token by window, and scipy's interval of their mean."""
    model, native = two_models(23)
    windows = some_windows(3, 7, 23)
    found, _ = quality(model, native, windows, 1, CPU)
    for name in ("nats_per_token", "kl_to_native"):
        values = [by_formula(model, native, windows, [w])[name] for w in range(3)]
        expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert interval(found, name) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """Of 400 texts drawn from one distribution 95 %; 91 to 98 % may be the luck of the draw."""
    V, W, S = 11, 24, 6
    model, native = two_models(V, scale=0.7)
    lengths_V = torch.arange(V) % 3 + 1
    every = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # a token and its target, all pairs as likely
    whole = Windows(every[:, :1], every[:, 1:], torch.zeros(V * V).long(), lengths_V[every[:, 1]], NAMES[:1], ())
    truth = by_formula(model, native, whole, list(range(V * V)))
    hits = dict.fromkeys(NUMBERS, 0)
    for seed in range(400):
        windows = some_windows(W, S, V, seed=seed, n_domains=1)
        windows = windows._replace(bytes_W=lengths_V[windows.targets_WS].sum(-1))
        found, _ = quality(model, native, windows, W, CPU)
        for name in NUMBERS:
            low, high = interval(found, name)
            hits[name] += low <= truth[name] <= high
    assert all(0.91 <= hits[name] / 400 <= 0.98 for name in NUMBERS), hits


def test_an_agreement_lies_between_0_and_1() -> None:
    """One token in many that differs: the interval is cut off at 1."""
    logits = 20 * torch.eye(12)
    other = logits.clone()
    other[0] = logits[1]
    windows = some_windows(10, 4, 12)
    found, _ = quality(Fixed(logits), Fixed(other), windows, 2, CPU)
    assert 0.8 < found["top1_agreement"] < 1
    assert found["top1_agreement_ci95_high"] <= 1
    found, _ = quality(Fixed(logits), Fixed(logits.roll(1, 0)), windows, 2, CPU)
    assert [found["top1_agreement"], *interval(found, "top1_agreement")] == [0, 0, 0]


# The models of moe-lab


@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16")])
def test_another_router_in_a_real_decoder(dtype: str) -> None:
    """The same parameters under Sinkhorn and under top-k: other predictions; under top-k twice: the same ones."""
    sizes = ["model.vocab_size=256", "batch=3", "seq_len=16", f"dtype={dtype}"]
    native = moe_lab.build_model(tiny.decoder_moe("router=torch", *sizes))
    model = moe_lab.build_model(tiny.decoder_moe("router=sinkhorn", *sizes), CPU, shareable(native))
    windows = some_windows(9, 16, 256)
    found, _ = quality(model, native, windows, 3, CPU)
    assert found["kl_to_native_ci95_low"] > 0 and found["top1_agreement"] < 1
    y = torch.cat([native(ids_BS).y for ids_BS in windows.ids_WS.split(3)]).double()
    nats = nn.functional.cross_entropy(y.flatten(0, 1), windows.targets_WS.flatten(), reduction="sum")
    bits = float(nats) / math.log(2) / int(windows.bytes_W.sum())
    assert found["native_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    same, _ = quality(native, native, windows, 3, CPU)
    assert same["kl_to_native"] == 0 and same["top1_agreement"] == 1 and same["bits_per_byte"] == pytest.approx(bits)


def bits_per_byte_of_transformers(run: Windows) -> dict[str, float]:
    """Of the checkpoint in assets/ on the same windows, text by text."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(quick.TINY_OLMOE, dtype=torch.float32).eval()
    bits = {}
    for domain, name in enumerate(run.names):
        mine = run.domain_W == domain
        with torch.inference_mode():
            y_TV = torch.cat([peer(ids_BS).logits.flatten(0, 1) for ids_BS in run.ids_WS[mine].split(8)])
        nats = nn.functional.cross_entropy(y_TV, run.targets_WS[mine].flatten(), reduction="sum")
        bits[name] = float(nats) / math.log(2) / int(run.bytes_W[mine].sum())
    return bits


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [
        pytest.param("fp32", 4096, id="fp32"),
        pytest.param("bf16", 4096, id="bf16"),
        pytest.param("fp32", None, id="whole_texts", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_run_gives_the_bits_per_byte_of_transformers(dtype: str, tokens: int | None, tmp_path: Path) -> None:
    """Of every text, for the same windows: within 1 % in bf16, and in fp32 to the rounding."""
    more = (
        f"measure.quality_tokens={'null' if tokens is None else tokens}",
        f"dtype={dtype}",
        "batch=1",
        "seq_len=256",
    )
    record = moe_lab.run(quick.compose("checkpoint", *more), tmp_path)
    assert record.quality is not None
    texts = read_domains(str(quick.TEXTS), 256, None)
    want = bits_per_byte_of_transformers(windows(texts, 256, None if tokens is None else tokens // 256, seed=0))
    assert set(want) == {"jargon", "pydoc", "python", "roff"} == set(record.quality["domains"])
    got = {name: domain["bits_per_byte"] for name, domain in record.quality["domains"].items()}
    assert got == pytest.approx(want, rel=1e-5 if dtype == "fp32" else 1e-2)


def test_without_a_native_router_nothing_compares_with_it() -> None:
    """None, not 0: the model's own numbers are there."""
    found, _ = quality(Fixed(random_logits(9, 1)), None, some_windows(4, 5, 9), 2, CPU)
    assert found["bits_per_byte"] > 0 and found["bits_per_byte_ci95_low"] is not None
    for name in ("native_bits_per_byte", "delta_bits_per_byte", "kl_to_native", "top1_agreement"):
        assert found[name] is None


@pytest.mark.parametrize(
    ("counts_GE", "information"),
    [
        pytest.param([[3, 1], [6, 2]], 0.0, id="alike"),
        pytest.param([[5, 0, 2], [0, 4, 0]], 1.0, id="apart"),
        pytest.param([[4, 4, 0], [0, 4, 4]], 0.5, id="half"),
        pytest.param([[4, 4]], 0.0, id="one_domain"),
        pytest.param([[0, 0], [0, 0]], 0.0, id="nothing"),
    ],
)
def test_what_an_expert_tells_of_the_domain(counts_GE: list[list[int]], information: float) -> None:
    """0 where the domains load the experts alike, 1 where they share none."""
    assert domain_information(np.array([counts_GE])) == [pytest.approx(information, abs=1e-12)]


def test_slots_are_counted_by_domain() -> None:
    """Each row's slots go to the row's domain; all of them are there."""
    model = moe_lab.build_model(tiny.decoder_moe("model.vocab_size=9"))
    windows = some_windows(6, 5, 9)
    _, counts_LGE = quality(model, None, windows, 2, CPU)
    for domain in range(2):
        rows_WS = windows.ids_WS[windows.domain_W == domain]
        for counts_GE, routing in zip(counts_LGE, model(rows_WS).routings, strict=True):
            E = counts_GE.shape[1]
            assert counts_GE[domain].tolist() == routing.expert_ids_TK.flatten().bincount(minlength=E).tolist()
