"""What the nested parts of a record hold: for each field its name, type, unit and meaning, said here and nowhere else.

The tables of a sweep's folder, their types and docs/results-format.md are made from this file and from `schema`, and
`measure` takes the names of its metrics from here. A new metric is its formula in `measure` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_lab import marks


class Field(NamedTuple):
    """A value of a record; parts of the name are joined by dots."""

    name: str
    """One that ends in `*` is the place of fields that only some records have."""
    kind: Any
    """`str`, `int`, `float`, `bool`, a list of one of these; None at a place: whatever is there."""
    unit: str
    meaning: str
    worse: Callable[[Sequence[float]], float] | None = None
    """Of a metric with a value for each layer: which of these is the worst, `max` or `min`."""


Fields = tuple[Field, ...]


def names(fields: Iterable[Field]) -> tuple[str, ...]:
    """The fields' names, without places."""
    return tuple(field.name for field in fields if not field.name.endswith("*"))


def under(prefix: str, fields: Iterable[Field], meaning: str = "{meaning}") -> Fields:
    """The fields as parts of another; `meaning` may change what is said of them."""
    return tuple(
        field._replace(name=f"{prefix}.{field.name}", meaning=meaning.format_map(field._asdict())) for field in fields
    )


def worse(fields: Iterable[Field]) -> Mapping[str, Callable[[Sequence[float]], float]]:
    """By name, which of several layers' values is the worst."""
    return {field.name: field.worse for field in fields if field.worse is not None}


def _with_interval(name: str, unit: str, meaning: str) -> Fields:
    """A mean over windows of text and the two ends of its interval."""
    low = "lower end of its 95 % interval, with windows as the independent units"
    return (
        Field(name, float, unit, meaning),
        Field(f"{name}_ci95_low", float, unit, low),
        Field(f"{name}_ci95_high", float, unit, "upper end"),
    )


IMPLEMENTATION = (
    Field("router", str, "", "who computed the routing"),
    Field("gate", str, "", "the router's own kernels, where they multiply by its gate too"),
    Field("experts", str, "", "who computed the experts"),
    Field("add_rms_norm", str, "", "who computed the norms"),
    Field("segment_mm", str, "", "who computed the matrix products of `experts=grouped`"),
    Field("*", None, "", "another operation's, by its name"),
)

THROUGHPUT = (
    Field("tokens_per_s", float, "tokens/s", "tokens of an iteration over the median latency"),
    Field("time_per_token_us", float, "us", "the inverse"),
    Field("time_per_output_token_ms", float, "ms", "of decoding: one step, which gives every sequence a token"),
)

PHASES = (
    Field("execution", str, "", "how the phases were run (they are measured apart)"),
    *(
        Field(name, float, "ms", "median per iteration, all layers; missing where a kernel spans several phases")
        for name in marks.NAMES
    ),
    Field(
        "*",
        None,
        "ms",
        "a kernel that spans phases, under their joined name (`phases_ms.dispatch+experts+combine`)",
    ),
    Field("other", float, "ms", "what is in no phase"),
    Field("sum_ms", float, "ms", "all phases together"),
    Field("launch_gap_ms", float, "ms", "what the eager pass takes longer than the CUDA graph"),
)

MEMORY = (
    Field("peak_mb", float, "MB", "peak of one iteration (CUDA: allocator; CPU: resident memory of the process)"),
    Field("parameters_mb", float, "MB", "of the model"),
)

DEGREES = (2, 4, 8, 16, 32, 64)
"""Ranks that the experts are spread over."""

PLACEMENTS = {
    "contiguous": "where neighbouring experts lie together",
    "round_robin": "where expert e lies on rank e mod R",
    "eplb": "where each rank has one replica more, placed by this very load (DeepSeek's EPLB)",
}
"""Where the experts lie; the functions are in measure/placement.py."""

RANK_LOADS = tuple(
    Field(
        f"rank_load_{placement}_{degree}",
        float,
        "1",
        f"slots of the fullest of {degree} expert-parallel ranks over the mean, {meaning}; missing with fewer experts",
        max,
    )
    for placement, meaning in PLACEMENTS.items()
    for degree in DEGREES
)

