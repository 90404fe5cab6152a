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
    Field("router", str, "", "implementation of the routing"),
    Field(
        "gate",
        str,
        "",
        "kernels of the router, if they include the gate's matrix product; `torch+` before them if torch computes that "
        "of longer chunks",
    ),
    Field("mlp_norm", str, "", "kernels of the router, if they include the norm before the MLP"),
    Field("experts", str, "", "implementation of the experts"),
    Field(
        "attention",
        str,
        "",
        "implementation of attention; of several tokens torch's backends (`model.attention`), as "
        "`torch:cudnn+efficient`",
    ),
    Field(
        "add_rms_norm",
        str,
        "",
        "implementation of the norms, but for `mlp_norm` and those that `linear` does",
    ),
    Field(
        "linear",
        str,
        "",
        "kernels of projections of a few rows and norms ahead of them, as `gemv`; `torch+gemv` if torch computes the "
        "other projections; missing if torch computes all",
    ),
    Field("segment_mm", str, "", "implementation of the matrix products of `experts=grouped`"),
    Field("tiles", str, "", "of `experts=fused`: up_rows-up_tokens-down_rows-down_tokens-pieces"),
    Field("weights", str, "", "how a checkpoint's files are quantised; the run computes with dequantised weights"),
    Field("dispatch", str, "", "who sorts the slots by expert, if the extension does"),
    Field("combine", str, "", "who sums a token's slots, if the extension does"),
    Field("*", None, "", "implementation of another operation, under its name"),
)

THROUGHPUT = (
    Field("tokens_per_s", float, "tokens/s", "tokens of an iteration divided by the median latency"),
    Field("time_per_token_us", float, "us", "inverse of `tokens_per_s`"),
    Field("time_per_output_token_ms", float, "ms", "decoding only: a step over the tokens it adds to each sequence"),
)

PHASES = (
    Field(
        "execution",
        str,
        "",
        "execution mode of the pass that measures the phases: `cuda_graph` if they are those of a replay's kernels",
    ),
    *(
        Field(
            name,
            float,
            "ms",
            "median per iteration, all layers; missing if a kernel spans several phases, and if `sum_ms` is more than "
            "20 % from the median latency (see `phases_share`)",
        )
        for name in marks.NAMES
    ),
    Field(
        "*",
        None,
        "ms",
        "a kernel that spans several phases, under their joined names (`phases_ms.dispatch+experts+combine`)",
    ),
    Field("other", float, "ms", "time outside of the phases"),
    Field("sum_ms", float, "ms", "sum of all phases: median time of the pass that measures them"),
    Field("launch_gap_ms", float, "ms", "time of the eager pass minus the time of the CUDA graph"),
    Field(
        "matched",
        float,
        "1",
        "with `execution=cuda_graph`: share of the replay's time in kernels that an eager pass has in the same order; "
        "missing if the phases are those of an eager pass",
    ),
)

PHASE_SHARES = (
    *(
        Field(name, float, "1", "share of `phases_ms.sum_ms`, also where that is not the latency")
        for name in marks.NAMES
    ),
    Field("*", None, "1", "a kernel that spans several phases, under their joined names"),
    Field("other", float, "1", "share of the time outside of the phases"),
)

MEMORY = (
    Field("peak_mb", float, "MB", "peak of one iteration (CUDA: allocator; CPU: resident memory of the process)"),
    Field("parameters_mb", float, "MB", "size of the model's parameters"),
    Field("cache_bytes_per_token", float, "B", "prefill and decoding only: what a token keeps in the KV cache"),
    Field(
        "state_bytes_per_sequence",
        float,
        "B",
        "prefill and decoding only: the states of convolutions and recurrences, which do not grow with the tokens",
    ),
)

DEGREES = (2, 4, 8, 16, 32, 64)
"""Ranks that the experts are spread over."""

PLACEMENTS = {
    "contiguous": "with neighbouring experts on one rank",
    "round_robin": "with expert e on rank e mod R",
    "eplb": "with one more replica on each rank, placed for this load (DeepSeek's EPLB)",
}
"""Where the experts lie; the functions are in measure/placement.py."""

RANK_LOADS = tuple(
    Field(
        f"rank_load_{placement}_{degree}",
        float,
        "1",
        f"slots of the busiest of {degree} expert-parallel ranks over the mean, {meaning}; missing with fewer experts",
        max,
    )
    for placement, meaning in PLACEMENTS.items()
    for degree in DEGREES
)

