"""Which of torch's backends computes softmax(scale q k^T) v of many queries: flash, cudnn, efficient or math.

`model.attention` names one of them, or auto: the first of `best_first` that can. Torch's own choice depends on its
version and stands nowhere, so it is never left to torch; `backend_of` is what ran. A single query has no such choice:
a decode step has kernels of its own (ops/decode_attention.py).
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from moe_lab.errors import UnavailableError
from moe_lab.ops.library import capability, constant_when_compiled

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_LOWER_RIGHT = 2  # torch.nn.attention.bias.CausalVariant's; its module imports the compiler: seconds of every process
_TRIED = 37  # queries; an odd number, so that a backend that wants another one is found out


class Call(NamedTuple):
    """What decides who can compute a product, beside its lengths.

    width, value_width: of a query and a key, and of a value.
    kind: causal: as many queries as keys | lower_right: the queries are the last of the keys | mask: any keys are seen.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int
    kind: str


def kind_of(n_queries: int, n_keys: int, window: int | None) -> str:
    """The `kind` of a causal product whose queries are the last of the keys, of which each sees the last `window`."""
    if window is not None and window < n_keys:
        return "mask"
    return "causal" if n_queries == n_keys else "lower_right"


def best_first(call: Call) -> tuple[str, ...]:
    """What auto tries. The last can always compute, with all scores in memory.

    cuDNN is first on Hopper and Blackwell, for which FlashAttention-2 was not written. It has no lower-right mask of
    its own and would read one of all scores, so what goes on from a cache is flash's.
    """
    if call.device.type != "cuda":
        return "flash", "math"
    if call.kind != "lower_right" and capability(call.device) >= (9, 0):
        return "cudnn", "flash", "efficient", "math"
    return "flash", "efficient", "cudnn", "math"


def backend_of(asked: str, call: Call) -> str:
    """Who computes `call`: `asked`, one of `BACKENDS`, or with auto the first that can.

    Raises:
        UnavailableError: torch cannot compute it by what was asked for.
    """
    if asked == "auto":
        return next(name for name in best_first(call) if why_not(name, call) is None)
    if (reason := why_not(asked, call)) is not None:
        raise UnavailableError(f"model.attention={asked}: {reason}; use model.attention=auto or another backend")
    return asked


@cache
@_disable_current_modes()  # who counts operations does not count these, which are done once
def why_not(name: str, call: Call) -> str | None:
    """Why torch cannot compute `call` by this backend here, in its own words; None if it can. Tried on a few tokens."""
    if name in ("cudnn", "efficient") and call.device.type != "cuda":
        return f"needs device=cuda (this run is on {call.device.type})"
    n_keys = _TRIED + (call.kind == "lower_right")
    options = {"device": call.device, "dtype": call.dtype}
    q = torch.zeros(1, call.heads, _TRIED, call.width, **options)  # type: ignore[call-overload]
    k = torch.zeros(1, call.key_heads, n_keys, call.width, **options)  # type: ignore[call-overload]
    v = torch.zeros(1, call.key_heads, n_keys, call.value_width, **options)  # type: ignore[call-overload]
    mask = torch.ones(_TRIED, n_keys, dtype=torch.bool, device=call.device) if call.kind == "mask" else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _product(q, k, v, mask, None, name)
        except torch.OutOfMemoryError:
            raise  # says nothing of the backend
        except RuntimeError as error:
            # Torch warns of each backend: what precedes it, and that it was switched off, says nothing.
            texts = [str(warning.message).split(" (Triggered")[0].strip() for warning in said]
            reasons = [text for text in texts if "not used because" not in text and "runtime disabled" not in text]
            return " ".join(reasons) or str(error).splitlines()[0]
    return None


def softmax_product(
    q_BHSd: Tensor, k_BHNd: Tensor, v_BHNe: Tensor, seen_SN: Tensor | None, scale: float | None, asked: str
) -> Tensor:
    """softmax(scale q k^T) v [B, H, S, e] over the keys that are seen (bool), by what `asked` means (`backend_of`).

    Args:
        seen_SN: None: the queries are the last S of the N keys, and each sees those up to its own.
        scale: None: 1/sqrt(d).
    """
    kind = "mask" if seen_SN is not None else kind_of(q_BHSd.shape[2], k_BHNd.shape[2], None)
    sizes = (q_BHSd.shape[1], k_BHNd.shape[1], q_BHSd.shape[3], v_BHNe.shape[3])
    name = _backend_of(asked, q_BHSd.device, q_BHSd.dtype, *sizes, kind)
    return _product(q_BHSd, k_BHNd, v_BHNe, seen_SN, scale, name)


@constant_when_compiled
def _backend_of(asked: str, *call: Any) -> str:  # the compiler takes no named tuple for a constant
    return backend_of(asked, Call(*call))


def _product(q: Tensor, k: Tensor, v: Tensor, seen_SN: Tensor | None, scale: float | None, name: str) -> Tensor:
    S, N, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if shared > 1 and name == "efficient":  # it takes a key for each query; a copy of them is less than all scores
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    if seen_SN is None and S < N:
        if q.is_cuda and name in ("flash", "efficient"):
            return _lower_right(q, k, v, scale or q.shape[3] ** -0.5, name)
        seen_SN = torch.ones(S, N, dtype=torch.bool, device=q.device).tril(N - S)
    causal = seen_SN is None
    with sdpa_kernel(BACKENDS[name]):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen_SN, is_causal=causal, scale=scale, enable_gqa=shared > 1
        )


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float, name: str) -> Tensor:
    """Of queries that are the last of the keys, by the two kernels that need no mask for it.

    As `torch.nn.attention.bias.causal_lower_right` does it, which a pass that is compiled cannot make.
    """
    width = q.shape[3]
    if name == "flash":
        if more := -width % 8:
            q, k, v = (F.pad(part, (0, more)) for part in (q, k, v))
        y, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
        return y[..., :width]  # type: ignore[no-any-return]
    y_BSHe, *_ = torch.ops.aten._efficient_attention_forward(
        *(part.transpose(1, 2) for part in (q, k, v)),
        bias=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dropout_p=0.0,
        custom_mask_type=_LOWER_RIGHT,
        compute_log_sumexp=False,
        scale=scale,
    )
    return y_BSHe.transpose(1, 2)  # type: ignore[no-any-return]
