"""verify.verify_decode: correct decoding passes step by step, and what is wrong in the cache or a step fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from moe_lab.errors import MismatchError
from moe_lab.measure.tolerances import TOLERANCES
from moe_lab.models import Output
from moe_lab.models.kv_cache import LayerCache, StateCache
from moe_lab.models.rope import Rope
from moe_lab.models.serving import Decode
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.runs.run import Run, _kept
from moe_lab.runs.verify import Verification
from moe_lab.runs.verify_decode import verify_decode
from tests import tiny
from tests.models.checkpoints import checkpoint
from tests.runs.test_verify import (
    DTYPES,
    ROUTERS,
    Tamper,
    another_expert,
    exchanged_tokens,
    fault_found,
    in_experts,
    in_router,
    layers_of,
    repeated_expert,
    scaled,
    swapped_ids,
    zeroed_weight,
)

CONTEXT, STEPS = 5, 4
BATCHES = [pytest.param(batch, id=f"batch{batch}") for batch in (1, 3)]
OFTEN_THREE = [pytest.param(1, id="batch1", marks=pytest.mark.slow), pytest.param(3, id="batch3")]


def config(*more: str, model: str = "decoder_moe", context: int = CONTEXT, steps: int = STEPS) -> DictConfig:
    decode = ("workload.phase=decode", f"workload.context_len={context}", f"seq_len={steps}")
    return tiny.compose(model, *decode, *more)


def steps_of(run: Run) -> list[Output]:
    return [_kept(output) for output in run.built.outputs()]


def verified(run: Run, steps: list[Output] | None = None, **options: bool) -> Verification:
    assert (
        isinstance(run.built.task, Decode)
        and isinstance(run.built.twin, TransformerDecoder)
        and run.built.context is not None
    )
    steps = steps_of(run) if steps is None else steps
    return verify_decode(
        run.built.task, run.built.twin, run.built.x, steps, run.built.context, run.built.dtype, **options
    )


def passed(run: Run) -> Verification:
    """The verification of a run that `Run.verify` finds right; it stands at its first step then."""
    run.verify()
    assert isinstance(run.built.task, Decode) and int(run.built.task.position_g[0]) == run.built.task.context_len
    assert run.verification is not None and run.verification.mismatch is None
    assert run.verification.check.passed is True
    return run.verification


# --- correct runs -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_run_passes(batch: int, router: str, dtype: str) -> None:
    """Every number is there and below its tolerance; a router that looks at the batch has no free reference."""
    run = tiny.built(config(f"router={router}", f"dtype={dtype}", f"batch={batch}"))
    check, tolerance = passed(run).check, TOLERANCES[run.built.dtype]
    assert check.rel_error is not None and check.rel_error <= tolerance.model * tiny.LAYERS**0.5
    assert check.expert_rel_error is not None and check.expert_rel_error <= tolerance.expert
    assert check.token_rel_error is not None and check.token_rel_error <= tolerance.token
    assert check.max_abs_error is not None and check.near_ties == 0
    assert (check.free_rel_error is None) == (check.changed_sets is None) == (router == "sinkhorn")
    assert check.reference == "fp32, torch, one expert at a time, over whole sequences; layers alone in 4 of 4 steps"
    assert run.peak_bytes is None or run.peak_bytes > 0


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("context", "steps", "looked_at"),
    [
        pytest.param(*sizes, id="context{}-steps{}".format(*sizes))
        for sizes in ((1, 1, 1), (6, 1, 1), (1, 2, 2), (3, 11, 4))
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_steps_behind_any_context_is_checked(
    context: int, steps: int, looked_at: int, dtype: str
) -> None:
    """All in the output, up to four of them layer by layer."""
    run = tiny.built(config(f"dtype={dtype}", context=context, steps=steps))
    assert passed(run).check.reference.endswith(f"layers alone in {looked_at} of {steps} steps")


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["model.n_kv_heads=2", "model.qk_norm=head"], id="grouped_queries"),
        pytest.param(["model.qk_norm=full"], id="norm_of_all_heads"),
        pytest.param(["model.n_dense_layers=1", "model.shared_expert_hidden_dim=9"], id="dense_and_shared"),
        pytest.param(["model.tie_embeddings=true"], id="tied", marks=pytest.mark.slow),
        pytest.param(["router=expert_choice"], id="expert_choice", marks=pytest.mark.slow),
        pytest.param(["router=top_p"], id="any_number_of_slots"),
        pytest.param(["router=hash"], id="token_ids"),
        pytest.param(["experts=loop"], id="loop", marks=pytest.mark.slow),
        pytest.param(["model.top_k=[1,3]"], id="k_by_layer"),
    ],
)
def test_every_option_of_the_decoder_is_verified(more: list[str]) -> None:
    """Cached and without a cache alike."""
    passed(tiny.built(config(*more, "batch=3")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_without_experts_is_checked_as_a_whole(dtype: str) -> None:
    """Null for what it has no layers for; free and forced are the same then, so only one is looked at."""
    check = passed(tiny.built(config(f"dtype={dtype}", model="transformer_decoder"))).check
    assert (check.expert_rel_error, check.token_rel_error, check.near_ties, check.changed_sets) == (None,) * 4


@pytest.mark.thinned(1)
@pytest.mark.parametrize("router", [pytest.param(router, id=router) for router in ("native", "sinkhorn")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_verified_in_every_step(router: str, dtype: str) -> None:
    """Trained weights, whose attention looks far back."""
    passed(tiny.built(config(f"router={router}", f"dtype={dtype}", model="checkpoint", context=60)))


@pytest.mark.parametrize(
    "router",
    [
        pytest.param("torch", id="torch"),
        pytest.param("moe_spec", id="moe_spec"),
        pytest.param("sinkhorn", id="sinkhorn", marks=pytest.mark.slow),
    ],
)
def test_steps_of_several_tokens_are_checked(router: str) -> None:
    """As those of one; the metrics are of the tokens of a step."""
    run = Run(config(f"router={router}", "workload.window=2", "batch=3"))
    run.build()
    check = passed(run).check
    assert run.built.n_tokens == 6 and len(steps_of(run)) == STEPS // 2
    assert check.cache_rel_error is not None and check.near_ties == 0
    assert (check.free_rel_error is None) is (router != "torch")


def test_a_wrong_token_of_a_step_is_found() -> None:
    """Its last token's logits are those of another step."""
    run = Run(config("workload.window=2"))
    run.build()
    passed(run)
    steps = steps_of(run)
    wrong_BgV = steps[0].y.clone()
    wrong_BgV[:, 1] = steps[1].y[:, 1]
    found = verified(run, [steps[0]._replace(y=wrong_BgV), *steps[1:]])
    assert found.mismatch is not None and found.mismatch.where == "layers"


