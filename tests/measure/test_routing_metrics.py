"""measure/routing_metrics.py: each metric against numbers written out, its conventions and its properties."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.measure import placement
from moe_lab.measure.routing_metrics import WORSE, RoutingStats, mean_of, metrics, summarize
from moe_lab.ops.softmax_topk import top_k, weights_of
from moe_lab.routers.base import Routing

PROBABILITIES_TE = [
    [0.5, 0.25, 0.125, 0.125],
    [0.5, 0.25, 0.125, 0.125],
    [0.25, 0.5, 0.125, 0.125],
    [0.125, 0.125, 0.25, 0.5],
]
LOGSUMEXP_T = [0.0, 1.0, 0.0, -1.0]
IDS_TK = [[0, 1], [0, 1], [1, 0], [3, -1]]
# Counts 3, 3, 0, 1: seven used slots of eight, 1.75 a head. Mean probabilities 11/32, 9/32, 5/32, 7/32.
BY_HAND = {
    "load_max_over_mean": 3 / 1.75,
    "load_min_over_mean": 0.0,
    "load_cv": math.sqrt((2 * 1.25**2 + 1.75**2 + 0.75**2) / 4) / 1.75,
    "load_gini": 22 / (2 * 4 * 7),
    "load_entropy": (6 / 7 * math.log(7 / 3) + 1 / 7 * math.log(7)) / math.log(4),
    "effective_experts": (7 / 3) ** (6 / 7) * 7 ** (1 / 7),
    "dead_experts": 1,
    "unique_experts": 3,
    "aux_loss": 4 * (3 / 7 * 11 / 32 + 3 / 7 * 9 / 32 + 1 / 7 * 7 / 32),
    "z_loss": 0.5,
    "token_entropy": 1.75 * math.log(2),
    "mutual_information": sum(n / 32 * math.log(32 / n) for n in (11, 9, 5, 7)) - 1.75 * math.log(2),
    "top1_prob": 0.5,
    "top1_margin": 0.25,
    "boundary_margin": 0.125,
    "topk_mass": (3 * 0.75 + 0.5) / 4,
    "unused_slots_fraction": 1 / 8,
    "dropped_tokens_fraction": 0.0,
    "tile_waste_64": 3 * 64 / 7 - 1,
    "tile_waste_128": 3 * 128 / 7 - 1,
    # 7 slots of 4 tokens and 4 experts: a token misses an expert with probability 9/16.
    "uniform_unique_experts": 4 * (1 - (9 / 16) ** 4),
    "expert_mb": 3 * 1.5,
    # Sequences of 3 and 1 tokens: tokens 1 and 2 follow another, share all four slots, and one has its first choice.
    "shared_with_previous": 1.0,
    "first_choice_repeats": 0.5,
    # Ranks (0 1)(2 3) have 6 and 1 slots, (0 2)(1 3) 3 and 4. With three places each, experts 0 and 1 have two copies
    # of 1.5: 1.5 + 1.5 + 1 and 1.5 + 1.5 + 0. With two places on four ranks, three copies of 1: 1 + 1 thrice, and 1.
    "rank_load_contiguous_2": 6 / 3.5,
    "rank_load_contiguous_4": 3 / 1.75,
    "rank_load_round_robin_2": 4 / 3.5,
    "rank_load_round_robin_4": 3 / 1.75,
    "rank_load_eplb_2": 4 / 3.5,
    "rank_load_eplb_4": 2 / 1.75,
    **dict.fromkeys(
        (f"rank_load_{name}_{R}" for name in ("contiguous", "round_robin", "eplb") for R in (8, 16, 32, 64)),
        None,
    ),
}
ROUNDED = {
    "load_max_over_mean": 1.714286,
    "load_cv": 0.742307,
    "load_gini": 0.392857,
    "load_entropy": 0.724407,
    "effective_experts": 2.729838,
    "aux_loss": 1.196429,
    "token_entropy": 1.213008,
    "mutual_information": 0.133340,
    "topk_mass": 0.6875,
    "tile_waste_64": 26.428571,
    "tile_waste_128": 53.857143,
    "uniform_unique_experts": 3.599548,
}
LOAD = [name for name in WORSE if name.startswith(("load_", "tile_", "rank_"))] + ["effective_experts", "aux_loss"]
OF_NEIGHBOURS = ["shared_with_previous", "first_choice_repeats"]


def routing_to(ids: list[list[int]] | Tensor) -> Routing:
    ids_TK = torch.as_tensor(ids, dtype=torch.int32)
    return Routing(ids_TK, (ids_TK >= 0).float())


def by_hand() -> RoutingStats:
    logits_TE = torch.tensor(PROBABILITIES_TE).log() + torch.tensor(LOGSUMEXP_T)[:, None]
    ids_TK = torch.tensor(IDS_TK, dtype=torch.int32)
    routing = Routing(ids_TK, torch.where(ids_TK < 0, 0.0, torch.tensor([0.7, 0.3])))
    return RoutingStats.of(logits_TE, routing, seq_start_B1=torch.tensor([0, 3, 4]), bytes_per_expert=1_500_000)


def softmax_stats(logits_TE: Tensor, k: int) -> RoutingStats:
    ids_TK = top_k(logits_TE, k)
    return RoutingStats.of(logits_TE, Routing(ids_TK, weights_of(logits_TE, ids_TK, True)))


def stats_of_counts(counts: list[int]) -> RoutingStats:
    """Top-1 routing with these loads and equal logits."""
    ids_T1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    return RoutingStats.of(torch.zeros(len(ids_T1), len(counts)), routing_to(ids_T1))


def balanced(E: int = 4, K: int = 2, tokens_each: int = 64) -> RoutingStats:
    """Every expert gets the same number of slots, and the logits know no favourite."""
    T = E * tokens_each
    ids_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return RoutingStats.of(torch.zeros(T, E), routing_to(ids_TK))


def one_takes_all(E: int = 4, T: int = 10) -> RoutingStats:
    """Every token goes to expert 1, and the logits say so with certainty."""
    logits_TE = torch.zeros(T, E)
    logits_TE[:, 1] = 200.0
    return RoutingStats.of(logits_TE, routing_to(torch.ones(T, 1)))


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in WORSE])
def test_metric_of_a_small_table_is_the_number_computed_by_hand(name: str) -> None:
    """Four tokens, four experts, top-2, one slot dropped."""
    expected = BY_HAND[name]
    assert metrics(by_hand())[name] == (expected if expected is None else pytest.approx(expected, rel=1e-6, abs=1e-7))


@pytest.mark.parametrize(("name", "value"), [pytest.param(*item, id=item[0]) for item in ROUNDED.items()])
def test_numbers_of_the_table_are_what_their_formulas_give(name: str, value: float) -> None:
    """The table above holds formulas; these are the same as decimals, worked out apart."""
    assert BY_HAND[name] == pytest.approx(value, abs=1e-6)


def test_the_table_covers_every_metric() -> None:
    """A new metric needs a number here."""
    assert set(BY_HAND) == set(WORSE) == set(metrics(by_hand()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("load_max_over_mean", 1.0, id="max"),
        pytest.param("load_min_over_mean", 1.0, id="min"),
        pytest.param("load_cv", 0.0, id="cv"),
        pytest.param("load_gini", 0.0, id="gini"),
        pytest.param("load_entropy", 1.0, id="entropy"),
        pytest.param("effective_experts", 4.0, id="effective"),
        pytest.param("dead_experts", 0, id="dead"),
        pytest.param("unique_experts", 4, id="unique"),
        pytest.param("aux_loss", 1.0, id="aux_loss"),
        pytest.param("tile_waste_64", 0.0, id="tiles_of_64"),
        pytest.param("tile_waste_128", 0.0, id="tiles_of_128"),
        pytest.param("token_entropy", math.log(4), id="token_entropy"),
        pytest.param("mutual_information", 0.0, id="mutual_information"),
        pytest.param("top1_prob", 0.25, id="top1"),
        pytest.param("boundary_margin", 0.0, id="boundary"),
        pytest.param("unused_slots_fraction", 0.0, id="dropped"),
    ],
)
def test_balanced_load_has_the_value_of_the_convention(name: str, value: float) -> None:
    """Convention A of the aux loss: balanced is 1, whatever k (128 slots an expert)."""
    assert metrics(balanced())[name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("k", [pytest.param(k, id=f"k{k}") for k in (1, 2, 3, 4)])
def test_balanced_aux_loss_is_one_for_every_k(k: int) -> None:
    """Neither k nor E scales it."""
    assert metrics(balanced(K=k))["aux_loss"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("load_max_over_mean", 4.0, id="max"),
        pytest.param("load_min_over_mean", 0.0, id="min"),
        pytest.param("load_cv", math.sqrt(3), id="cv"),
        pytest.param("load_gini", 0.75, id="gini"),
        pytest.param("load_entropy", 0.0, id="entropy"),
        pytest.param("effective_experts", 1.0, id="effective"),
        pytest.param("dead_experts", 3, id="dead"),
        pytest.param("unique_experts", 1, id="unique"),
        pytest.param("aux_loss", 4.0, id="aux_loss"),
        pytest.param("token_entropy", 0.0, id="token_entropy"),
        pytest.param("mutual_information", 0.0, id="mutual_information"),
        pytest.param("top1_prob", 1.0, id="top1"),
        pytest.param("top1_margin", 1.0, id="margin"),
        pytest.param("z_loss", 200.0**2, id="z_loss"),
        pytest.param("tile_waste_64", 5.4, id="tiles_of_64"),
    ],
)
def test_one_expert_that_takes_all_is_the_other_end(name: str, value: float) -> None:
    """E = 4: max/mean E, Gini 1 - 1/E, CV sqrt(E - 1), aux loss E."""
    assert metrics(one_takes_all())[name] == pytest.approx(value, abs=1e-6)


def test_certain_tokens_spread_evenly_have_all_the_information() -> None:
    """Each token sure, all experts in use: mutual information ln E, token entropy 0."""
    result = metrics(softmax_stats(200 * torch.eye(4).repeat(3, 1), 1))
    assert result["mutual_information"] == pytest.approx(math.log(4), abs=1e-6)
    assert result["token_entropy"] == pytest.approx(0, abs=1e-6)


def test_dropped_slots_and_tokens_are_counted_apart() -> None:
    """Five of eight slots unused; two of four tokens have none left."""
    result = metrics(RoutingStats.of(torch.zeros(4, 3), routing_to([[0, -1], [-1, -1], [2, 1], [-1, -1]])))
    assert result["unused_slots_fraction"] == 5 / 8
    assert result["dropped_tokens_fraction"] == 2 / 4
    assert result["load_max_over_mean"] == 1.0
    assert result["topk_mass"] == pytest.approx((1 / 3 + 0 + 2 / 3 + 0) / 4)


def test_means_of_the_load_run_over_used_slots() -> None:
    """An unused slot is no load: columns of -1 change neither load nor aux loss."""
    logits_TE = torch.randn(17, 5, generator=torch.Generator().manual_seed(3))
    ids_TK = top_k(logits_TE, 2)
    wider_TK = torch.cat([ids_TK, torch.full((17, 3), -1, dtype=torch.int32)], 1)
    one, other = (metrics(RoutingStats.of(logits_TE, routing_to(ids))) for ids in (ids_TK, wider_TK))
    assert {name: one[name] for name in LOAD} == {name: other[name] for name in LOAD}
    assert other["unused_slots_fraction"] == 3 / 5


def test_nothing_but_dropped_slots_has_no_load() -> None:
    """Every load metric is null; the experts are all dead."""
    result = metrics(RoutingStats.of(torch.zeros(3, 4), routing_to(torch.full((3, 2), -1))))
    assert [name for name in LOAD if result[name] is not None] == []
    assert (result["dead_experts"], result["unique_experts"], result["unused_slots_fraction"]) == (4, 0, 1.0)


def test_no_tokens_have_no_metrics() -> None:
    """Unknown is null, never 0."""
    result = metrics(RoutingStats.of(torch.zeros(0, 4), routing_to(torch.zeros(0, 2))))
    assert result == dict.fromkeys(WORSE)


def test_all_experts_chosen_leave_no_boundary() -> None:
    """K = E: there is no (k+1)-th expert."""
    result = metrics(softmax_stats(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), 3))
    assert result["boundary_margin"] is None
    assert result["topk_mass"] == pytest.approx(1.0)
    assert result["load_max_over_mean"] == 1.0


def test_one_expert_alone_has_neither_entropy_nor_margin() -> None:
    """E = 1: ln E is 0, and there is no second, neither expert nor rank."""
    result = metrics(softmax_stats(torch.randn(6, 1, generator=torch.Generator().manual_seed(0)), 1))
    unknown = {name for name, value in result.items() if value is None and not name.startswith("rank_load_")}
    assert unknown == {"load_entropy", "top1_margin", "boundary_margin", "expert_mb"}
    assert all(value is None for name, value in result.items() if name.startswith("rank_load_"))
    assert (result["effective_experts"], result["aux_loss"], result["load_gini"]) == (1.0, 1.0, 0.0)


def test_masked_experts_leave_every_metric_finite() -> None:
    """A logit of -inf is an expert with probability 0."""
    logits_TE = torch.tensor([[0.0, 1.0, -math.inf], [2.0, -math.inf, 0.0]])
    result = metrics(softmax_stats(logits_TE, 1))
    assert all(value is None or math.isfinite(value) for value in result.values())


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any))
def test_gini_is_the_mean_difference_of_all_pairs(counts: list[int]) -> None:
    """sum_ij |c_i - c_j| / (2 E N) by two loops."""
    pairs = sum(abs(one - other) for one in counts for other in counts)
    assert metrics(stats_of_counts(counts))["load_gini"] == pytest.approx(
        pairs / (2 * len(counts) * sum(counts)), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=2, max_size=9).filter(any))
def test_load_metrics_stay_within_their_bounds(counts: list[int]) -> None:
    """The bounds that the balanced load and the one expert that takes all mark."""
    result, E = metrics(stats_of_counts(counts)), len(counts)
    eps = 1e-9
    assert 1 - eps <= result["load_max_over_mean"] <= E + eps
    assert -eps <= result["load_min_over_mean"] <= 1 + eps
    assert -eps <= result["load_cv"] <= math.sqrt(E - 1) + eps
    assert -eps <= result["load_gini"] <= 1 - 1 / E + eps
    assert -eps <= result["load_entropy"] <= 1 + eps
    assert 1 - eps <= result["effective_experts"] <= result["unique_experts"] + eps
    assert result["dead_experts"] + result["unique_experts"] == E
    assert 0 <= result["tile_waste_64"] <= result["tile_waste_128"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), T=st.integers(1, 20), E=st.integers(2, 9), data=st.data())
def test_names_of_experts_and_order_of_tokens_change_no_metric(seed: int, T: int, E: int, data: st.DataObject) -> None:
    """Relabelled experts and shuffled tokens are the same routing, but for who lies beside whom."""
    k = data.draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=generator)
    ids_TK = top_k(logits_TE, k)
    name_E, order_T = torch.randperm(E, generator=generator), torch.randperm(T, generator=generator)
    renamed_TE = torch.empty_like(logits_TE).index_copy_(1, name_E, logits_TE)[order_T]
    renamed = RoutingStats.of(renamed_TE, routing_to(name_E[ids_TK.long()][order_T]))
    one, other = metrics(RoutingStats.of(logits_TE, routing_to(ids_TK))), metrics(renamed)
    unknown = {name for name, value in one.items() if value is None}
    assert unknown == {name for name, value in other.items() if value is None}
    by_place = (*OF_NEIGHBOURS, *placement.NAMES)
    known = [name for name in one if name not in unknown and name not in by_place]
    assert [other[name] for name in known] == pytest.approx([one[name] for name in known], rel=1e-5, abs=1e-6)


def test_pooled_adds_counts_and_sums_of_the_layers() -> None:
    """All tokens of two layers are as one layer of them; only tiles and ranks are filled layer by layer."""
    generator = torch.Generator().manual_seed(5)
    tables = [torch.randn(70, 6, generator=generator), 3 * torch.randn(30, 6, generator=generator)]
    layers = [softmax_stats(logits_TE, 2) for logits_TE in tables]
    pooled = summarize(layers, [0, 1])["pooled"]
    together = metrics(softmax_stats(torch.cat(tables), 2))
    tiles = {name: together.pop(name) for name in ("tile_waste_64", "tile_waste_128")}
    for name in together:
        if not name.startswith("rank_load_") and name not in OF_NEIGHBOURS:
            expected = together[name]
            assert pooled[name] == (expected if expected is None else pytest.approx(expected, rel=1e-6)), name
    full = (
        sum(layer.counts_E[:3].sum().item() for layer in layers),
        sum(layer.counts_E.sum().item() for layer in layers),
    )
    assert full[0] > full[1] / 2  # the first rank is the fuller one in both layers
    assert pooled["rank_load_contiguous_2"] == pytest.approx(2 * full[0] / full[1])
    rows = sum(-(-count // 64) * 64 for layer in layers for count in layer.counts_E)
    assert pooled["tile_waste_64"] == pytest.approx(rows / 200 - 1)
    assert pooled["tile_waste_64"] > tiles["tile_waste_64"]


def test_adding_layers_leaves_them_as_they_were() -> None:
    """Pooling may not write into the first layer's counts."""
    one, other = by_hand(), by_hand()
    before = metrics(one)
    _ = one + other
    assert metrics(one) == before
    np.testing.assert_array_equal((one + other).counts_E, 2 * by_hand().counts_E)


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        pytest.param("load_max_over_mean", 1, id="max"),
        pytest.param("load_min_over_mean", 1, id="min"),
        pytest.param("load_cv", 1, id="cv"),
        pytest.param("load_gini", 1, id="gini"),
        pytest.param("load_entropy", 1, id="entropy"),
        pytest.param("effective_experts", 1, id="effective"),
        pytest.param("dead_experts", 1, id="dead"),
        pytest.param("unique_experts", 1, id="unique"),
        pytest.param("aux_loss", 1, id="aux_loss"),
        pytest.param("z_loss", 1, id="z_loss"),
        pytest.param("tile_waste_64", 1, id="tiles_of_64"),
        pytest.param("tile_waste_128", 1, id="tiles_of_128"),
        pytest.param("token_entropy", 0, id="token_entropy"),
        pytest.param("top1_prob", 0, id="top1"),
        pytest.param("top1_margin", 0, id="margin"),
        pytest.param("boundary_margin", 0, id="boundary"),
    ],
)
def test_worst_is_the_worse_of_two_layers_for_each_metric(name: str, worse: int) -> None:
    """Layer 0 balanced and undecided, layer 1 certain and collapsed: each is the worse one somewhere."""
    layers = [balanced(K=1), one_takes_all()]
    for order in (layers, layers[::-1]):
        assert summarize(order, [0, 1])["worst"][name] == metrics(layers[worse])[name]


