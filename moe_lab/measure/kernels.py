"""What a profile tells: from the events of a Chrome trace to kernels with their phases. No torch.

A kernel's phase is that in which it was launched, known by ranges on the host's side (`PHASE`). The kernels of a CUDA
graph are launched together, so theirs are those of an eager pass of the same model: both have the same kernels in the
same order (`matched`).
"""

from __future__ import annotations

import shlex
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

STEP, PHASE = "moe_lab.step.", "moe_lab.phase."
"""How the ranges of a profiled step and of a phase begin."""
EAGER = "eager"
"""The step whose kernels have phases, for one that replays a graph."""
LEAST_MATCHED = 0.95
"""Share of a replay's time that has to be matched, for its phases to be known."""
MOST_EVENTS = 200_000
"""Of a timeline: some 5 MB, as much as a browser shows at once."""
TOP = 10
_MOST_DIFFERENCES = 200
_ON_GPU, _LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation")

Event = Mapping[str, Any]


class Kernel(NamedTuple):
    """A kernel or copy on a GPU, or an operation on a CPU with its own time."""

    name: str
    start_us: float
    duration_us: float
    step: str | None
    """Its step's name, behind `STEP`; None outside."""
    phase: str | None
    """None outside of the phases."""


class _Ranges:
    """Ranges of one kind, which do not overlap within a thread."""

    def __init__(self, events: Iterable[Event], prefix: str):
        by_thread: defaultdict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith(prefix):
                end = event["ts"] + event["dur"]
                by_thread[event["tid"]].append((event["ts"], end, event["name"].removeprefix(prefix)))
        self._by_thread = {thread: sorted(ranges) for thread, ranges in by_thread.items()}

    def at(self, event: Event) -> str | None:
        """The name of the range in which an event of the host began."""
        ranges = self._by_thread.get(event["tid"], [])
        place = bisect_right(ranges, event["ts"], key=lambda each: each[0]) - 1
        return ranges[place][2] if place >= 0 and event["ts"] < ranges[place][1] else None


def launched(events: Sequence[Event]) -> list[Kernel]:
    """What ran on the GPU, in its order, each with where it was launched.

    A kernel that was put on the GPU before the one ahead of it had ended (ops/dependent_launch.py) begins at that end,
    so the times add up to that in which the GPU computed.
    """
    steps, phases = _Ranges(events, STEP), _Ranges(events, PHASE)
    launches = _by_number(events, _LAUNCHES, "correlation")
    hosts = _by_number(events, _HOST, "External id")  # the operation that launched it, where the launch was not seen
    found, busy_until_us = [], 0.0
    for event in sorted((event for event in events if event.get("cat") in _ON_GPU), key=lambda event: event["ts"]):
        numbers = event.get("args", {})
        launch = launches.get(numbers.get("correlation")) or hosts.get(numbers.get("External id"))
        step, phase = (None, None) if launch is None else (steps.at(launch), phases.at(launch))
        start_us, end_us = max(event["ts"], busy_until_us), event["ts"] + event["dur"]
        found.append(Kernel(event["name"], start_us, max(end_us - start_us, 0.0), step, phase))
        busy_until_us = max(busy_until_us, end_us)
    return found


def _by_number(events: Iterable[Event], kinds: Sequence[str], number: str) -> dict[Any, Event]:
    """The events of these kinds by a number of theirs."""
    return {
        event["args"][number]: event
        for event in events
        if event.get("cat") in kinds and number in event.get("args", {})
    }


