"""measure/kernels.py: recorded lists of events, by hand and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.measure.kernels import (
    LEAST_MATCHED,
    Kernel,
    _places,
    base_name,
    bounded,
    by_step,
    implementation_of,
    launched,
    matched,
    median_phases_ms,
    ncu_command,
    operations,
    phases_ms,
    table,
)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    """As torch.profiler writes it."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur, "args": args}


def kernel(name: str, start_us: float, duration_us: float, phase: str | None = None) -> Kernel:
    return Kernel(name, start_us, duration_us, "0", phase)


# A step with two launches in phases and one outside, which run later and in another order of time on the GPU's side.
RECORDED = [
    event("user_annotation", "moe_lab.step.0", 0, 100),
    event("user_annotation", "moe_lab.phase.router", 10, 20),
    event("user_annotation", "moe_lab.phase.experts", 40, 20),
    event("user_annotation", "somebody's own", 0, 1000),
    event("cpu_op", "aten::mm", 11, 5),
    event("cuda_runtime", "cudaLaunchKernel", 12, 3, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 45, 3, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 70, 3, correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", 170, 3, correlation=4),
    event("cuda_runtime", "cudaDeviceSynchronize", 180, 3),
    event("gpu_memcpy", "Memcpy DtoD", 300, 7, tid=99, correlation=3),
    event("kernel", "gemm", 200, 30, tid=99, correlation=1),
    event("kernel", "fused", 240, 50, tid=99, correlation=2),
    event("kernel", "late", 400, 9, tid=99, correlation=4),
    event("kernel", "unknown", 500, 9, tid=99, correlation=5),
    {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "ts": 0, "args": {"name": "python"}},
]


def test_a_kernel_has_the_phase_in_which_it_was_launched() -> None:
    """It runs long after; what was launched outside of a step, or by nobody that is known, is in none."""
    assert launched(RECORDED) == [
        Kernel("gemm", 200, 30, "0", "router"),
        Kernel("fused", 240, 50, "0", "experts"),
        Kernel("Memcpy DtoD", 300, 7, "0", None),
        Kernel("late", 400, 9, None, None),
        Kernel("unknown", 500, 9, None, None),
    ]
    assert [len(of) for of in by_step(launched(RECORDED)).values()] == [3]


def test_a_kernel_that_waits_for_the_one_before_it_has_the_time_behind_that() -> None:
    """b is on the GPU from 3 on and waits until 10; c ends before b does; d begins later."""
    times = [("a", 0, 10), ("b", 3, 12), ("c", 4, 5), ("d", 20, 2)]
    found = launched([event("kernel", name, ts, dur, tid=99) for name, ts, dur in times])
    assert [(one.name, one.start_us, one.duration_us) for one in found] == [
        ("a", 0, 10),
        ("b", 10, 5),
        ("c", 15, 0),
        ("d", 20, 2),
    ]
    phases = phases_ms([one._replace(phase=one.name) for one in found])
    assert phases == {"other": 0, "a": 0.01, "b": 0.005, "c": 0, "d": 0.007, "sum_ms": 0.022}  # a gap is the next one's


def test_all_kernels_of_a_replay_have_its_launch() -> None:
    """They share its correlation; a launch of another thread is not in this thread's ranges."""
    events = [
        event("user_annotation", "moe_lab.step.3", 0, 10),
        event("cuda_runtime", "cudaGraphLaunch", 5, 1, correlation=8),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, tid=2, correlation=9),
        *(event("kernel", name, ts, 2, tid=99, correlation=8) for ts, name in enumerate("abc", 20)),
        event("kernel", "z", 50, 2, tid=99, correlation=9),
    ]
    assert [(one.name, one.step) for one in launched(events)] == [("a", "3"), ("b", "3"), ("c", "3"), ("z", None)]