METRICS = (
    Field("load_max_over_mean", float, "1", "slots of the busiest expert over the mean; 1 is balanced", max),
    Field("load_min_over_mean", float, "1", "slots of the least used expert over the mean", min),
    Field("load_cv", float, "1", "standard deviation of the slots per expert over their mean", max),
    Field("load_gini", float, "1", "Gini coefficient of the slots per expert; 0 is balanced", max),
    Field("load_entropy", float, "1", "entropy of the experts' shares over ln E; 1 is balanced", min),
    Field("effective_experts", float, "experts", "exponential of the entropy of the experts' shares", min),
    Field("dead_experts", float, "experts", "experts without a slot; decoding: mean over the steps", max),
    Field("unique_experts", float, "experts", "experts with a slot; decoding: mean over the steps", min),
    Field("aux_loss", float, "1", "E times the sum over experts of share x mean probability; 1 is balanced", max),
    Field("z_loss", float, "1", "mean square of the logits' logsumexp", max),
    Field("token_entropy", float, "nat", "mean entropy of a token's probabilities", max),
    Field("mutual_information", float, "nat", "entropy of the mean probabilities minus `token_entropy`", min),
    Field("top1_prob", float, "1", "mean probability of a token's first expert", min),
    Field("top1_margin", float, "1", "mean difference of the two largest probabilities", min),
    Field("boundary_margin", float, "1", "mean difference of the k-th and the next probability", min),
    Field("topk_mass", float, "1", "total probability of a token's experts, mean over tokens", min),
    Field(
        "unused_slots_fraction",
        float,
        "1",
        "share of the slots that are unused: dropped by a capacity, or left empty by a router with a variable number "
        "of experts per token",
        max,
    ),
    Field("dropped_tokens_fraction", float, "1", "share of the tokens without an expert", max),
    Field(
        "tile_waste_64",
        float,
        "1",
        "padding of a grouped matrix product with tiles of 64 rows over the used slots",
        max,
    ),
    Field("tile_waste_128", float, "1", "the same with tiles of 128 rows", max),
    Field("uniform_unique_experts", float, "experts", "experts expected in use with uniform routing", max),
    Field(
        "expert_mb",
        float,
        "MB",
        "weights of the experts in use, which one pass reads; sum of all layers",
        max,
    ),
    Field(
        "shared_with_previous",
        float,
        "1",
        "share of a token's experts that the previous token in its sequence also uses; uniform routing: k / E",
        min,
    ),
    Field(
        "first_choice_repeats",
        float,
        "1",
        "share of the tokens with the same expert of largest weight as the previous token in their sequence",
        min,
    ),
    *RANK_LOADS,
)
"""Of a layer's routing; the formulas are in measure/routing_metrics.py."""

ROUTING = (
    *under("pooled", METRICS),
    *under("worst", METRICS, "`{name}` of the worst layer"),
    Field("steps", int, "steps", "decoding only: number of steps that the routing metrics are averaged over"),
)

PROPERTIES = (
    Field(
        "causal",
        bool,
        "",
        "declared by the router: a token's route does not depend on later tokens; missing if not declared",
    ),
    Field(
        "batch_invariant",
        bool,
        "",
        "declared by the router: a token's route does not depend on the other tokens of the batch; missing if not "
        "declared",
    ),
    Field("static_k", bool, "", "declared by the router: every token uses all of its slots; missing if not declared"),
    Field(
        "graph_safe", bool, "", "declared by the router: it does not synchronise with the host; missing if not declared"
    ),
    Field("needs_token_ids", bool, "", "declared by the router: it uses the token ids"),
    Field("scales_input", bool, "", "declared by the router: the weight multiplies the expert's input"),
    Field("calibrates", bool, "", "declared by the router: it is fitted in a calibration pass"),
)
"""What a router declares, as attributes of routers/base.py."""

DIFFERENCES = (
    Field("jaccard", float, "1", "Jaccard index of a token's experts in the two routings, mean over tokens", min),
    Field("same_experts", float, "1", "share of the tokens with the same experts", min),
    Field("same_first_choice", float, "1", "share of the tokens with the same expert of largest weight", min),
    Field("combine_l1", float, "1", "sum of the absolute differences of a token's weights, mean over tokens", max),
    Field("rel_error", float, "1", "relative error of an MoE layer's output, on the same input", max),
)
"""Between two routings of a layer; the formulas are in measure/agreement.py."""

_AGREEMENT = (
    Field(
        "output_rel_error",
        float,
        "1",
        "relative error of the model's output compared with that of the reference router",
    ),
    *under("pooled", DIFFERENCES, "{meaning}; all layers"),
    *under("worst", DIFFERENCES, "`{name}` of the worst layer"),
)

AGREEMENT = (
    Field("reference", str, "", "the router of `measure.reference_router`"),
    Field("seconds", float, "s", "time of the comparison; not part of the latency"),
    *_AGREEMENT,
    Field(
        "floor.output_rel_error",
        float,
        "1",
        "the same for the reference router with its logits in float64: the effect of rounding alone",
    ),
    *under("floor", _AGREEMENT[1:], "`agreement.{name}` of the reference router with its logits in float64"),
)