def test_worst_leaves_out_layers_without_a_value() -> None:
    """A metric is null only where every layer's is."""
    empty = RoutingStats.of(torch.zeros(3, 4), routing_to(torch.full((3, 1), -1)))
    result = summarize([empty, one_takes_all()], [2, 5])
    assert result["worst"]["load_gini"] == pytest.approx(0.75)
    assert result["worst"]["unused_slots_fraction"] == 1.0
    assert summarize([empty], [2])["worst"]["load_gini"] is None


def test_layers_keep_their_indices_and_order() -> None:
    """The index is the model's: a decoder with dense layers starts later."""
    result = summarize([by_hand(), one_takes_all()], [3, 7])
    assert [layer["layer"] for layer in result["layers"]] == [3, 7]
    assert result["layers"][0] == {"layer": 3, **metrics(by_hand())}


def test_neighbours_of_one_sequence_only_are_compared() -> None:
    """The same ids cut into sequences otherwise: the first token of each follows nobody."""
    ids_TK = torch.tensor([[0, 1], [0, 2], [2, 0], [1, -1], [1, 3]], dtype=torch.int32)
    routing = Routing(ids_TK, torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [1.0, 0.0], [0.6, 0.4]]))

    def of(*starts: int) -> tuple[float | None, float | None]:
        found = metrics(RoutingStats.of(torch.zeros(5, 4), routing, seq_start_B1=torch.tensor(starts)))
        return found["shared_with_previous"], found["first_choice_repeats"]

    # Shared: 1 of 2, 2 of 2, 0 of 1, 1 of 2; first choices by weight: 0, 2, 2, 1, 1.
    assert of(0, 5) == (4 / 7, 2 / 4)
    assert of(0, 2, 5) == (2 / 5, 1 / 3)
    assert of(0, 1, 2, 3, 4, 5) == (None, None)
    whole = metrics(RoutingStats.of(torch.zeros(5, 4), routing))
    assert (whole["shared_with_previous"], whole["first_choice_repeats"]) == of(0, 5)