METRICS = (
    Field("load_max_over_mean", float, "1", "slots of the fullest expert over the mean of all; 1 is balanced", max),
    Field("load_min_over_mean", float, "1", "slots of the emptiest expert over the mean", min),
    Field("load_cv", float, "1", "standard deviation of the slots per expert over their mean", max),
    Field("load_gini", float, "1", "Gini coefficient of the slots per expert; 0 is balanced", max),
    Field("load_entropy", float, "1", "entropy of the experts' shares over ln E; 1 is balanced", min),
    Field("effective_experts", float, "experts", "exp of that entropy", min),
    Field("dead_experts", float, "experts", "that got no slot; of decoding the mean over steps", max),
    Field("unique_experts", float, "experts", "that got a slot; of decoding the mean over steps", min),
    Field("aux_loss", float, "1", "E times the sum of share times mean probability; 1 is balanced", max),
    Field("z_loss", float, "1", "mean square of the logits' logsumexp", max),
    Field("token_entropy", float, "nat", "mean entropy of a token's probabilities", max),
    Field("mutual_information", float, "nat", "entropy of the mean probabilities less `token_entropy`", min),
    Field("top1_prob", float, "1", "mean probability of a token's first expert", min),
    Field("top1_margin", float, "1", "mean lead of the first expert over the second", min),
    Field("boundary_margin", float, "1", "mean lead of the last expert that can be chosen over the next", min),
    Field("topk_mass", float, "1", "mean probability of the experts chosen", min),
    Field("dropped_fraction", float, "1", "unused slots over all slots", max),
    Field("dropped_tokens_fraction", float, "1", "tokens without an expert over all tokens", max),
    Field(
        "tile_waste_64", float, "1", "padding of a grouped matrix product in tiles of 64 rows, over the used slots", max
    ),
    Field("tile_waste_128", float, "1", "the same in tiles of 128 rows", max),
    Field("uniform_unique_experts", float, "experts", "that uniform routing would be expected to use", max),
    Field(
        "expert_mb",
        float,
        "MB",
        "weights of the experts in use: what one pass reads of them; all layers together",
        max,
    ),
    Field(
        "shared_with_previous",
        float,
        "1",
        "experts of a token that the one before in its sequence used too, over all; uniform routing: k / E",
        min,
    ),
    Field(
        "first_choice_repeats",
        float,
        "1",
        "tokens with the same expert of largest weight as the one before in their sequence, over all",
        min,
    ),
    *RANK_LOADS,
)
"""Of a layer's routing; the formulas are in measure/routing_metrics.py."""

ROUTING = (
    *under("pooled", METRICS),
    *under("worst", METRICS, "`{name}` of the worst layer"),
    Field("steps", int, "steps", "of decoding: over how many of them the routing's metrics are a mean"),
)

PROPERTIES = (
    Field("causal", bool, "", "whether later tokens change no earlier route, as the router declares"),
    Field(
        "batch_invariant",
        bool,
        "",
        "whether a token's route does not depend on the tokens beside it, as the router declares",
    ),
    Field("static_k", bool, "", "whether every token fills all slots, as the router declares"),
    Field("graph_safe", bool, "", "whether nothing is read on the host, as the router declares"),
    Field("needs_token_ids", bool, "", "whether it reads the tokens' ids, as the router declares"),
    Field("scales_input", bool, "", "whether the weight multiplies the expert's input, as the router declares"),
    Field("calibrates", bool, "", "whether it was fitted to a workload before, as the router declares"),
)
"""What a router declares, as attributes of routers/base.py."""

DIFFERENCES = (
    Field("jaccard", float, "1", "a token's experts in both choices over those in either, mean over tokens", min),
    Field("same_experts", float, "1", "tokens with the same experts, over all", min),
    Field("same_first_choice", float, "1", "tokens with the same expert of largest weight, over all", min),
    Field("combine_l1", float, "1", "sum of the absolute differences of a token's weights, mean over tokens", max),
    Field("rel_error", float, "1", "relative error of an MoE layer's output, on the same input", max),
)
"""Between two routings of a layer; the formulas are in measure/agreement.py."""