def test_a_kernel_whose_launch_was_not_seen_has_that_of_its_operation() -> None:
    """By the number that both have."""
    events = [
        event("user_annotation", "moe_lab.step.0", 0, 100, **{"External id": 1}),
        event("user_annotation", "moe_lab.phase.router", 10, 20, **{"External id": 2}),
        event("cpu_op", "aten::mm", 12, 5, **{"External id": 3}),
        event("kernel", "gemm", 200, 30, tid=99, correlation=7, **{"External id": 3}),
        event("kernel", "other", 300, 30, tid=99, correlation=8, **{"External id": 1}),
    ]
    assert [one[:] for one in launched(events)] == [("gemm", 200, 30, "0", "router"), ("other", 300, 30, "0", None)]


def test_an_operation_has_its_own_time_alone() -> None:
    """linear of 100 us calls t (20) and mm (60), which calls resolve (10); the next operation is beside them."""
    events = [
        event("user_annotation", "moe_lab.step.0", 0, 200),
        event("user_annotation", "moe_lab.phase.router", 0, 110),
        event("cpu_op", "linear", 5, 100),
        event("cpu_op", "t", 6, 20),
        event("cpu_op", "mm", 30, 60),
        event("cpu_op", "resolve", 31, 10),
        event("cpu_op", "softmax", 120, 7),
        event("cpu_op", "elsewhere", 30, 60, tid=2),
    ]
    found = {one.name: (one.duration_us, one.phase) for one in operations(events)}
    assert found == {
        "linear": (20, "router"),
        "t": (20, "router"),
        "mm": (50, "router"),
        "resolve": (10, "router"),
        "softmax": (7, None),
        "elsewhere": (60, None),
    }


EAGER = [
    kernel("norm", 0, 1),
    kernel("gemm", 10, 1, "router"),
    kernel("topk", 20, 1, "router"),
    kernel("gemm", 30, 1, "experts"),
    kernel("sum", 40, 1, "combine"),
]


def replay_of(names: Sequence[str], durations: Sequence[float] | None = None) -> list[Kernel]:
    ends = itertools.accumulate(durations or [2.0] * len(names))
    return [kernel(n, end - d, d) for n, end, d in zip(names, ends, durations or [2.0] * len(names), strict=True)]


def test_a_replay_with_the_same_kernels_has_their_phases() -> None:
    """By place, for a name may stand in several phases."""
    found = matched(replay_of(["norm", "gemm", "topk", "gemm", "sum"]), EAGER)
    assert [one.phase for one in found.kernels] == [None, "router", "router", "experts", "combine"]
    assert (found.share, found.difference, found.is_known) == (1.0, None, True)
    assert [one.duration_us for one in found.kernels] == [2.0] * 5


def test_a_small_kernel_of_the_replay_alone_has_the_phase_of_its_neighbours() -> None:
    """A memset within the router is the router's; between two phases it is nobody's."""
    names = ["norm", "gemm", "Memset", "topk", "Memset", "gemm", "sum"]
    found = matched(replay_of(names, [20, 20, 0.5, 20, 0.5, 20, 20]), EAGER)
    assert [one.phase for one in found.kernels] == [None, "router", "router", "router", None, "experts", "combine"]
    assert found.share == pytest.approx(100 / 101) and found.is_known
    assert found.difference == "kernel 2 of 7 is Memset, eagerly topk of 5"


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        pytest.param(["a", "b", "c"], "kernel 0 of 3 is a, eagerly norm of 5", id="others"),
        pytest.param(["norm", "gemm", "topk", "cutlass", "sum"], "kernel 3 of 5 is cutlass, eagerly gemm", id="one"),
        pytest.param([], "kernel 0 of 0 is none, eagerly norm of 5", id="none"),
    ],
)
def test_a_replay_of_other_kernels_is_not_known(names: list[str], difference: str) -> None:
    """And it is said where they part."""
    found = matched(replay_of(names), EAGER)
    assert not found.is_known and found.share < LEAST_MATCHED
    assert difference in str(found.difference)


NAMES = st.lists(st.sampled_from(["gemm", "norm", "topk", "copy"]), min_size=1, max_size=40)


