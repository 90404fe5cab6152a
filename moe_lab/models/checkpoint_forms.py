"""What a config.json says of quantised weights. Those that are supported are dequantised as they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_lab.models.checkpoint_keys import Keys, is_integer, shown

if TYPE_CHECKING:  # a checkpoint's config.json is read without torch
    from collections.abc import Sequence

    from torch import Tensor

_VALUES_AT_ONCE = 1 << 22  # in fp32 16 MiB, for each thread that loads


@dataclass(frozen=True)
class Fp8Blocks:
    """fp8 (e4m3) matrices with a scale for each block of `rows` x `columns`, as DeepSeek-V3 has them."""

    rows: int
    columns: int
    dtype: ClassVar = "F8_E4M3"
    """In the header of a safetensors file."""
    scale: ClassVar = "_scale_inv"
    """What the key of a matrix's scales has at its end. Values are multiplied by them."""

    def __str__(self) -> str:
        return f"fp8 with a scale per {self.rows}x{self.columns} block"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the scales of a matrix of this shape; the last blocks may be cut."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def put(self, target: Tensor, values: Tensor, scale: Tensor) -> None:
        """target = values * scale of their block, in fp32 on the target's device, some rows at a time."""
        n_rows, n_columns = values.shape
        scale = scale.to(target.device).float().repeat_interleave(self.columns, 1)[:, :n_columns]
        at_once = max(1, _VALUES_AT_ONCE // (self.rows * n_columns)) * self.rows
        for start in range(0, n_rows, at_once):
            rows = slice(start, min(start + at_once, n_rows))
            wide = values[rows].to(target.device).float()
            of_rows = scale[start // self.rows : -(-rows.stop // self.rows)].repeat_interleave(self.rows, 0)
            target[rows].copy_(wide.mul_(of_rows[: len(wide)]))


def read_quantization(config: Keys) -> Fp8Blocks | None:
    """None for weights that are not quantised. Raises `ValueError` for a format that is not supported, by its name."""
    if config.get("compression_config"):
        raise config.refuse("compression_config is not supported; use the bf16 weights.")
    if not config.get("quantization_config"):
        return None
    quantization = config.part("quantization_config")
    method, form = quantization.get("quant_method"), quantization.get("fmt", default="e4m3")
    if method != "fp8" or form not in ("e4m3", "float8_e4m3fn"):
        raise quantization.refuse(
            f"quantization_config.quant_method={shown(method)} (fmt={shown(form)}) is not supported; supported: fp8 "
            "(e4m3) in blocks; use the bf16 weights."
        )
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(is_integer(n) and 0 < n < 1 << 20 for n in block):
        raise quantization.refuse(
            f"quantization_config.weight_block_size={shown(block)} is not supported; it must be two sizes, as "
            "[128, 128]; use the bf16 weights."
        )
    # What activations are rounded to and which matrices are not quantised: the files' own dtypes say the latter.
    for key in ("activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt"):
        quantization.get(key)
    return Fp8Blocks(*block)