_AGREEMENT = (
    Field(
        "output_rel_error",
        float,
        "1",
        "relative error of the model's output against the one with the reference router",
    ),
    *under("pooled", DIFFERENCES, "{meaning}; all layers"),
    *under("worst", DIFFERENCES, "`{name}` of the worst layer"),
)

AGREEMENT = (
    Field("reference", str, "", "the router of `measure.reference_router`"),
    Field("seconds", float, "s", "what comparing with it took; in no latency"),
    *_AGREEMENT,
    Field(
        "floor.output_rel_error",
        float,
        "1",
        "the same between the reference router and itself with logits in float64: what rounding alone changes",
    ),
    *under("floor", _AGREEMENT[1:], "`agreement.{name}` of those two"),
)

PREDICTIONS = (
    *_with_interval(
        "bits_per_byte",
        "bit/B",
        "-log2 of the probabilities that the run gives to the tokens that follow, over the bytes of text in them",
    ),
    *_with_interval("nats_per_token", "nat", "-ln of these probabilities, mean over tokens"),
    Field(
        "native_bits_per_byte",
        float,
        "bit/B",
        "`bits_per_byte` with the checkpoint's own router; missing where the model is no checkpoint",
    ),
    *_with_interval("delta_bits_per_byte", "bit/B", "`bits_per_byte` less `native_bits_per_byte`"),
    *_with_interval(
        "kl_to_native",
        "nat",
        "Kullback-Leibler divergence of the run's predictions from those with the checkpoint's own router, mean over "
        "tokens",
    ),
    *_with_interval("top1_agreement", "1", "tokens for which both think the same next token likeliest, over all"),
)
"""Of a text's tokens; the formulas are in measure/quality.py."""

QUALITY = (
    Field("tokens", int, "tokens", "of `workload=text` that were predicted"),
    Field("windows", int, "windows", "of `seq_len` tokens that they are in"),
    Field("windows_left_out", int, "windows", "that filled no batch"),
    Field("bytes", int, "B", "of text in the tokens predicted"),
    *PREDICTIONS,
    Field(
        "*",
        None,
        "",
        "the same of each text (`quality.domains.<its name>.bits_per_byte`); `quality.domain_information`: of each MoE "
        "layer, how much the expert of a slot tells of the text it comes from, 0 to 1",
    ),
)

ROOFLINE = (
    Field("flops", int, "FLOP", "in matrix products of one iteration"),
    Field("bytes", int, "B", "that any implementation moves"),
    Field("floor_ms", float, "ms", "the least time at the measured rates"),
    Field("fraction_of_floor", float, "1", "the floor over the median latency; above 1 the data came from a cache"),
    Field("bytes_per_s", float, "B/s", "measured: a large copy"),
    Field("flops_per_s", float, "FLOP/s", "measured: a square matrix product"),
    Field("peak_source", str, "", "how the rates were measured"),
)

EXPORT = (Field("*", None, "", "what an export noted"),)

ENVIRONMENT = (
    Field("device", str, "", "`cpu` or `cuda`"),
    Field("device_name", str, "", "of the GPU, or of the CPU"),
    Field("compute_capability", str, "", "of the GPU"),
    Field("device_memory_mb", float, "MB", "of the GPU"),
    Field("cpu", str, "", "name of the processor"),
    Field("cpus", int, "CPUs", "that the process may use"),
    Field("threads", int, "threads", "of torch"),
    Field("router_auto", str, "", "what `router.impl=auto` prefers on this GPU; missing on a CPU"),
    Field("cpu_capability", str, "", "vector instructions that torch uses"),
    Field("host_memory_mb", float, "MB", "of the host"),
    Field("system", str, "", "operating system and release"),
    Field("driver", str, "", "version of the NVIDIA driver"),
    Field("cuda", str, "", "version of CUDA that torch was built for"),
    Field("torch", str, "", "version"),
    Field("triton", str, "", "version"),
    Field("python", str, "", "version"),
    Field("hydra", str, "", "version"),
    Field("numpy", str, "", "version"),
    Field("moe_lab", str, "", "version"),
    Field("git_sha", str, "", "commit of the checkout"),
    Field("git_dirty", bool, "", "whether tracked files differed from it"),
    Field("*", None, "", "anything else that the environment holds"),
)