PREDICTIONS = (
    *_with_interval(
        "bits_per_byte",
        "bit/B",
        "-log2 of the probability of each next token, sum over tokens divided by their bytes of text",
    ),
    *_with_interval("nats_per_token", "nat", "-ln of these probabilities, mean over tokens"),
    Field(
        "native_bits_per_byte",
        float,
        "bit/B",
        "`bits_per_byte` with the checkpoint's own router and unchanged weights; missing if the model is not a "
        "checkpoint",
    ),
    *_with_interval("delta_bits_per_byte", "bit/B", "`bits_per_byte` minus `native_bits_per_byte`"),
    *_with_interval(
        "kl_to_native",
        "nat",
        "Kullback-Leibler divergence of the run's predictions from those of the checkpoint as it is, mean over tokens",
    ),
    *_with_interval("top1_agreement", "1", "share of the tokens with the same most likely next token in both"),
)
"""Of a text's tokens; the formulas are in measure/quality.py."""

QUALITY = (
    Field("tokens", int, "tokens", "predicted tokens of `workload=text`"),
    Field("windows", int, "windows", "windows of `seq_len` tokens with these tokens"),
    Field("windows_left_out", int, "windows", "windows left out because they do not fill a batch"),
    Field("bytes", int, "B", "bytes of text in the predicted tokens"),
    *PREDICTIONS,
    Field(
        "*",
        None,
        "",
        "the same for each text (`quality.domains.<its name>.bits_per_byte`); `quality.domain_information`: for each "
        "MoE layer, how much information the expert of a slot gives about its text, 0 to 1",
    ),
)

ROOFLINE = (
    Field("flops", int, "FLOP", "of the matrix products of one iteration"),
    Field("bytes", int, "B", "minimum that every implementation moves"),
    Field("floor_ms", float, "ms", "lower bound of the time at the measured rates"),
    Field(
        "fraction_of_floor",
        float,
        "1",
        "lower bound over the median latency; above 1 if data came from a cache; of the rates measured here, it is "
        "what MoE-CAP (2412.07067) calls S-MBU where reading decides the bound, and S-MFU where computing does",
    ),
    Field("bytes_per_s", float, "B/s", "measured rate of a large copy"),
    Field("flops_per_s", float, "FLOP/s", "measured rate of a square matrix product"),
    Field("peak_source", str, "", "how the rates were measured"),
)

WEIGHT_CHANGES = (
    Field("experts_before", int, "experts", "of a layer, before any was removed or merged"),
    Field("experts", int, "experts", "of a layer, as the run has them"),
    Field("quantized_experts", int, "experts", "of a layer, with fake-quantised matrices"),
    Field(
        "stored_mb",
        float,
        "MB",
        "the parameters if fake-quantised matrices were stored in their format, scales included; computed: the run "
        "itself holds `memory.parameters_mb`",
    ),
    Field(
        "stored_expert_mb",
        float,
        "MB",
        "the same of the experts in use in one pass (`routing.pooled.expert_mb`); of a prefill in chunks each expert "
        "counts once here, and there once a chunk",
    ),
    Field("calibration_tokens", int, "tokens", "that experts were chosen by; missing if none were"),
    Field("calibration_texts", str, "", "names of their texts; `random` for random tokens"),
    Field("calibration_router", str, "", "router of the calibration"),
    Field("removed_slots", float, "1", "share of the calibration's slots that belonged to removed experts"),
    Field(
        "route_flips",
        float,
        "1",
        "share of (token, layer) with another set of experts than in the unchanged model, each model on its own hidden "
        "states; missing if experts were removed or merged",
    ),
    Field("gate_flips", float, "1", "the same with both gates on the run's hidden states"),
    Field(
        "*",
        None,
        "",
        "`weight_changes.route_by_margin` and `gate_by_margin`: the same by the margin of the unchanged router "
        "(probability of the k-th expert minus that of the next), with the number of sets (`route_sets`) and by layer "
        "(`route_by_layer`); `weight_changes.layers`: of which former experts each that is left consists, and which "
        "are quantised",
    ),
)
"""The formulas are in measure/route_flips.py and ops/fake_quantize.py."""

CONTENTION = (
    Field("load_average", float, "1", "load average of the last minute at the start, over the CPUs of the host"),
    Field("other_cpu", float, "1", "share of these CPUs that other processes used during the timing"),
    Field("steal", float, "1", "share of these CPUs that the hypervisor gave to others during the timing"),
    Field("other_runs", int, "runs", "other runs of moe-lab on the same device during the timing, at most at once"),
    Field("cpu_frequency", float, "1", "lowest clock of these CPUs seen between blocks, over their highest possible"),
    Field("throttled", str, "", "what slowed the CPUs or the GPU down during the timing; empty if nothing did"),
)
"""What else the machine did meanwhile; what the system does not tell is missing (measure/contention.py)."""

