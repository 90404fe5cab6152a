"""The weights of a Hugging Face checkpoint: which tensor of which file goes where, and the loading. safetensors only.

Files are memory-mapped one after the other and every tensor is copied straight to its place in the model's own
parameters, on their device and in their dtype, so that the host never holds more than the pages of one file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lab.models.checkpoint_forms import AS_IT_IS, Form, Fp8Blocks
from moe_lab.models.checkpoint_keys import parse_object, read_object, shown, some
from moe_lab.models.checkpoint_names import USUAL, Naming, Source, layouts, whole
from moe_lab.records.files import require_plain
from moe_lab.terminal import Console

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_THREADS = min(8, os.cpu_count() or 1)
_SHOWN = 6  # keys that a message names
_LONGEST_NAME = 255  # bytes
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


class Found(NamedTuple):
    """A tensor in a file: its shape, dtype and place, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    n_bytes: int


def files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises `ValueError` if there are none or one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        index = read_object(folder / INDEX)
        names = sorted({str(name) for name in index["weight_map"].values()})
        if outside := [name for name in names if Path(name).name != name or len(os.fsencode(name)) > _LONGEST_NAME]:
            raise ValueError(f"{shown(outside[0])} is not the name of a file in this folder")
        if not names:
            raise ValueError("no file is listed")
    except FileNotFoundError:
        others = sorted(path.name for path in folder.glob("*.bin"))
        more = f" ({others[0]} is a pickle and cannot be loaded; convert it to safetensors)" if others else ""
        raise ValueError(f"model.path={folder}: no {SINGLE} or {INDEX} found{more}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.path: {folder / INDEX} cannot be read ({error}); download the file again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"model.path={folder}: {len(missing)} of {len(names)} files listed in {INDEX} are missing "
            f"({some(list(map(shown, missing)), _SHOWN)}); download them."
        )
    return [folder / name for name in names]


def headers(paths: Sequence[Path]) -> dict[str, Found]:
    """Every tensor by its key. Raises `ValueError` for a file that is cut short or not in the safetensors format."""
    tensors: dict[str, Found] = {}
    for path in paths:
        try:
            if require_plain(path, None).st_size < 8:
                raise ValueError("incomplete header")
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if size > min(os.path.getsize(path), _LARGEST_HEADER):
                    raise ValueError("incomplete header")
                header = parse_object(stream.read(size))
            header.pop("__metadata__", None)
            for key, entry in header.items():
                start, stop = entry["data_offsets"]
                tensor = Found(path, tuple(entry["shape"]), entry["dtype"], 8 + size + start, stop - start)
                _require_same(key, tensor, tensors.get(key, tensor))
                tensors[key] = tensor
            end = max(
                (tensor.start + tensor.n_bytes for tensor in tensors.values() if tensor.file == path), default=8 + size
            )
            if end != os.path.getsize(path):
                raise ValueError(f"{os.path.getsize(path)} bytes, but its header says {end}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"model.path: {path} is damaged ({error}); download the file again.") from error
    return tensors


def _require_same(key: str, tensor: Found, other: Found) -> None:
    """Some converters leave a tensor in two files; then both must hold the same."""
    if tensor is not other and not _same_bytes(tensor, other):
        raise ValueError(f"{shown(key)} has other values in {other.file.name}")


class Copy(NamedTuple):
    """A tensor of a file, with its scales if it is quantised, and the place it is copied to."""

    key: str
    found: Found
    target: Tensor
    form: Form = AS_IT_IS
    scale_key: str | None = None
    scale: Found | None = None


def plan(
    parameters: Mapping[str, Tensor],
    found: Mapping[str, Found],
    tied: bool,
    *,
    unused: Callable[[str], bool] | None = None,
    blocks: Fp8Blocks | None = None,
    naming: Naming = USUAL,
) -> list[Copy]:
    """What to copy, in the order of the files.

    Args:
        parameters: all those of the model that a checkpoint has, by our names.
        found: all tensors of the checkpoint.
        tied: whether the head is the embedding, which some files hold twice.
        unused: whether a tensor that no parameter takes may be in the files; None: none may.
        blocks: the form of matrices in fp8; None: there are none.
        naming: how the tensors are called.

    Raises:
        ValueError: keys that are missing or unexpected, shapes that differ, or a tied head that is another matrix.
    """
    copies, missing, wrong = [], [], []
    head, embedding = whole("head.weight", naming), whole("embed.weight", naming)
    expected = {head} if tied else set()
    only_head = tied and embedding not in found and head in found
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for name, layout in layouts(shapes, found, naming).items():
        for source in layout:
            if only_head and name == "embed.weight":  # of two names for a matrix some files keep this one
                source = Source(head)
            expected.add(source.key)
            if (there := found.get(source.key)) is None:
                missing.append(shown(source.key))
                continue
            target = parameters[name].data[source.place]
            fp8 = blocks if blocks is not None and there.dtype in blocks.dtypes and target.dim() == 2 else None
            form = source.form if fp8 is None else source.form.in_blocks(fp8)
            if mistake := _mistake(there, form.shape(target.shape), form.dtypes):
                wrong.append(f"{shown(source.key)} {mistake}")
                continue
            scale_key, scale = form.scale_key(source.key), None
            if scale_key is not None:
                expected.add(scale_key)
                if (scale := found.get(scale_key)) is None:
                    missing.append(shown(scale_key))
                elif mistake := _mistake(scale, form.scale_shape(there.shape), form.scale_dtypes):
                    wrong.append(f"{shown(scale_key)} {mistake}")
            copies.append(Copy(source.key, there, target, form, scale_key, scale))
    unexpected = [shown(key) for key in found if key not in expected and not (unused and unused(key))]
    complaints = [
        f"{len(keys)} {what}: {some(keys, _SHOWN)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape or dtype", wrong))
        if keys
    ]
    if complaints:
        folder = next((there.file.parent for there in found.values()), "")
        raise ValueError(f"model.path={folder}: the tensors do not match config.json: {'; '.join(complaints)}.")
    _require_one_matrix(found, tied, head, embedding)
    return sorted(copies, key=lambda copy: (copy.found.file, copy.found.start))