def test_uniform_routing_has_the_locality_and_the_experts_expected_of_it() -> None:
    """Random ids: neighbours share k / E of their experts, and E (1 - (1 - k/E)^T) are in use."""
    generator = torch.Generator().manual_seed(0)
    E, K = 40, 4
    ids_TK = torch.rand(4000, E, generator=generator).topk(K).indices
    found = metrics(RoutingStats.of(torch.zeros(4000, E), routing_to(ids_TK)))
    assert found["shared_with_previous"] == pytest.approx(K / E, abs=0.01)
    assert found["first_choice_repeats"] == pytest.approx(1 / E, abs=0.01)
    unique = [metrics(RoutingStats.of(torch.zeros(9, E), routing_to(ids_TK[9 * i : 9 * i + 9]))) for i in range(400)]
    assert np.mean([one["unique_experts"] for one in unique]) == pytest.approx(
        unique[0]["uniform_unique_experts"], 0.01
    )
    assert unique[0]["uniform_unique_experts"] == pytest.approx(E * (1 - (1 - K / E) ** 9))


def test_touched_bytes_are_those_of_experts_in_use_in_every_layer() -> None:
    """Pooled is what a pass reads of all layers, though the layers' experts have the same numbers."""
    layers = [
        RoutingStats.of(torch.zeros(2, 4), routing_to(ids), bytes_per_expert=10**6) for ids in ([[0], [0]], [[0], [3]])
    ]
    result = summarize(layers, [0, 1])
    assert [layer["expert_mb"] for layer in result["layers"]] == [1.0, 2.0]
    assert (result["pooled"]["expert_mb"], result["worst"]["expert_mb"]) == (3.0, 2.0)