ENERGY = (
    Field("j_per_token", float, "J", "energy of an iteration divided by its tokens; idle power is not subtracted"),
    Field("j_per_iteration", float, "J", "energy of the timed blocks divided by their iterations"),
    Field("joules", float, "J", "energy of the timed blocks, with the moments between them"),
    Field("seconds", float, "s", "time of these blocks and moments"),
    Field("mean_power_w", float, "W", "`joules` over `seconds`"),
    Field("source", str, "", "the counter: `NVML total energy` of a GPU, `RAPL` of a CPU; missing if there is none"),
    Field("counts", str, "", "what it counts, other processes included"),
    Field("reason", str, "", "why energy was not measured"),
    Field("resolution_s", float, "s", "time between two changes of the counter, measured before the timing"),
    Field(
        "resolution_share",
        float,
        "1",
        "`resolution_s` over what was measured without a break: the whole, or a block where those of other cells lie "
        "between; up to so much of the energy may be that of what came before",
    ),
    Field("sm_mhz", float, "MHz", "clock of the multiprocessors, median over blocks"),
    Field("memory_mhz", float, "MHz", "clock of the memory, median over blocks"),
    Field("temperature_c", float, "deg C", "of the GPU, highest after a block"),
    Field("block_seconds", list[float], "s", "time of each block"),
    Field("block_joules", list[float], "J", "energy of each block; of a short one `resolution_s` makes it coarse"),
    Field("block_power_w", list[float], "W", "power after each block, as the GPU averages it"),
    Field("block_sm_mhz", list[float], "MHz", "clock of the multiprocessors after each block"),
    Field("block_memory_mhz", list[float], "MHz", "clock of the memory after each block"),
    Field("block_temperature_c", list[float], "deg C", "after each block"),
    Field("block_throttled", list[str], "", "what slowed the machine down during each block; empty if nothing did"),
)
"""With `measure.energy=true`; see measure/energy.py."""

PROFILE = (
    Field("execution", str, "", "execution mode of the steps that were profiled"),
    Field("steps", int, "steps", "profiled steps; what follows is of that in which the kernels took the median time"),
    Field("kernels_ms", float, "ms", "sum of all kernels and copies on a GPU, of all operations' own time on a CPU"),
    Field("launches", int, "launches", "kernels and copies, or operations, of a step"),
    Field("phases_from", str, "", "how the phase of a kernel is known"),
    *under("phases_ms", (Field("*", None, "ms", "sum of the phase's kernels; `other` outside of the phases"),)),
    *under(
        "implementations_ms",
        (Field("*", None, "ms", "sum of the kernels of an implementation, as `experts=fused`"),),
    ),
    Field("ncu", str, "", "a command that profiles one launch of the longest kernel with Nsight Compute"),
    Field("timeline", str, "", "file beside the record, for ui.perfetto.dev"),
    Field("timeline_left_out", int, "events", "events of the profile that the file has not, to bound its size"),
    Field("*", None, "", "`profile.top`: the ten longest kernels (name, calls, ms, share, phase, implementation)"),
)
"""With `measure.profile=true`; see measure/profile.py."""

EXPORT = (Field("*", None, "", "values recorded by an export"),)

ENVIRONMENT = (
    Field("device", str, "", "`cpu` or `cuda`"),
    Field("device_name", str, "", "name of the GPU, or of the CPU"),
    Field("compute_capability", str, "", "of the GPU"),
    Field("device_memory_mb", float, "MB", "of the GPU"),
    Field("cpu", str, "", "name of the processor"),
    Field("cpus", int, "CPUs", "CPUs that the process may use"),
    Field("cpu_set", str, "", "which CPUs these are, for example `0-3_8-8`; a slot of a sweep has its own"),
    Field("node", str, "", "name of the host"),
    Field(
        "job", str, "", "number of the Slurm job in which the run was; its log is `.slurm/JOB_0_log.out` of the sweep"
    ),
    Field("nice", int, "", "niceness of the process; above 0 others on its CPUs go before it"),
    Field("threads", int, "threads", "number of torch threads"),
    Field("router_auto", str, "", "implementation that `router.impl=auto` prefers on this GPU; missing on a CPU"),
    Field("experts_auto", str, "", "implementation that `experts=auto` prefers on this GPU; missing on a CPU"),
    Field("cpu_capability", str, "", "vector instructions used by torch"),
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
    Field("git_dirty", bool, "", "whether tracked files had uncommitted changes"),
    Field("*", None, "", "any other value of the environment"),
)