def _require_one_matrix(found: Mapping[str, Found], tied: bool, head: str, embedding: str) -> None:
    """Raise `ValueError` for a tied head that is not the embedding; both by their keys."""
    if tied and {head, embedding} <= found.keys() and not _same_bytes(found[head], found[embedding]):
        raise ValueError(
            f"model.path: {found[head].file} has a separate {head}, but config.json says tie_word_embeddings; set it "
            "to false."
        )


def _mistake(there: Found, shape: tuple[int, ...], dtypes: Sequence[str]) -> str:
    """What is wrong with a tensor; empty if nothing is."""
    if there.shape != shape:
        return f"has shape {list(there.shape)} instead of {list(shape)}"
    return "" if there.dtype in dtypes else f"has dtype {shown(there.dtype)}; supported: {', '.join(dtypes)}"


def _same_bytes(tensor: Found, other: Found, at_once: int = 1 << 20) -> bool:
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        return False
    with tensor.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(tensor.start)
        b.seek(other.start)
        return all(
            a.read(n) == b.read(n)
            for n in (min(at_once, tensor.n_bytes - done) for done in range(0, tensor.n_bytes, at_once))
        )


def execute(copies: Sequence[Copy]) -> None:
    """Copy, with a progress bar if standard error is a terminal. Every value is looked at.

    Raises:
        ValueError: a file that cannot be read, or a value that is NaN or infinite.
    """
    with _progress(sum(copy.found.n_bytes for copy in copies)) as advance:
        by_file: dict[Path, list[Copy]] = {}
        for copy in copies:
            by_file.setdefault(copy.found.file, []).append(copy)
        for path, of_file in by_file.items():
            try:
                _execute(path, of_file, advance)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model.path: {path} cannot be read ({error}); download the file again.") from error


def _execute(path: Path, copies: Sequence[Copy], advance: Callable[[int], None]) -> None:
    """All copies out of one file. Each thread waits for its own page faults and transfers."""

    mode = torch.is_inference_mode_enabled()  # a thread has its own

    def one(copy: Copy) -> int:
        with torch.inference_mode(mode):
            tensor = handle.get_tensor(copy.key)
            if copy.scale is None or copy.scale_key is None:
                copy.form.put(copy.target, tensor)
                _require_finite(copy, tensor)
                return copy.found.n_bytes
            if copy.scale.file == path:
                scale = handle.get_tensor(copy.scale_key)
            else:  # a shard may end between a matrix and its scales
                with safe_open(copy.scale.file, framework="pt") as other:
                    scale = other.get_tensor(copy.scale_key)
            copy.form.put(copy.target, tensor, scale)
            if not _is_finite(copy.target):
                raise ValueError(
                    f"model.path: {copy.found.file}: {shown(copy.key)} times its scales has values that are NaN, "
                    f"infinite or too large for {_name(copy.target.dtype)}; download the file again or use another "
                    "dtype."
                )
        return copy.found.n_bytes

    with safe_open(path, framework="pt") as handle, ThreadPoolExecutor(_THREADS) as pool:
        for n_bytes in pool.map(one, copies):
            advance(n_bytes)


def _require_finite(copy: Copy, tensor: Tensor) -> None:
    """Raise `ValueError` if a value that was copied is NaN or infinite. It is looked at where it now lies."""
    if _is_finite(copy.target):
        return
    if _is_finite(tensor):
        raise ValueError(
            f"model.path: {copy.found.file}: {shown(copy.key)} has values that are too large for "
            f"{_name(copy.target.dtype)}; use another dtype."
        )
    n_bad = int(tensor.isfinite().logical_not().sum())
    raise ValueError(
        f"model.path: {copy.found.file}: {shown(copy.key)} has {n_bad} values that are NaN or infinite; download the "
        "file again."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy: of values with a NaN the least and the greatest are NaN."""
    return not tensor.numel() or all(math.isfinite(value.item()) for value in tensor.aminmax())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal's standard error, if it is one."""
    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n_bytes: progress.advance(task, n_bytes)