@settings(max_examples=50)
@given(NAMES, st.data())
def test_phases_survive_any_repetition_of_names(names: list[str], data: st.DataObject) -> None:
    """Identical sequences map by place; one inserted kernel moves no phase of the others."""
    eager = [kernel(name, at, 1, f"p{at}") for at, name in enumerate(names)]
    replay = replay_of(names)
    assert [one.phase for one in matched(replay, eager).kernels] == [one.phase for one in eager]
    at = data.draw(st.integers(0, len(names)))
    more = [*replay[:at], kernel("inserted", 0, 0.001), *replay[at:]]
    found = matched(more, eager)
    assert found.is_known
    assert [one.phase for one in found.kernels if one.name != "inserted"] == [one.phase for one in eager]


@settings(max_examples=50)
@given(NAMES, NAMES)
def test_what_is_matched_is_a_longest_common_subsequence(names: list[str], others: list[str]) -> None:
    """As long as the textbook's table says, of equal names, in order."""
    at = _places(names, others)
    pairs = [(index, place) for index, place in enumerate(at) if place is not None]
    assert all(names[index] == others[place] for index, place in pairs)
    assert [place for _, place in pairs] == sorted({place for _, place in pairs})
    longest = [[0] * (len(others) + 1) for _ in range(len(names) + 1)]
    for i, j in itertools.product(range(len(names)), range(len(others))):
        same = names[i] == others[j]
        longest[i + 1][j + 1] = longest[i][j] + 1 if same else max(longest[i][j + 1], longest[i + 1][j])
    assert len(pairs) == longest[-1][-1]


def test_two_long_sequences_without_a_common_kernel_are_soon_given_up() -> None:
    """Thousands of each."""
    assert _places(["a"] * 3000, ["b"] * 3000) == [None] * 3000


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 9), st.sampled_from(["router", None])), min_size=1))
def test_phases_of_a_replay_add_up_to_it(drawn: list[tuple[float, float, str | None]]) -> None:
    """Gaps and overlaps included: nothing is lost and nothing counted twice."""
    at, kernels = 0.0, []
    for gap, duration, phase in drawn:
        at += gap
        kernels.append(kernel("k", at, duration, phase))
    found = phases_ms(kernels)
    whole = max(one.start_us + one.duration_us for one in kernels) - kernels[0].start_us
    assert found["sum_ms"] == pytest.approx(whole / 1e3)
    assert sum(ms for name, ms in found.items() if name != "sum_ms") == pytest.approx(found["sum_ms"])


def test_a_gap_belongs_to_the_kernel_that_waited() -> None:
    """2 us of norm; a gap of 3 before 4 us of the router; an overlap of 1 with the experts."""
    kernels = [kernel("norm", 0, 2), kernel("gemm", 5, 4, "router"), kernel("gemm", 8, 3, "experts")]
    assert phases_ms(kernels) == pytest.approx({"other": 0.002, "router": 0.007, "experts": 0.002, "sum_ms": 0.011})


def test_of_several_replays_the_median_counts() -> None:
    """A disturbed one changes nothing."""
    replays = [[kernel("norm", 0, 2), kernel("gemm", 2, us, "router")] for us in (4, 900, 5)]
    assert median_phases_ms(replays) == pytest.approx({"other": 0.002, "router": 0.005, "sum_ms": 0.007})


RAN = {"router": "triton", "experts": "fused", "combine": "cuda_ext", "attention": "torch"}


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        pytest.param("router", "router=triton", id="router"),
        pytest.param("dispatch", "experts=fused", id="by_the_experts"),
        pytest.param("combine", "combine=cuda_ext", id="by_itself"),
        pytest.param("dispatch+experts+combine", "experts=fused", id="joined"),
        pytest.param(None, "other", id="outside"),
    ],
)
def test_who_computes_a_phase(phase: str | None, expected: str) -> None:
    """As the record's `implementation` says."""
    assert implementation_of(RAN)("k", phase) == expected
    assert implementation_of({})("k", "attention") == "attention"


