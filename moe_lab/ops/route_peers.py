"""`route` by vLLM, SGLang and transformers, where those packages are installed: what a user would otherwise use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_lab.errors import UnavailableError

if TYPE_CHECKING:
    from moe_lab.ops.selection import Selection

Peer = Callable[[Tensor, "Selection", Tensor | None], tuple[Tensor, Tensor]]
"""(logits [T, E], how, bias [E]) -> ids [T, K], weights [T, K]."""


def _vllm(logits_TE: Tensor, how: Selection, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    if how.top_groups < how.n_groups:
        grouped = torch.ops._moe_C.grouped_topk
        groups = (how.n_groups, how.top_groups, how.k, how.renormalize, how.scale)
        weights_TK, ids_TK = grouped(logits_TE, *groups, bias_E, 1)  # 1: the sigmoid
        return ids_TK.int(), weights_TK
    ids_TK = logits_TE.new_empty(len(logits_TE), how.k, dtype=torch.int32)
    weights_TK = torch.empty_like(ids_TK, dtype=torch.float32)
    ranked = (weights_TK, ids_TK, torch.empty_like(ids_TK), logits_TE, how.renormalize, bias_E)
    if how.score == "softmax":
        torch.ops._moe_C.topk_softmax(*ranked)
    else:
        torch.ops._moe_C.topk_sigmoid(*ranked, how.scale)
    return ids_TK, weights_TK


def _sglang(logits_TE: Tensor, how: Selection, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    fused: Any = importlib.import_module("sglang.kernels.ops.moe.moe_fused_gate").moe_fused_gate
    weights_TK, ids_TK = fused(
        logits_TE,
        bias_E,
        how.k,
        how.score,
        renormalize=how.renormalize,
        routed_scaling_factor=how.scale,
        apply_routed_scaling_factor_on_output=True,
        num_expert_group=how.n_groups if how.top_groups < how.n_groups else 1,
        topk_group=how.top_groups if how.top_groups < how.n_groups else 1,
    )
    return ids_TK, weights_TK


class _NoProduct(TorchFunctionMode):
    """`F.linear` gives its input: transformers' routers multiply by the gate themselves, and here are the logits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is F.linear else func(*args, **kwargs or {})


@cache
def _transformers_router(how: Selection, n_experts: int) -> nn.Module:
    models: Any = importlib.import_module("transformers.models")
    config = SimpleNamespace(
        hidden_size=n_experts,
        num_experts=n_experts,
        num_local_experts=n_experts,
        num_experts_per_tok=how.k,
        norm_topk_prob=how.renormalize,
        n_group=how.n_groups,
        topk_group=how.top_groups,
        routed_scaling_factor=how.scale,
    )
    with torch.device("meta"):  # their gate is not read
        if how.score == "softmax":
            return models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter(config)  # type: ignore[no-any-return]
        return models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)  # type: ignore[no-any-return]


def _transformers(logits_TE: Tensor, how: Selection, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    router = _transformers_router(how, logits_TE.shape[1])
    if bias_E is not None:
        router.e_score_correction_bias = bias_E.detach()  # a buffer, which a Parameter would replace for good
    with _NoProduct():
        _, weights_TK, ids_TK = router(logits_TE)
    return ids_TK.int(), weights_TK.float()


PEERS: dict[str, Peer] = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}
_MODULES = {
    "vllm": "vllm._custom_ops",
    "sglang": "sglang.kernels.ops.moe.moe_fused_gate",
    "transformers": "transformers.models.qwen3_moe.modeling_qwen3_moe",
}


def require(name: str, device: torch.device) -> None:
    """Raise `UnavailableError` if this peer is not installed or does not support the device."""
    if device.type != "cuda" and name != "transformers":
        raise UnavailableError(f"router.impl={name}: needs device=cuda (this run is on {device.type})")
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        why = " ".join(str(error).split())
        raise UnavailableError(f"router.impl={name}: cannot import {name} ({why}); pip install {name}") from error


def require_computes(name: str, how: Selection, *, bias: bool, gate_bias: bool) -> None:
    """Raise `UnavailableError` if the peer's kernel does not support `how`."""
    grouped = how.top_groups < how.n_groups
    plain_softmax = how.score == "softmax" and not bias and not grouped and how.scale == 1
    scored = how.score == "sigmoid" and bias and (not grouped or how.group_score == "top2")
    if gate_bias or not (plain_softmax or scored):
        raise UnavailableError(
            f"router.impl={name}: supports only softmax without bias, groups or scale, and sigmoid with a bias; "
            "use router.impl=torch"
        )
