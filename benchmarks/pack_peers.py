"""Packs the expert kernels of other projects for a machine without a network: their wheels, less what we do not call.

    python -m benchmarks.pack_peers --out dist/peers

Made for Python 3.12, torch 2.11 with CUDA 13, Linux on x86-64 and a GPU of compute capability 9.0. Each pack is a
folder with its files and an install.sh; on the other machine:

    sh dist/peers/vllm/install.sh /tmp/site && . /tmp/site/env.sh
    moe-lab list experts

What is left out: machine code for other GPUs (zeroed, so that it packs to nothing), and modules of vLLM and FlashInfer
that their kernels import but do not need for bf16, for which small ones stand in (peer_stubs.py). The kernels, what
launches them and their tables of tiles are the projects' own.

A pack of more than --part MiB is cut into folders NAME, NAME2, ...: bring their files into one folder over there.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peer_stubs import FLASHINFER, FROST, VLLM

_FUSED_MOE = "vllm/model_executor/layers/fused_moe"
_PTX, _MACHINE_CODE = 1, 2
_CUTE = "flashinfer/fused_moe/cute_dsl"


@dataclass(frozen=True)
class Pack:
    """One project.

    Attributes:
        wheels: in the order in which they are unpacked; a later one replaces files of an earlier one.
        keep, drop: patterns of the files.
        stubs: path: source of files in place of the project's.
        paths: what PYTHONPATH needs, relative to the site folder.
    """

    wheels: Sequence[str]
    keep: Sequence[str] = ("**/*",)
    drop: Sequence[str] = ()
    stubs: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[str] = (".",)


PACKS = {
    "vllm": Pack(
        wheels=["vllm==0.26.0"],
        keep=[
            "vllm/envs.py",
            "vllm/_custom_ops.py",
            "vllm/scalar_type.py",
            "vllm/_C_stable_libtorch.abi3.so",
            "vllm/_moe_C_stable_libtorch.abi3.so",
            "vllm/triton_utils/*.py",
            "vllm/utils/math_utils.py",
            "vllm/utils/torch_utils.py",
            "vllm/utils/platform_utils.py",
            f"{_FUSED_MOE}/fused_moe.py",
            f"{_FUSED_MOE}/activation.py",
            f"{_FUSED_MOE}/moe_align_block_size.py",
            f"{_FUSED_MOE}/configs/*H200.json",
            "vllm/third_party/deep_gemm/**/*",
            "*.dist-info/METADATA",
        ],
        drop=["vllm/third_party/deep_gemm/_C.cpython-31[0134]*"],
        stubs=VLLM,
    ),
    "sonic": Pack(
        wheels=[
            "sonic-moe==0.1.2.post1",
            "quack-kernels==0.3.11",
            "nvidia-cutlass-dsl==4.4.2",
            "nvidia-cutlass-dsl-libs-base==4.4.2",
            "nvidia-cutlass-dsl-libs-cu13==4.4.2",
            "apache-tvm-ffi==0.1.15.post2",
        ],
        paths=[".", "nvidia_cutlass_dsl/python_packages"],
    ),
    "flashinfer": Pack(
        wheels=[
            "flashinfer-python==0.7.4",
            "nvidia-cutlass-dsl==4.8.1",
            "nvidia-cutlass-dsl-libs-base==4.8.1",
            "nvidia-cutlass-dsl-libs-core==4.8.1",
            "nvidia-cutlass-dsl-libs-cu13==4.8.1",
            "apache-tvm-ffi==0.1.15.post2",
        ],
        keep=[
            f"{_CUTE}/sm90_contiguous*.py",
            f"{_CUTE}/hopper/*.py",
            f"{_CUTE}/common/*.py",
            f"{_CUTE}/moe_utils.py",
            f"{FROST}/bf16/*.py",
            f"{FROST}/nvfp4/fma_fc2.py",
            f"{FROST}/activations.py",
            f"{FROST}/fp4_weight.py",
            "flashinfer/cute_dsl/fp4_common.py",
            "flashinfer/cute_dsl/utils.py",
            "flashinfer/cute_dsl/availability.py",
            "flashinfer/tllm_enums.py",
            "flashinfer/api_logging.py",
            "nvidia_cutlass_dsl/**/*",
            "tvm_ffi/**/*",
            "*.dist-info/METADATA",
        ],
        drop=["nvidia_cutlass_dsl/dsl_packages/iket/**/*"],
        stubs=FLASHINFER,
        paths=[".", "nvidia_cutlass_dsl/dsl_packages"],
    ),
}

INSTALL = """#!/bin/sh
# Unpacks the folder of this file: sh install.sh DEST && . DEST/env.sh
set -e
mkdir -p "$1"
here=$(cd "$(dirname "$0")" && pwd)
site=$(cd "$1" && pwd)
cat "$here"/site.tar.xz* | xz -dc | tar -x -C "$site"
"""


def fetch(wheels: Iterable[str], folder: Path) -> list[Path]:
    """The files of these wheels, for the target, in that order."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--quiet"]
    for number in (14, 17, 24, 27, 28, 35):
        options += ["--platform", "manylinux2014_x86_64" if number == 14 else f"manylinux_2_{number}_x86_64"]
    found = []
    for wheel in wheels:
        name, version = wheel.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), wheel]
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"pack_peers: pip cannot download {wheel}; a network is needed, or the wheel in {folder}")
        found += folder.glob(pattern)
    return found


