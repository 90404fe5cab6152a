"""How the files of a checkpoint hold a tensor: as it is, arranged in another way, or quantised.

What is quantised is dequantised as it is loaded; `read_quantization` reads off a config.json in which form it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from moe_lab.models.checkpoint_keys import Keys, is_integer, shown

if TYPE_CHECKING:  # a checkpoint's config.json is read without torch
    from collections.abc import Sequence

    from torch import Tensor

PLAIN = ("F32", "F16", "BF16")
_VALUES_AT_ONCE = 1 << 16
"""How many are dequantised at a time on a CPU, by each thread that loads: they stay in its cache, and the host's memory
has room for all threads. A GPU, which waits longer for its kernels, is given 64 times as many."""


class Form:
    """How a file holds a tensor: here as it is. What else there is derives from it."""

    dtypes: ClassVar[tuple[str, ...]] = PLAIN
    """In the header of a safetensors file."""

    def shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """Of the tensor in the file that belongs into a target of this shape."""
        return tuple(target)

    def scale_key(self, key: str) -> str | None:
        """The key of the scales that belong to the tensor `key`; None: it has none."""
        return None

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the scales of a tensor of this shape in the file."""
        raise NotImplementedError

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """Of the scales, in the header of a safetensors file."""
        return PLAIN

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """Fill the target. What has to be computed is computed on its device, a piece at a time."""
        target.copy_(values)

    def in_blocks(self, blocks: Fp8Blocks) -> Form:
        """The form of a matrix that would have this one, were it not fp8."""
        return blocks


AS_IT_IS = Form()


@dataclass(frozen=True)
class Arranged(Form):
    """All experts in one tensor whose rows and columns are exchanged, or whose rows are of gate and up in turns.

    Ours has rows of outputs, those of the gate first.
    """

    transposed: bool = False
    interleaved: bool = False

    def shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """See `Form`."""
        return (*target[:-2], target[-1], target[-2]) if self.transposed else tuple(target)

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`; expert by expert, for torch would copy the whole to exchange its rows and columns."""
        for mine, of_file in zip(target, values, strict=True):
            there = of_file.to(target.device)
            there = there.mT if self.transposed else there
            if self.interleaved:
                mine, there = in_turns(mine), there.unflatten(0, (-1, 2))
            mine.copy_(there)


class OnePlus(Form):
    """The weight of a zero-centred norm: the file holds it less 1."""

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`."""
        target.copy_(values.to(target.dtype) + 1)


@dataclass(frozen=True)
class Times(Form):
    """A vector that the model multiplies by a constant: ours is the product."""

    factor: float

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`."""
        target.copy_(values.to(target.dtype) * self.factor)


@dataclass(frozen=True)
class Regrouped(Form):
    """Rows that the file has in groups, as a query and a gate for each head: `sizes` are those of a group's parts.

    Ours has the first part of every group, then the second of every group, and so on. `inner`: what it is but for that.
    """

    sizes: tuple[int, ...]
    inner: Form = AS_IT_IS

    @property
    def dtypes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.dtypes

    def scale_key(self, key: str) -> str | None:
        """See `Form`."""
        return self.inner.scale_key(key)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Form`."""
        return self.inner.scale_shape(shape)

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`."""
        if scale is not None:
            there = target.new_empty(values.shape)
            self.inner.put(there, values, scale)
            values = there
        n_groups, first = len(values) // sum(self.sizes), 0
        for size, of_file in zip(self.sizes, values.unflatten(0, (n_groups, -1)).split(self.sizes, 1), strict=True):
            target[first : first + n_groups * size].unflatten(0, (n_groups, size)).copy_(of_file)
            first += n_groups * size

    def in_blocks(self, blocks: Fp8Blocks) -> Form:
        """See `Form`."""
        return replace(self, inner=blocks)


class OneRow(Form):
    """A vector that the file has as a matrix of one row."""

    def shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """See `Form`."""
        return (1, *target)

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`."""
        target.copy_(values[0])


def in_turns(rows: Tensor) -> Tensor:
    """Of rows [2F, ...], the gate's first, a view [F, 2, ...] that has gate and up in turns."""
    turns: Tensor = rows.unflatten(0, (2, -1)).transpose(0, 1)
    return turns