def test_pairs_count_tokens_that_use_both() -> None:
    """Symmetric, the experts' own counts on the diagonal; a row of K experts adds K^2."""
    stats = by_hand()
    assert stats.pairs_EE.tolist() == [[3, 3, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert stats.counts_E.tolist() == [3, 3, 0, 1]


def test_the_mean_of_summaries_is_that_of_each_number() -> None:
    """Pooled, worst and by layer; a layer's index stays, and what one has no value for has none."""
    found = [summarize([by_hand(), one_takes_all()], [3, 7]), summarize([one_takes_all(), by_hand()], [3, 7])]
    found.append(summarize([RoutingStats.of(torch.zeros(3, 4), routing_to(torch.full((3, 1), -1)))] * 2, [3, 7]))
    mean, of_two = mean_of(found), mean_of(found[:2])
    assert [layer["layer"] for layer in mean["layers"]] == [3, 7]
    for name in WORSE:
        for part in (lambda one: one["pooled"], lambda one: one["worst"], lambda one: one["layers"][1]):
            values = [part(one)[name] for one in found]
            known = None not in values[:2]
            assert part(of_two)[name] == (pytest.approx(sum(values[:2]) / 2) if known else None)
            assert part(mean)[name] == (pytest.approx(sum(values) / 3) if known and values[2] is not None else None)
    assert mean["pooled"]["load_gini"] is None and of_two["pooled"]["load_gini"] is not None
    assert mean_of(found[:1]) == found[0]
    assert json.loads(json.dumps(of_two, allow_nan=False)) == of_two


def test_the_summary_is_json() -> None:
    """Plain numbers and null, nothing of numpy."""
    result = summarize([by_hand(), one_takes_all()], [0, 1])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in (torch.bfloat16, torch.float16)])
