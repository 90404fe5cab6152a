"""The floor of a forward pass: the fewest bytes and operations over what this machine was measured to do.

floor = max(bytes / copy bandwidth, FLOPs / matrix-product rate)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from moe_lab.models import Output
from moe_lab.models.attend import products_counted
from moe_lab.models.layers import Embedding
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import parameter_bytes

# torch hides the counter from its compiler, and imports that for it: more than a second of every process. Nothing is
# compiled while flops are counted, so it is marked as hidden already.
_dispatch: Any = _FlopCounterMode.__torch_dispatch__
_dispatch = getattr(_dispatch, "__wrapped__", _dispatch)
_dispatch.__dynamo_disable = _dispatch


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    (B, H, S, d), N = q, k[2]
    return 2 * B * H * S * N * (d + v[3])


def _efficient_attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return _attention_flops(*(torch.Size((B, H, S, d)) for B, S, H, d in (q, k, v)))


# Torch's counter knows no kernel of the CPU, wants as many heads of keys as of queries, and takes the tokens of the
# last one for its heads.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
    torch.ops.aten._efficient_attention_forward: _efficient_attention_flops,
}


def count_flops(forward: Callable[[], Output]) -> tuple[Output, int]:
    """The forward pass's output and its floating-point operations in matrix products (2 per multiply-add).

    Attention counts as the keys that each query sees. A model that asks torch for it itself, not `models/attend.py`,
    has the full square counted, causal or not, as torch counts it.
    """
    of_attention: list[int] = []
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter, products_counted(of_attention.append):
        output = forward()
    return output, int(counter.get_total_flops()) + sum(of_attention)


def least_bytes(model: nn.Module, x: Tensor, output: Output) -> int:
    """Bytes that any implementation moves: every parameter in use read once, the input read, the output written.

    Of the embedding the rows of the distinct tokens, of the experts those that some token chose.
    """
    unused = 0
    for module in model.modules():
        if isinstance(module, Embedding):
            rows = module.weight
            tied = any(
                other is rows for name, other in model.named_parameters(remove_duplicate=False) if "head" in name
            )
            unused += 0 if tied else (rows.shape[0] - len(x.unique())) * rows.shape[1] * rows.element_size()
    layers = moe_layers(model)
    for layer, routing in zip(layers, output.routings, strict=True):
        weights = layer.weights
        used = int((routing.expert_ids_TK.unique() >= 0).sum())
        unused += (weights.n_experts - used) * weights.bytes_per_expert
    moved = x.numel() * x.element_size() + output.y.numel() * output.y.element_size()
    if getattr(model, "gives_routing", False):
        given = [tensor for routing in output.routings for tensor in (routing.expert_ids_TK, *(routing.dispatch or ()))]
        moved += sum(tensor.numel() * tensor.element_size() for tensor in given)
    return parameter_bytes(model) - unused + moved


def _best_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The quickest of some repeats: a ceiling asks for the best, not the typical."""
    best = float("inf")
    run()
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begin)
    return best


@cache
def measured_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """{bytes_per_s, flops_per_s, peak_source} of this machine: a large copy, and a square matrix product in `dtype`."""
    on_cuda = device.type == "cuda"
    copy_bytes, side = (2**31, 8192) if on_cuda else (2**28, 1024)
    source = torch.empty(copy_bytes // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    copy_s = _best_seconds(partial(target.copy_, source), device, 5)
    del source, target
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product_s = _best_seconds(partial(torch.mm, a, b), device, 10)
    return {
        "bytes_per_s": 2 * copy_bytes / copy_s,
        "flops_per_s": 2 * side**3 / product_s,
        "peak_source": f"measured: copy of {copy_bytes // 2**20} MiB, {side}^3 matrix product in {dtype}",
    }


def roofline(moved: int, flops: int, p50_ms: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The record's `roofline`. A fraction above 1 says that the data came from a cache."""
    peaks = measured_peaks(device, dtype)
    floor_ms = max(moved / peaks["bytes_per_s"], flops / peaks["flops_per_s"]) * 1e3
    return {
        "flops": flops,
        "bytes": moved,
        "floor_ms": floor_ms,
        "fraction_of_floor": floor_ms / p50_ms,
        **peaks,
    }
