"""Dependent launches: a chain in a CUDA graph reads what the kernel before has written, however early it begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.ops.add_rms_norm import add_rms_norm
from moe_lab.ops.dependent_launch import is_dependent
from tests.ops.cases import DEVICE, normal


def test_where_kernels_are_launched_so(device: torch.device) -> None:
    """On Hopper and newer."""
    expected = device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    assert is_dependent(device) == expected and not is_dependent(torch.device("cpu"))


@pytest.mark.gpu
def test_a_chain_in_a_graph_waits_for_what_it_reads() -> None:
    """Each norm reads what the one before it wrote: 200 replays, each of another x, to the last bit."""
    weight = normal(2048, dtype=torch.bfloat16)
    x = normal(3, 2048, dtype=torch.bfloat16)

    def chain(synchronize: bool) -> Tensor:
        y, total = x, x
        for _ in range(20):
            y, total = add_rms_norm(y, total, weight, 1e-5, "triton")
            if synchronize:
                torch.cuda.synchronize()
        return y + total

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(False)
    for seed in range(200):
        x.copy_(torch.randn(3, 2048, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, chain(True)), DEVICE