def only_sm_90(library: bytes) -> bytes:
    """The same with zeros for the code of other GPUs, and for PTX, in every fat binary."""
    kept, start = bytearray(library), 0
    while (start := library.find(struct.pack("<I", 0xBA55ED50), start)) >= 0:
        entries = list(_entries(library, start))
        for kind, architecture, begin, end in entries:
            if (kind, architecture) != (_MACHINE_CODE, 90):
                kept[begin:end] = bytes(end - begin)
        start = entries[-1][-1] if entries else start + 4
    return bytes(kept)


def _entries(library: bytes, start: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, begin and end of the code) of a fat binary's entries; none if it is something else."""
    version, header, size = struct.unpack_from("<HHQ", library[start : start + 16].ljust(16), 4)
    at, end, found = start + header, start + header + size, []
    if (version, header) != (1, 16) or end > len(library):
        return
    while at < end:
        if end - at < 32:
            return
        kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
        (architecture,) = struct.unpack_from("<I", library, at + 28)
        if kind not in (_PTX, _MACHINE_CODE):
            return
        found.append((kind, architecture, at + header, at + header + size))
        at += header + size
    yield from found


def fill(site: Path, pack: Pack, wheels: Iterable[Path]) -> None:
    """Put the files of a pack into `site`."""
    with tempfile.TemporaryDirectory() as scratch:
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(scratch)
        dropped = {path for pattern in pack.drop for path in Path(scratch).glob(pattern)}
        kept = {path for pattern in pack.keep for path in Path(scratch).glob(pattern) if path.is_file()} - dropped
        for path in kept:
            target = site / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    for library in site.rglob("*.so"):
        library.write_bytes(only_sm_90(library.read_bytes()))
    for name, source in pack.stubs.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(source.lstrip())


def write(name: str, out: Path, cache: Path, part: int) -> None:
    """The folder `out/name`, or several if it is larger than `part` MiB."""
    pack, folder = PACKS[name], out / name
    for old in out.glob(f"{name}*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        fill(Path(scratch), pack, fetch(pack.wheels, cache))
        command = f"tar -C {scratch} -c . | xz -9 -T0 | split -d -b {part}M - {folder / 'site.tar.xz.'}"
        subprocess.run(["sh", "-c", command], check=True)
    paths = ":".join(f"$site/{path}".removesuffix("/.") for path in pack.paths)
    exports = f'echo "export PYTHONPATH=\\"{paths}:\\$PYTHONPATH\\"" >>"$site/env.sh"\n'
    (folder / "install.sh").write_text(INSTALL + exports)
    for number, piece in enumerate(sorted(folder.glob("site.tar.xz.*"))[1:], start=2):
        (out / f"{name}{number}").mkdir()
        piece.rename(out / f"{name}{number}" / piece.name)
    for made in sorted(out.glob(f"{name}*")):
        print(f"{made}: {sum(path.stat().st_size for path in made.iterdir()) / 2**20:.1f} MiB")


def main() -> None:
    """Write the packs that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist/peers"))
    parser.add_argument("--only", nargs="+", choices=PACKS, default=list(PACKS), help="which packs")
    parser.add_argument("--wheels", type=Path, default=Path("dist/wheels"), help="where wheels are kept")
    parser.add_argument("--part", type=int, default=55, help="most MiB of a folder (55)")
    options = parser.parse_args()
    options.wheels.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        write(name, options.out, options.wheels, options.part)


if __name__ == "__main__":
    main()