@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in ("balanced", "one_hot")])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_forced_load_has_no_route_to_check(load: str, batch: int) -> None:
    """The context's routing is the router's own, that of the steps the load's; both go into the reference."""
    check = passed(tiny.built(config(f"workload.load={load}", f"batch={batch}"))).check
    assert (check.near_ties, check.free_rel_error, check.changed_sets) == (None, None, None)
    assert check.expert_rel_error is not None


def test_whole_sequences_are_compared_in_parts_that_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sequences at a time: the same check for one and for all at once."""
    whole = passed(tiny.built(config("batch=5"))).check
    monkeypatch.setattr("moe_lab.runs.verify_decode.TOKENS_AT_ONCE", 2 * (CONTEXT + STEPS))
    parts = passed(tiny.built(config("batch=5"))).check
    assert parts.changed_sets == whole.changed_sets
    assert parts.rel_error == pytest.approx(whole.rel_error, rel=0.2)
    assert parts.free_rel_error == pytest.approx(whole.free_rel_error, rel=0.2)


@pytest.mark.slow
def test_the_free_reference_decides_nothing() -> None:
    """A step that went to other experts than fp32 would is counted, and passes with those it went to."""
    sizes = ("dtype=bf16", "batch=16")
    checks = [passed(tiny.built(config(*sizes, f"seed={seed}"))).check for seed in range(4)]
    flipped = [check for check in checks if check.changed_sets]
    assert flipped, "no seed of these shows the effect"
    assert all(check.free_rel_error > check.rel_error for check in flipped)  # type: ignore[operator]


# --- planted faults ---------------------------------------------------------------------------------------------------


def cache_of(run: Run, layer: int = -1) -> LayerCache:
    assert isinstance(run.built.task, Decode)
    found = list(run.built.task.cache.layers)[layer]
    assert isinstance(found, LayerCache)
    return found


def written_one_late(run: Run) -> None:
    """Keys and values of a step go where those of the next belong."""
    cache = cache_of(run)
    put, last = cache.put, CONTEXT + STEPS - 1
    cache.put = lambda k, v, position: put(k, v, (position + 1).clamp(max=last))  # type: ignore[method-assign]


def written_one_early(run: Run) -> None:
    """They take the place of the token before."""
    cache = cache_of(run)
    put = cache.put
    cache.put = lambda k, v, position: put(k, v, position - 1)  # type: ignore[method-assign]


def values_exchanged(run: Run) -> None:
    """Of two positions of the context, in the first layer."""
    values = cache_of(run, 0).v_BHNd
    values[0, :, [1, 2]] = values[0, :, [2, 1]]


def one_value_lost(run: Run) -> None:
    """Of one head, at one position of one sequence."""
    cache_of(run, 0).v_BHNd[-1, 1, 2] = 0


def one_key_doubled(run: Run) -> None:
    """Of one head, at one position of one sequence."""
    cache_of(run, 0).k_BHNd[-1, 1, 2] *= 2


def another_sequences_cache(run: Run) -> None:
    """Every sequence sees what belongs to the one before it."""
    for buffer in cache_of(run).buffers():
        buffer.copy_(buffer.roll(1, 0))


def turned_one_position_back(run: Run) -> None:
    """New tokens stand, for the rotation, where those before them do."""
    rope = run.built.model.ropes[0]
    assert isinstance(rope, Rope)
    at = rope.at
    rope.at = lambda position: at(position - 1)  # type: ignore[method-assign]


def one_step_behind(run: Run) -> None:
    """Each step takes the token before its own; the first, the last of the context."""
    assert isinstance(run.built.task, Decode)
    task, seek = run.built.task, run.built.task.seek
    task.seek = lambda step: (seek(step), task.position_g.sub_(1))  # type: ignore[method-assign, assignment, return-value]


def eps_of_the_last_norm(run: Run) -> None:
    run.built.model.norm.eps = 0.3


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=plant.__name__)
        for plant in (
            written_one_late,
            written_one_early,
            values_exchanged,
            one_value_lost,
            one_key_doubled,
            turned_one_position_back,
            one_step_behind,
            eps_of_the_last_norm,
        )
    ],
)
@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        pytest.param("fp32", 1, id="fp32-batch1"),
        pytest.param("bf16", 3, id="bf16-batch3"),
        pytest.param("fp32", 3, id="fp32-batch3", marks=pytest.mark.slow),
        pytest.param("bf16", 1, id="bf16-batch1", marks=pytest.mark.slow),
    ],
)
def test_a_fault_outside_the_experts_fails(plant: Callable[[Run], None], batch: int, dtype: str) -> None:
    """In the cache, in the positions, or elsewhere; steps and layers each agree with themselves there."""
    run = tiny.built(config(f"dtype={dtype}", f"batch={batch}"))
    plant(run)
    assert fault_found(run).where in ("layers", "route")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_another_sequence_fails(dtype: str) -> None:
    """In one layer."""
    run = tiny.built(config(f"dtype={dtype}", "batch=3"))
    another_sequences_cache(run)
    assert fault_found(run).where == "layers"


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=plant.__name__)
        for plant in (values_exchanged, one_value_lost, turned_one_position_back, one_step_behind)
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_fails_in_a_checkpoint_too(plant: Callable[[Run], None], dtype: str) -> None:
    """Behind a context of 9 bytes of real text."""
    run = tiny.built(config(f"dtype={dtype}", "batch=1", model="checkpoint", context=9))
    plant(run)
    assert fault_found(run).where == "layers"


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("plant", "tamper", "where"),
    [
        pytest.param(in_router, swapped_ids, "route", id="ids_swapped_in_the_router"),
        pytest.param(in_experts, swapped_ids, "layers", id="ids_swapped_in_the_experts"),
        pytest.param(in_router, zeroed_weight, "route", id="weight_zeroed_in_the_router"),
        pytest.param(in_experts, zeroed_weight, "layers", id="weight_zeroed_in_the_experts"),
        pytest.param(in_router, another_expert, "route", id="another_expert_in_the_router"),
        pytest.param(in_experts, another_expert, "layers", id="another_expert_in_the_experts"),
    ],
)
@pytest.mark.parametrize("batch", OFTEN_THREE)
@pytest.mark.parametrize(
    "steps", [pytest.param(1, id="steps1", marks=pytest.mark.slow), pytest.param(STEPS, id="steps4")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_fault_fails_where_it_was_planted(
    plant: Callable[[Run, Tamper], None], tamper: Tamper, where: str, batch: int, steps: int, dtype: str
) -> None:
    """One token's fault in one layer, in the router or behind it."""
    run = tiny.built(config(f"dtype={dtype}", f"batch={batch}", steps=steps))
    plant(run, tamper)
    assert fault_found(run).where == where


