"""Records with an energy and a profile, as a GPU leaves them."""

from __future__ import annotations

from typing import Any

from moe_lab.measure.energy import Lap, State, summary
from moe_lab.measure.kernels import Kernel, implementation_of, table
from moe_lab.records.schema import Record

COUNTER = {
    "source": "NVML total energy",
    "counts": "the whole GPU with its memory",
    "reason": None,
    "resolution_s": 0.1,
}
KERNELS = {
    "_up_kernel": ("experts", 410.0),
    "_down_kernel": ("experts", 205.0),
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int> > >(Params)": (
        "attention",
        160.0,
    ),
    "route_kernel": ("router", 12.0),
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int> >(int)": (None, 3.0),
}


def add(record: Record, watts: float = 500.0, throttled: str = "") -> None:
    """Ten blocks of a second at this power, and a profile."""
    laps = [Lap(1.0, watts, State(watts + 3, 1755.0, 3201.0, 58.0))] * 10
    found = summary(COUNTER, laps, [throttled] * 10, passes=1000, tokens=8, alone=True)
    step = [Kernel(name, 0, us, "0", phase) for name, (phase, us) in KERNELS.items()]
    profile: dict[str, Any] = {
        "execution": "cuda_graph",
        "steps": 5,
        "phases_from": "the kernels of an eager pass in the same order",
        **table(step, implementation_of({"router": "cuda_ext", "experts": "fused"})),
        "ncu": "ncu --set full --kernel-name _up_kernel --launch-skip 3 --launch-count 1 moe-lab model=decoder_moe",
        "timeline": "timeline.json.gz",
        "timeline_left_out": 1234,
    }
    record.energy, record.profile = found, profile
    record.environment["device"] = "cuda"
    if record.latency_ms is not None:
        record.latency_ms.throttled_blocks = 10 if throttled else 0