def test_metrics_of_narrow_logits_are_those_of_the_same_logits_in_fp32(dtype: torch.dtype) -> None:
    """Everything is computed in fp32 or wider."""
    logits_TE = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    routing = routing_to(top_k(logits_TE, 2))
    assert metrics(RoutingStats.of(logits_TE, routing)) == metrics(RoutingStats.of(logits_TE.float(), routing))


@pytest.mark.parametrize("k", [pytest.param(k, id=f"k{k}") for k in (1, 2, 5)])
def test_aux_loss_is_that_of_transformers_divided_by_k(k: int) -> None:
    """Transformers counts (token, expert) pairs per token (balanced = k, convention B); here they are shares (A)."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    generator = torch.Generator().manual_seed(k)
    tables = tuple(2 * torch.randn(23, 7, generator=generator) for _ in range(3))
    layers = [softmax_stats(logits_TE, k) for logits_TE in tables]
    theirs = float(mixtral.load_balancing_loss_func(tables, 7, k))
    assert summarize(layers, [0, 1, 2])["pooled"]["aux_loss"] == pytest.approx(theirs / k, rel=1e-5)
    for logits_TE, layer in zip(tables, layers, strict=True):
        alone = float(mixtral.load_balancing_loss_func((logits_TE,), 7, k))
        assert metrics(layer)["aux_loss"] == pytest.approx(alone / k, rel=1e-5)


def test_z_loss_is_that_of_transformers() -> None:
    """Of the Switch Transformer's code, over all tokens of a batch."""
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    logits_TE = 3 * torch.randn(40, 7, generator=torch.Generator().manual_seed(2))
    theirs = float(switch.router_z_loss_func(logits_TE.view(4, 10, 7)))
    assert metrics(softmax_stats(logits_TE, 1))["z_loss"] == pytest.approx(theirs, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=2, max_size=9).filter(any))
def test_the_largest_load_is_maxvio_and_one(counts: list[int]) -> None:
    """MaxVio of loss-free balancing (2408.15664): (max load - mean load) / mean load."""
    mean = sum(counts) / len(counts)
    assert metrics(stats_of_counts(counts))["load_max_over_mean"] == pytest.approx((max(counts) - mean) / mean + 1)


def test_co_activation_is_olmoes_over_all_pairs() -> None:
    """OLMoE (2409.02060, section 5.2): tokens that activate both experts over tokens that activate the one."""
    generator = torch.Generator().manual_seed(4)
    ids_TK = torch.rand(300, 6, generator=generator).topk(3).indices
    pairs_EE = RoutingStats.of(torch.zeros(300, 6), routing_to(ids_TK)).pairs_EE
    for one in range(6):
        for other in range(6):
            both = sum({one, other} <= set(ids) for ids in ids_TK.tolist())
            assert pairs_EE[one, other] == both