@pytest.mark.thinned(1)
@pytest.mark.parametrize("layer", [pytest.param(index, id=f"layer{index}") for index in range(tiny.LAYERS)])
@pytest.mark.parametrize("batch", OFTEN_THREE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_5_percent_off_fails_whichever_it_is(layer: int, batch: int, dtype: str) -> None:
    """Each that some step uses."""
    run = tiny.built(config(f"dtype={dtype}", f"batch={batch}"))
    chosen = layers_of(run)[layer]
    used = {expert for step in steps_of(run) for expert in step.routings[layer].expert_ids_TK.flatten().tolist()}
    right, missed = chosen.experts, []
    for expert in used:
        chosen.experts = right
        in_experts(run, scaled(expert, 1.05), layer)
        mismatch = verified(run).mismatch
        if mismatch is None or mismatch.where != "layers":
            missed.append(expert)
    assert missed == []


@pytest.mark.parametrize("batch", BATCHES)
def test_tokens_that_change_places_fail(batch: int) -> None:
    """Two sequences with each other's routes; alone there is nobody to change with."""
    run = tiny.built(config(f"batch={batch}"))
    in_router(run, exchanged_tokens)
    if batch == 1:
        passed(run)
    else:
        assert fault_found(run).where == "route"


@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in ("balanced", "one_hot")])
def test_a_fault_fails_under_a_forced_load(load: str) -> None:
    """In an expert and in the cache."""
    for plant in (values_exchanged, lambda run: in_experts(run, zeroed_weight)):
        run = tiny.built(config(f"workload.load={load}", "batch=3"))
        plant(run)
        assert fault_found(run).where == "layers"


