"""The expert MLPs by the extension's kernels for Hopper: two products, with the activation and the gather in them.

    h[n] = act(x[t] W_gate[e]^T, x[t] W_up[e]^T),  o[n] = h[n] W_down[e]^T,  y[t] = sum over s of weights[t, s] o[n]

for the slots n = (t, s) with e = ids[t, s]. Products and sums in float32; h and o are rounded to the dtype. On a CPU
the op is a plain loop in C++, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension
from moe_lab.ops.dispatch import Dispatch

CAPABILITY = (9, 0)
"""The one compute capability that has the instructions."""
DTYPES = (torch.bfloat16, torch.float16)
STEP = 16
"""What both widths must be a multiple of."""
_FEW_SLOTS, _MOST_NUMBERS, _MANY_TOKENS = 1024, 2560, 96  # as kernels/experts.h says


def require(device: torch.device) -> None:
    """Raise unless the kernels can compute on `device`, or could once the extension is built.

    Raises:
        UnavailableError: the device is another.
        BuildError: the extension does not compile.
    """
    if device.type != "cuda":
        raise UnavailableError(f"needs device=cuda (this run is on {device.type}); use experts=auto")
    if (has := torch.cuda.get_device_capability(device)) != CAPABILITY:
        raise UnavailableError(
            f"needs sm_90 (an H100, H200 or GH200), and this GPU is sm_{has[0]}{has[1]}; use experts=auto"
        )
    extension.require(device)


def require_computable(dtype: torch.dtype, n_experts: int, *widths: int) -> None:
    """Raise `UnavailableError` if the kernels do not compute this dtype, so many experts or these widths (D and F)."""
    if dtype not in DTYPES:
        raise UnavailableError(f"needs dtype=bf16 or fp16, not {dtype}; use experts=auto")
    if n_experts > extension.MOST_EXPERTS:
        raise UnavailableError(f"supports at most {extension.MOST_EXPERTS} experts, not {n_experts}; use experts=auto")
    if odd := [width for width in widths if width % STEP]:
        raise UnavailableError(
            f"needs model.shape.d_model and mlp_hidden_dim to be multiples of {STEP}, not {odd[0]}; use experts=auto"
        )


def reads_dispatch(tiles: tuple[int, ...], n_slots: int, n_experts: int) -> bool:
    """Whether the kernels read slots that are sorted already; they sort few for themselves."""
    up_rows, down_rows = tiles[0], tiles[2]
    copies_rows = up_rows == 256 and n_slots >= _MANY_TOKENS * n_experts
    few = n_slots <= min(_FEW_SLOTS, _MOST_NUMBERS - 2 * n_experts)
    return not few or down_rows == 256 or copies_rows


def fused_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    tiles: tuple[int, ...],
    *,
    dispatch: Dispatch | None = None,
    scales_input: bool = False,
    activation: str = "silu",
    gate_up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Tensor:
    """[T, D] in x's dtype; bit-identical from call to call. The extension must be loaded.

    Args:
        x_TD: bf16 or fp16.
        ids_TK: int32; an id outside [0, E), such as -1, is an unused slot.
        weights_TK: float32; they multiply the expert's input where `scales_input`, else its output.
        w_gate_up_E2FD, w_down_EDF: contiguous, of x's dtype; neither changed nor copied.
        tiles: up_rows, up_tokens, down_rows, down_tokens, pieces, as `moe_lab.experts.tiles.Tiles` describes them; all
            1 for the kernel of one token.
            Pieces that would be empty are not made (`moe_lab.experts.tiles.not_empty`).
        dispatch: the sorted slots, if they are there already.
        activation: `silu`: silu(g) u. `clamped`: that of gpt-oss, g sigmoid(1.702 g) (u + 1) with g at most 7 and u
            between -7 and 7.
        gate_up_bias_E2F, down_bias_ED: float32.

    Raises:
        RuntimeError: a shape, dtype, device or tile that the kernels do not take.
    """
    order = (None, None, None) if dispatch is None else (dispatch.offsets_E1, dispatch.perm_N, dispatch.inverse_N)
    result: Tensor = torch.ops.moe_lab.experts(
        x_TD.contiguous(), ids_TK.contiguous(), weights_TK.contiguous(), w_gate_up_E2FD, w_down_EDF,
        gate_up_bias_E2F, down_bias_ED, *order, activation, scales_input, *tiles,
    )  # fmt: skip
    return result