def operations(events: Sequence[Event]) -> list[Kernel]:
    """The operations of a CPU in their order, each without the time of those that it calls."""
    steps, phases = _Ranges(events, STEP), _Ranges(events, PHASE)
    ops = sorted((event for event in events if event.get("cat") == "cpu_op"), key=lambda op: (op["ts"], -op["dur"]))
    own = [float(op["dur"]) for op in ops]
    above: defaultdict[Any, list[int]] = defaultdict(list)  # by thread, the operations that have not ended
    for index, op in enumerate(ops):
        stack = above[op["tid"]]
        while stack and ops[stack[-1]]["ts"] + ops[stack[-1]]["dur"] <= op["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= op["dur"]
        stack.append(index)
    return [
        Kernel(op["name"], op["ts"], max(us, 0.0), steps.at(op), phases.at(op)) for op, us in zip(ops, own, strict=True)
    ]


def by_step(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """The kernels of each profiled step."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.step is not None:
            found.setdefault(kernel.step, []).append(kernel)
    return found


class Matched(NamedTuple):
    """The kernels of a replay with the phases of an eager pass."""

    kernels: list[Kernel]
    share: float
    """Of their time, that of kernels which the eager pass has too."""
    difference: str | None
    """The first kernel that the two do not share, for people."""

    @property
    def is_known(self) -> bool:
        """Whether so much is matched that the phases are those of the replay."""
        return self.share >= LEAST_MATCHED


def matched(replay: Sequence[Kernel], eager: Sequence[Kernel]) -> Matched:
    """The replay's kernels, each with the phase of the eager kernel of its name at its place.

    A kernel that only the replay has gets the phase of its neighbours if these agree.
    """
    names, others = ([kernel.name for kernel in kernels] for kernels in (replay, eager))
    at = _places(names, others)
    phases = [None if place is None else eager[place].phase for place in at]
    for index, place in enumerate(at):
        if place is None and 0 < index < len(at) - 1 and phases[index - 1] == phases[index + 1]:
            phases[index] = phases[index - 1]
    total = sum(kernel.duration_us for kernel in replay)
    shared = sum(kernel.duration_us for kernel, place in zip(replay, at, strict=True) if place is not None)
    kernels = [kernel._replace(phase=phase) for kernel, phase in zip(replay, phases, strict=True)]
    return Matched(kernels, shared / total if total else 0.0, _difference(names, others))


def _places(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """For each name its place in `others`, in a longest common subsequence; None where it has none.

    E. W. Myers, "An O(ND) difference algorithm and its variations" (1986). With more than `_MOST_DIFFERENCES` the two
    have little in common, and no name has a place.
    """
    at: list[int | None] = [None] * len(names)
    furthest, history = {1: 0}, []  # of each diagonal x - y, the furthest x; before every further difference
    for n_differences in range(_MOST_DIFFERENCES + 1):
        history.append(dict(furthest))
        for diagonal in range(-n_differences, n_differences + 1, 2):
            x = _next(furthest, diagonal, n_differences)[1]
            while x < len(names) and 0 <= x - diagonal < len(others) and names[x] == others[x - diagonal]:
                x += 1
            furthest[diagonal] = x
            if x >= len(names) and x - diagonal >= len(others):
                while history:
                    before = history.pop()
                    last, begun = _next(before, diagonal, len(history))
                    for place in range(begun, x):
                        at[place] = place - diagonal
                    diagonal, x = last, before[last]
                return at
    return at


def _next(furthest: Mapping[int, int], diagonal: int, n_differences: int) -> tuple[int, int]:
    """The diagonal from which one more difference leads to this one, and the x at which it arrives."""
    is_down = diagonal == -n_differences or (
        diagonal != n_differences and furthest[diagonal - 1] < furthest[diagonal + 1]
    )
    return (diagonal + 1, furthest[diagonal + 1]) if is_down else (diagonal - 1, furthest[diagonal - 1] + 1)


def _difference(names: Sequence[str], others: Sequence[str]) -> str | None:
    for index in range(max(len(names), len(others))):
        one, other = (of[index] if index < len(of) else "none" for of in (names, others))
        if one != other:
            return f"kernel {index} of {len(names)} is {one[:60]}, eagerly {other[:60]} of {len(others)}"
    return None


def phases_ms(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of each phase in one replay, `other` outside of them, and `sum_ms` from first kernel to last end.

    A kernel takes from the end of the one before to its own end, so that the gap between two belongs to the second.
    """
    taken: defaultdict[str, float] = defaultdict(float, other=0.0)
    ended = kernels[0].start_us
    for kernel in kernels:
        end = max(kernel.start_us + kernel.duration_us, ended)
        taken[kernel.phase or "other"] += (end - ended) / 1e3
        ended = end
    return {**taken, "sum_ms": (ended - kernels[0].start_us) / 1e3}


def median_phases_ms(replays: Iterable[Sequence[Kernel]]) -> dict[str, float]:
    """`phases_ms` of several replays: the median of each, and their sum."""
    every = [phases_ms(replay) for replay in replays]
    names = dict.fromkeys(name for one in every for name in one)
    median = {name: float(np.median([one.get(name, 0.0) for one in every])) for name in names if name != "sum_ms"}
    return {**median, "sum_ms": sum(median.values())}


def table(kernels: Sequence[Kernel], implementation: Callable[[str, str | None], str]) -> dict[str, Any]:
    """What a record's `profile` says of the kernels of a step; `implementation` as `implementation_of` gives it."""
    total_us = sum(kernel.duration_us for kernel in kernels)
    rows: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    in_phases: defaultdict[str, float] = defaultdict(float)
    in_implementations: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        rows[kernel.name, kernel.phase].append(kernel.duration_us)
        in_phases[kernel.phase or "other"] += kernel.duration_us / 1e3
        in_implementations[implementation(kernel.name, kernel.phase)] += kernel.duration_us / 1e3
    longest = sorted(rows.items(), key=lambda row: -sum(row[1]))[:TOP]
    return {
        "kernels_ms": total_us / 1e3,
        "launches": len(kernels),
        "phases_ms": dict(in_phases),
        "implementations_ms": dict(in_implementations),
        "top": [
            {
                "name": name[:200],
                "calls": len(durations),
                "ms": sum(durations) / 1e3,
                "share": sum(durations) / total_us,
                "phase": phase,
                "implementation": implementation(name, phase),
            }
            for (name, phase), durations in longest
        ],
    }


def implementation_of(ran: Mapping[str, str]) -> Callable[[str, str | None], str]:
    """Who launched a kernel of this name and phase, from a record's `implementation`.

    A phase that it does not name stands for itself. The kernels of few rows serve several phases.
    """

    def of(name: str, phase: str | None) -> str:
        if "gemv" in ran.get("linear", "") and base_name(name) in ("gemv_kernel", "rows_kernel"):  # of one and of more
            return "linear=gemv"
        first = (phase or "other").split("+")[0]
        part = first if first in ran or first not in ("dispatch", "combine") else "experts"
        return f"{part}={ran[part]}" if part in ran else part

    return of


def ncu_command(kernels: Sequence[Kernel], overrides: Sequence[str]) -> str | None:
    """Nsight Compute on one launch of the longest kernel of a step, past the first steps; None without a kernel.

    Another profiler in the process would be in its way, so the run's own are off.
    """
    taken: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        if not kernel.name.startswith(("Memcpy", "Memset")):
            taken[kernel.name] += kernel.duration_us
    if not taken:
        return None
    name = max(taken, key=lambda name: taken[name])
    calls = sum(kernel.name == name for kernel in kernels)
    one = ["--kernel-name", base_name(name), "--launch-skip", str(3 * calls), "--launch-count", "1"]
    off = ("measure.profile=", "measure.phases=", "measure.energy=")
    kept = [override for override in overrides if not override.startswith(off)]
    return shlex.join(["ncu", "--set", "full", *one, "moe-lab", *kept, "measure.profile=false", "measure.phases=false"])


def base_name(name: str) -> str:
    """The function of a demangled name, as `ncu --kernel-name` takes it: without namespaces, templates, parameters."""
    depth, plain = 0, ""
    for character in name.replace("(anonymous namespace)::", ""):
        if character == "(" and not depth:
            break
        depth += {"<": 1, ">": -1}.get(character, 0)
        if not depth and character != ">":
            plain += character
    return plain.split()[-1].rsplit("::", 1)[-1] if plain.strip() else name


def bounded(events: Sequence[Event], most: int = MOST_EVENTS) -> tuple[list[Event], int]:
    """The first `most` events and all names of processes and threads, and how many others were left out."""
    names = [event for event in events if event.get("ph") == "M"]
    timed = sorted((event for event in events if event.get("ph") != "M"), key=lambda event: event["ts"])
    return [*names, *timed[:most]], max(len(timed) - most, 0)