@pytest.mark.thinned(1)
@pytest.mark.parametrize("step", [pytest.param(step, id=f"step{step}") for step in (0, 5, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_of_one_step_of_the_measured_execution_fails(step: int, dtype: str) -> None:
    """Any of ten: the steps' own outputs are compared, also of those whose layers nobody looks at."""
    run = tiny.built(config(f"dtype={dtype}", steps=10))
    steps = steps_of(run)
    assert verified(run, steps).mismatch is None
    wrong = list(steps)
    wrong[step] = steps[step]._replace(y=steps[step].y * 1.1)
    found = verified(run, wrong)
    assert found.mismatch is not None and found.mismatch.where == "layers"
    nan = steps[step].y.clone()
    nan[-1, 0, 3] = float("nan")
    wrong[step] = steps[step]._replace(y=nan)
    assert verified(run, wrong).check.rel_error == float("inf")
    wrong[step], wrong[step - 1] = steps[step - 1], steps[step]
    assert verified(run, wrong).mismatch is not None


def test_a_route_of_the_measured_execution_is_checked_in_the_steps_that_are_looked_at() -> None:
    """The first, the last and two between; the message names the layer."""
    run = tiny.built(config(steps=10))
    steps = steps_of(run)
    for step in (0, 3, 6, 9):
        wrong, routings = list(steps), list(steps[step].routings)
        routings[1] = another_expert(routings[1])
        wrong[step] = steps[step]._replace(routings=tuple(routings))
        mismatch = verified(run, wrong).mismatch
        assert mismatch is not None and mismatch.where == "route" and "layer 1:" in str(mismatch)


@pytest.mark.parametrize("step", [pytest.param(step, id=f"step{step}") for step in (0, 4)])
def test_a_router_that_breaks_its_contract_fails_in_any_step(step: int) -> None:
    """Before anything is computed by it: the rest is unknown."""
    run = tiny.built(config(steps=9))
    steps = steps_of(run)
    steps[step] = steps[step]._replace(routings=tuple(map(repeated_expert, steps[step].routings)))
    found = verified(run, steps)
    assert found.mismatch is not None and found.mismatch.where == "route" and "twice" in str(found.mismatch)
    assert (found.check.rel_error, found.check.near_ties) == (None, None)


def test_nan_in_a_gate_is_an_error_that_names_the_layer() -> None:
    """A broken checkpoint, say."""
    run = tiny.built(config())
    layers_of(run)[1].weights.gate_ED[2, 3] = float("nan")
    with pytest.raises(ValueError, match="layer 1: the router's logits"):
        run.verify()


@pytest.mark.parametrize("faulty", [pytest.param(False, id="passed"), pytest.param(True, id="failed")])
def test_no_hooks_are_left_on_the_model(faulty: bool) -> None:
    """What is timed afterwards is the model alone."""
    run = tiny.built(config())
    if faulty:
        in_router(run, another_expert, 0)
    assert (verified(run).mismatch is not None) is faulty
    assert not any(module._forward_hooks for module in run.built.model.modules())


def test_the_measured_steps_are_the_same_after_a_verification() -> None:
    """What the reference left in the cache is written anew."""
    run = tiny.built(config("dtype=bf16", "batch=3"))
    before = steps_of(run)
    passed(run)
    assert all(torch.equal(one.y, other.y) for one, other in zip(before, steps_of(run), strict=True))


def test_another_execution_is_verified_in_every_step_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it was parked."""
    run = tiny.built(config())
    passed(run)
    run.park()
    monkeypatch.setitem(run.cfg, "execution", {"name": "compile"})
    from moe_lab.measure.clocks import STEPS as EXECUTIONS
    from moe_lab.measure.clocks import Step

    class Wrong(Step):
        """From the second step on."""

        def __call__(self) -> Output:
            output = super().__call__()
            at = int(run.built.task.position_g)  # type: ignore[arg-type]
            return output._replace(y=output.y * (1.1 if at > CONTEXT else 1.0))

    monkeypatch.setitem(EXECUTIONS, "compile", Wrong)
    with pytest.raises(MismatchError):
        run.unpark()


# --- prefill ----------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [pytest.param(None, id="whole"), pytest.param(3, id="chunks")])
def test_a_prefill_is_verified_and_its_faults_fail(chunk: int | None, batch: int, dtype: str) -> None:
    """Of its output, the logits of the last position."""
    more = [] if chunk is None else [f"workload.prefill_chunk={chunk}"]
    cfg = tiny.decoder_moe("workload.phase=prefill", f"dtype={dtype}", f"batch={batch}", *more)
    run = tiny.built(cfg)
    run.verify()
    assert run.verification is not None and run.verification.check.passed
    y: Tensor = run.built.step().y
    assert y.shape == (batch, 1, tiny.VOCAB)
    for plant, where in (
        (lambda run: in_router(run, zeroed_weight), "route"),
        (
            lambda run: in_experts(run, scaled(int(run.built.step().routings[0].expert_ids_TK[-1, 0]), 1.05), 0),
            "layers",
        ),
        (eps_of_the_last_norm, "layers"),
    ):
        faulty: Any = tiny.built(cfg)
        plant(faulty)
        assert fault_found(faulty).where == where


def begun_one_early(run: Run) -> None:
    """Each chunk but the first is put over the last position of the one before."""
    for positions, cache in run.built.task._parts:  # type: ignore[union-attr,operator]
        for layer in cache.layers:
            layer.start = max(positions.start - 1, 0)


def turned_as_the_first(run: Run) -> None:
    """Each chunk has the rotation of the first."""
    for _, cache in run.built.task._parts:  # type: ignore[union-attr,operator]
        cache.start = 0


@pytest.mark.parametrize("plant", [pytest.param(f, id=f.__name__) for f in (begun_one_early, turned_as_the_first)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_at_the_wrong_place_fails(plant: Callable[[Run], None], dtype: str) -> None:
    """The reference is one pass over all tokens."""
    run = tiny.built(tiny.decoder_moe("workload.phase=prefill", f"dtype={dtype}", "workload.prefill_chunk=3"))
    plant(run)
    assert fault_found(run).where == "layers"


@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in ("balanced", "one_hot")])
def test_a_forced_load_is_prefilled_in_chunks(load: str) -> None:
    """Each has its part of the load."""
    cfg = tiny.decoder_moe("workload.phase=prefill", "workload.prefill_chunk=3", f"workload.load={load}", "batch=3")
    run = tiny.built(cfg)
    run.verify()
    assert run.verification is not None and run.verification.check.passed


def test_of_a_forced_load_no_chunk_decides() -> None:
    """No router chose it, so nothing is said of the chunks that it would see."""
    more = ("workload.phase=prefill", "workload.prefill_chunk=3", "router=sinkhorn", "workload.load=balanced")
    assert not any("prefill_chunk" in text for text in tiny.built(tiny.decoder_moe(*more)).warnings)


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("router", "warned"),
    [pytest.param(*each, id=each[0]) for each in (("sinkhorn", True), ("capacity", True), ("mixtral", False))],
)
@pytest.mark.parametrize("chunk", [pytest.param(3, id="chunks"), pytest.param(7, id="whole")])
def test_a_router_that_sees_other_tokens_is_said_to_see_a_chunk(router: str, warned: bool, chunk: int) -> None:
    """It is verified against itself, chunk by chunk."""
    more = ("workload.phase=prefill", f"workload.prefill_chunk={chunk}", f"router={router}")
    run = tiny.built(tiny.decoder_moe(*more))
    run.verify()
    assert run.verification is not None and run.verification.check.passed
    said = [text for text in run.warnings if text.startswith("workload.prefill_chunk=3: ")]
    assert len(said) == (warned and chunk == 3)
    assert all(text.endswith("; use workload.prefill_chunk=null.") for text in said)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph", "compile")])
@pytest.mark.parametrize("attention", [pytest.param(name, id=name) for name in ("auto", "flash", "cudnn", "efficient")])
@pytest.mark.parametrize("chunk", [pytest.param("null", id="whole"), pytest.param("20", id="chunks")])
def test_a_prefill_is_verified_on_cuda(chunk: str, attention: str, execution: str) -> None:
    """By each backend, all chunks in one graph; a chunk at the wrong place is found."""
    more = [f"execution={execution}", f"model.attention={attention}", f"workload.prefill_chunk={chunk}", "batch=3"]
    cfg = tiny.decoder_moe(
        "workload.phase=prefill", "device=cuda", "dtype=bf16", "seq_len=50", "model.d_model=64", *more
    )
    run = tiny.built(cfg)
    run.verify()
    assert run.verification is not None and run.verification.check.passed
    assert attention in ("auto", run.built.implementation()["attention"].removeprefix("torch:"))
    if chunk != "null":
        faulty = tiny.built(cfg)
        turned_as_the_first(faulty)
        faulty.built.step = faulty.built.make_step("natural")  # a graph holds what was captured
        assert fault_found(faulty).where == "layers"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph", "compile")])
@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("decoder_moe", "checkpoint")])
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "fp16", "bf16")])
def test_a_correct_run_passes_on_cuda_and_a_faulty_one_fails(execution: str, model: str, dtype: str) -> None:
    """With the kernels that the GPU has, at every position of a replayed graph."""
    cfg = config("device=cuda", f"dtype={dtype}", f"execution={execution}", "batch=3", model=model)
    passed(tiny.built(cfg))
    for plant in (values_exchanged, one_value_lost, another_sequences_cache):
        faulty = tiny.built(cfg)
        plant(faulty)
        assert fault_found(faulty).where == "layers"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph", "compile")])
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp16", "bf16")])
def test_one_sequence_is_right_on_cuda(execution: str, dtype: str) -> None:
    """With the kernels of a single row, and of a token on the cache."""
    shape = ("model.d_model=256", "model.n_heads=4", "model.head_dim=64", "model.n_kv_heads=4")
    cfg = config("device=cuda", f"dtype={dtype}", f"execution={execution}", "batch=1", *shape)
    passed(tiny.built(cfg))
    for plant in (values_exchanged, one_value_lost):
        faulty = tiny.built(cfg)
        plant(faulty)
        assert fault_found(faulty).where == "layers"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph")])
@pytest.mark.parametrize(
    "more", [pytest.param("workload.window=2", id="window"), pytest.param("router=lookahead", id="lookahead")]
)
def test_windows_and_guesses_are_right_on_cuda(execution: str, more: str) -> None:
    """Several tokens of a sequence behind a cache, and hidden states that go from layer to layer, in a graph."""
    passed(tiny.built(config("device=cuda", f"execution={execution}", "batch=3", more)))


# --- states of fixed size ---------------------------------------------------------------------------------------------


def state_of(run: Run, layer: int = 0) -> StateCache:
    assert isinstance(run.built.task, Decode)
    found = list(run.built.task.cache.layers)[layer]
    assert isinstance(found, StateCache)
    return found


def state_not_kept(run: Run) -> None:
    """Each step finds the state that the context left, or none."""
    state_of(run).put = lambda position, *after: None  # type: ignore[method-assign]


def state_of_another_sequence(run: Run) -> None:
    """From the first step on."""
    kept = state_of(run)
    before = kept.before
    kept.before = lambda position: [state.roll(1, 0) for state in before(position)]  # type: ignore[method-assign]


def convolution_forgotten(run: Run) -> None:
    """Its last tokens are 0."""
    kept = state_of(run, 2)
    before = kept.before
    kept.before = lambda position: [0 * before(position)[0], before(position)[1]]  # type: ignore[method-assign]


def last_state_wrong(run: Run) -> None:
    """What no later step reads, and what is in the cache."""
    kept = state_of(run, 2)
    put, last = kept.put, CONTEXT + STEPS - 1
    kept.put = lambda position, conv, state: put(  # type: ignore[method-assign]
        position, conv, state * (1.5 if int(position) == last else 1)
    )


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with gated delta nets in two of three layers."""
    wide = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return checkpoint("qwen3_next", tmp_path_factory.mktemp("gated"), **wide)


def gated_run(folder: Path, *more: str, context: int = CONTEXT) -> Run:
    keys = (f"model.path={folder}", "router=native", "workload=random", "batch=3", *more)
    return tiny.built(config(*keys, model="checkpoint", context=context))


@pytest.mark.parametrize(
    ("context", "dtype"),
    [
        pytest.param(2, "bf16", id="context2-bf16"),
        pytest.param(70, "fp32", id="context70-fp32"),
        pytest.param(1, "fp32", id="context1-fp32", marks=pytest.mark.slow),
        pytest.param(70, "bf16", id="context70-bf16", marks=pytest.mark.slow),
    ],
)
def test_steps_that_go_on_from_states_pass(context: int, dtype: str, gated: Path) -> None:
    """As often as they are verified, and from any step."""
    run = gated_run(gated, f"dtype={dtype}", context=context)
    passed(run)
    assert isinstance(run.built.task, Decode)
    run.built.task.advance()
    run.built.task(run.built.x)
    passed(run)


def test_some_of_the_steps_are_those_of_all(gated: Path) -> None:
    """Between them no step is left out."""
    run = gated_run(gated)
    every = [output.y.clone() for output in run.built.outputs()]
    chosen = [output.y.clone() for output in run.built.outputs(2)]
    assert torch.equal(chosen[0], every[0]) and torch.equal(chosen[1], every[STEPS // 2])


def test_no_step_is_jumped_over(gated: Path) -> None:
    """The state before it would be another step's."""
    run = gated_run(gated)
    assert isinstance(run.built.task, Decode)
    for step in (0, 1, 1, 2, 0, 1):
        run.built.task.seek(step)
    with pytest.raises(AssertionError, match="the state before it is not there"):
        run.built.task.seek(3)
    for _ in range(STEPS):
        run.built.task.advance()
    run.built.task.seek(2)


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=plant.__name__)
        for plant in (state_not_kept, state_of_another_sequence, convolution_forgotten, last_state_wrong)
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_fault_in_a_state_fails(plant: Callable[[Run], None], dtype: str, gated: Path) -> None:
    """In the outputs, or in what the cache holds at the end."""
    run = gated_run(gated, f"dtype={dtype}")
    plant(run)
    assert verified(run).mismatch is not None