@pytest.mark.parametrize("linear", [pytest.param(name, id=name) for name in ("gemv", "torch+gemv")])
@pytest.mark.parametrize("kernel", [pytest.param(name, id=name) for name in ("gemv_kernel", "rows_kernel")])
def test_the_kernels_of_few_rows_are_named_in_every_phase(linear: str, kernel: str) -> None:
    """They are neither attention's nor nobody's."""
    of = implementation_of({"attention": "cuda_ext", "linear": linear})
    name = f"void moe_lab::(anonymous namespace)::{kernel}<__nv_bfloat16>(moe_lab::GemvArguments)"
    assert of(name, "attention") == of(name, None) == "linear=gemv"
    assert of("decode_attention_kernel", "attention") == "attention=cuda_ext"


def test_a_table_by_hand() -> None:
    """The same kernel in two phases is two rows, the longest first."""
    one = [kernel("gemm", 0, 60, "experts"), kernel("gemm", 60, 30, "router"), kernel("norm", 90, 10)]
    found = table(one, implementation_of(RAN))
    assert (found["kernels_ms"], found["launches"]) == (pytest.approx(0.1), 3)
    assert found["phases_ms"] == pytest.approx({"experts": 0.06, "router": 0.03, "other": 0.01})
    assert found["implementations_ms"] == pytest.approx({"experts=fused": 0.06, "router=triton": 0.03, "other": 0.01})
    assert [(row["name"], row["phase"], row["calls"]) for row in found["top"]] == [
        ("gemm", "experts", 1),
        ("gemm", "router", 1),
        ("norm", None, 1),
    ]
    assert [row["share"] for row in found["top"]] == pytest.approx([0.6, 0.3, 0.1])


def test_only_the_ten_longest_are_named() -> None:
    """The sums are of all."""
    found = table([kernel(f"k{us}", 0, us) for us in range(1, 31)], implementation_of(RAN))
    assert [row["name"] for row in found["top"]] == [f"k{us}" for us in range(30, 20, -1)]
    assert found["kernels_ms"] == pytest.approx(sum(range(31)) / 1e3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("_up_kernel", "_up_kernel", id="triton"),
        pytest.param(
            "void at::native::vectorized_elementwise_kernel<4, (anonymous namespace)::F, "
            "std::array<char*, 2ul> >(int, at::F)",
            "vectorized_elementwise_kernel",
            id="templates",
        ),
        pytest.param("ampere_sgemm_32x128_tn", "ampere_sgemm_32x128_tn", id="cublas"),
        pytest.param("(anonymous namespace)::route<8>(float const*)", "route", id="anonymous"),
        pytest.param("void cutlass::device_kernel<cutlass::gemm::K<int> >(cutlass::P)", "device_kernel", id="cutlass"),
    ],
)
def test_ncu_is_given_the_function(name: str, expected: str) -> None:
    """It compares that alone, unless it is told otherwise."""
    assert base_name(name) == expected


def test_the_command_of_ncu_runs_this_cell_without_another_profiler() -> None:
    """The longest kernel, past three steps; a copy is no kernel."""
    one = [Kernel("Memcpy DtoD", 0, 99, "0", None), kernel("void up<4>(int)", 0, 10), kernel("void up<4>(int)", 10, 9)]
    command = ncu_command(one, ["model=a b", "measure.profile=true", "batch=2"])
    assert command == (
        "ncu --set full --kernel-name up --launch-skip 6 --launch-count 1 moe-lab 'model=a b' batch=2 "
        "measure.profile=false measure.phases=false"
    )
    assert ncu_command(one[:1], []) is None


def test_a_timeline_is_bounded_and_says_what_it_leaves_out() -> None:
    """The first events in time, with the names of the threads; nothing is left out where all fit."""
    events, left_out = bounded(RECORDED, 4)
    assert [one["ts"] for one in events] == [0, 0, 0, 10, 11] and left_out == len(RECORDED) - 5
    assert {one["ph"] for one in events[:1]} == {"M"}
    assert bounded(RECORDED)[1] == 0 and len(bounded(RECORDED)[0]) == len(RECORDED)