@dataclass(frozen=True)
class Mxfp4(Form):
    """4-bit floats (e2m1), 32 of a row with one power of two (e8m0) as their scale: OCP MX, as gpt-oss has its experts.

    A byte holds two values, the first in its lower half. `interleaved`: as `Arranged`.
    """

    interleaved: bool = False
    dtypes: ClassVar = ("U8",)

    def __str__(self) -> str:
        return "mxfp4 (of the experts)"

    def shape(self, target: Sequence[int]) -> tuple[int, ...]:
        """See `Form`."""
        return (*target[:-1], target[-1] // 32, 16)

    def scale_key(self, key: str) -> str:
        """See `Form`."""
        return f"{key.removesuffix('_blocks')}_scales"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Form`."""
        return tuple(shape[:-1])

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """See `Form`."""
        return self.dtypes

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`; some rows of an expert at a time. A scale of 255 is NaN."""
        assert scale is not None
        at_once = max(1, _at_once(target) // target.shape[2] // 2) * 2
        for mine, blocks, powers in zip(target, values, scale, strict=True):
            rows = in_turns(mine) if self.interleaved else mine
            for start in range(0, len(blocks), at_once):
                piece = slice(start, start + at_once)
                wide = _wide(blocks[piece].to(target.device), powers[piece].to(target.device))
                if self.interleaved:
                    rows[start // 2 : (start + at_once) // 2].copy_(wide.unflatten(0, (-1, 2)))
                else:
                    rows[piece].copy_(wide)


def _at_once(target: Tensor) -> int:
    return _VALUES_AT_ONCE if target.device.type == "cpu" else 64 * _VALUES_AT_ONCE


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _wide(blocks_RGb: Tensor, powers_RG: Tensor) -> Tensor:
    """fp32 [R, G * 32] of bytes [R, G, 16] and exponents [R, G]."""
    exponents = powers_RG.float() - 127
    table = exponents.new_tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = table[blocks_RGb.bitwise_and(15).int()], table[blocks_RGb.bitwise_right_shift(4).int()]
    scale_RG = exponents.exp2().masked_fill(powers_RG == 255, float("nan"))
    values = pairs[0].new_empty(*blocks_RGb.shape, 2)
    values[..., 0], values[..., 1] = pairs
    return (values.flatten(2) * scale_RG.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Fp8Blocks(Form):
    """fp8 (e4m3) matrices with a scale for each block of `rows` x `columns`, as DeepSeek-V3 has them."""

    rows: int
    columns: int
    dtypes: ClassVar = ("F8_E4M3",)

    def __str__(self) -> str:
        return f"fp8 with a scale per {self.rows}x{self.columns} block"

    def scale_key(self, key: str) -> str:
        """See `Form`; values are multiplied by the scales."""
        return f"{key}_scale_inv"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Form`; the last blocks may be cut."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def put(self, target: Tensor, values: Tensor, scale: Tensor | None = None) -> None:
        """See `Form`: values * scale of their block, in fp32."""
        assert scale is not None
        n_rows, n_columns = values.shape
        scale = scale.to(target.device).float().repeat_interleave(self.columns, 1)[:, :n_columns]
        at_once = max(1, _at_once(target) // (self.rows * n_columns)) * self.rows
        for start in range(0, n_rows, at_once):
            rows = slice(start, min(start + at_once, n_rows))
            wide = values[rows].to(target.device).float()
            of_rows = scale[start // self.rows : -(-rows.stop // self.rows)].repeat_interleave(self.rows, 0)
            target[rows].copy_(wide.mul_(of_rows[: len(wide)]))


def read_quantization(config: Keys) -> Fp8Blocks | Mxfp4 | None:
    """None for weights that are not quantised. Raises `ValueError` for a format that is not supported, by its name."""
    if config.get("compression_config"):
        raise config.refuse("compression_config: quantised checkpoints of its kind are not supported; use bf16.")
    if not config.get("quantization_config"):
        return None
    quantization = config.part("quantization_config")
    method, form = quantization.get("quant_method"), quantization.get("fmt", default="e4m3")
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        quantization.get("modules_to_not_convert")  # all but the experts' matrices, as their keys say
        for key in ("hidden_size", "intermediate_size"):
            if (width := config.size(key)) % 32:
                raise config.refuse(f"{key}={width} must be a multiple of 32 in mxfp4; use the bf16 weights.")
        return Mxfp4()
    if method != "fp8" or form not in ("e4m3", "float8_e4m3fn"):
        raise quantization.refuse(
            f"quantization_config.quant_method={shown(method)} (fmt={shown(form)}): of quantised checkpoints only fp8 "
            "(e4m3) in blocks and mxfp4 of gpt_oss are supported; use the bf16 weights."
        )
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(is_integer(n) and 0 < n < 1 << 20 for n in block):
        raise quantization.refuse(
            f"quantization_config.weight_block_size={shown(block)}: quantised matrices must have blocks of two "
            "sizes, as [128, 128]; use the bf16 weights."
        )
    # What activations are rounded to and which matrices are not quantised: the files' own dtypes say the latter.
    for key in ("activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt"):
        quantization.get(key)
    return Fp8Blocks(*block)
