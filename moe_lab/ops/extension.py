"""The C++/CUDA extension of kernels/: built once per user, loaded once per process.

A build lies in `<cache>/moe-lab/extension/<key>/<architectures>.so`; `<cache>` is XDG_CACHE_HOME or ~/.cache, and the
key is a hash of the sources, the compilers and torch's version. A binary that names more architectures than this
machine's GPUs need serves too. Where no GPU is seen only the C++ half is built, which needs no nvcc. What somebody else
could have put there is not loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops.cxx import cache_folder, find_cxx
from moe_lab.ops.library import capability, library
from moe_lab.ops.own_files import make_own_folder, require_own

MOST_EXPERTS, MOST_K, MOST_GROUPS, MOST_GATE_TOKENS, FEW_EXPERTS = 1024, 32, 32, 32, 8  # as kernels/route.h says

# The sort of 1024 experts takes 156 KB of a block's shared memory. These have 99, which the sort of so many fits.
_SMALL, _FEWER_EXPERTS = {"86", "89", "120", "121"}, 512

log = logging.getLogger("moe_lab.extension")

OLDEST = "80"
"""The oldest architecture that the CUDA sources compile for."""
_CPP = (
    "ops_experts.cpp",
    "ops_route.cpp",
    "ops_decode.cpp",
    "ops.cpp",
    "route_cpu.cpp",
    "sinkhorn_cpu.cpp",
    "sort_cpu.cpp",
    "combine_cpu.cpp",
    "experts_cpu.cpp",
)
_CUDA = (
    "gate.cu",
    "gate_few_experts.cu",
    "norm_gate.cu",
    "route_by_logits.cu",
    "route_by_scores.cu",
    "sinkhorn.cu",
    "sort.cu",
    "combine.cu",
)
HOPPER, HOPPER_CAPABILITY = "90", (9, 0)
"""The architecture whose own instructions the kernels of the experts and of a decoding step use (as 90a)."""
_HOPPER = (
    "decode_attention.cu",
    "decode_attention_grouped.cu",
    "decode_gemv.cu",
    "decode_rows.cu",
    "experts.cu",
    "experts_one_token.cu",
    "experts_up_bf16.cu",
    "experts_up_fp16.cu",
    "experts_down_bf16.cu",
    "experts_down_fp16.cu",
)
# The functions of torch 2.11 and no newer ones: what is built under one version loads under the others.
_DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
_CXX_FLAGS = ("-O3", "-std=c++17", "-fPIC")
# libstdc++ by its file: a compiler that has a static one only would link that, and what one libstdc++ throws and
# torch's other catches ends the process.
_LIBRARIES = ("-ltorch_cpu", "-l:libstdc++.so.6")
_NVCC_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC")


class BuildError(UnavailableError):
    """The extension does not compile here."""


def sources() -> Path:
    """The folder of the sources, in a checkout and installed."""
    import moe_lab.kernels

    return Path(moe_lab.kernels.__path__[0])


def visible_architectures() -> tuple[str, ...]:
    """Those of the GPUs that torch sees, such as ("90",), each once."""
    if not torch.cuda.is_available():
        return ()
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))


def find_nvcc() -> str | None:
    """nvcc on the path, or of $CUDA_HOME, or of the usual folder."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (path for folder in folders if folder and (path := shutil.which("nvcc", path=f"{folder}/bin"))), None
    )


def cannot_build(architectures: tuple[str, ...]) -> str | None:
    """What is missing here to build for these architectures (none: the C++ half), or None."""
    if find_cxx() is None:
        return "no C++ compiler found (install g++ or clang++, or set $CXX)"
    if too_old := [name for name in architectures if int(name) < int(OLDEST)]:
        return f"the kernels need compute capability 8.0 or newer, not {', '.join(too_old)}"
    if architectures and find_nvcc() is None:
        return "nvcc not found (install the CUDA toolkit or set $CUDA_HOME)"
    return None


def require(device: torch.device) -> None:
    """Raise unless the extension can compute on `device`: it is built, or can be at first use.

    Raises:
        UnavailableError: a compiler is missing, or there are no kernels for this device.
        BuildError: an earlier build failed.
    """
    if device.type not in ("cpu", "cuda"):
        raise UnavailableError(f"the extension has no kernels for {device.type}")
    architectures = visible_architectures()
    if device.type == "cuda" and not architectures:
        raise UnavailableError("torch finds no CUDA device")
    require_own(built(architectures) or binary(architectures))
    halves = [architectures] if device.type == "cuda" else [architectures, ()]  # for a CPU the C++ half is enough
    missing = [cannot_build(half) for half in halves if built(half) is None]
    failures = [failure(half) for half in halves if built(half) is None]
    if len(missing) < len(halves) or any(m is None and f is None for m, f in zip(missing, failures, strict=True)):
        return
    if failures[-1] is not None:
        raise BuildError(failures[-1])
    raise UnavailableError(str(missing[-1]))


def why_unavailable(device: torch.device) -> str | None:
    """Why the extension cannot compute on `device`; None: it can (`require`)."""
    try:
        require(device)
    except UnavailableError as error:
        return str(error)
    return None


def is_built(device: torch.device) -> bool:
    """Whether a build that computes on `device` is there already."""
    architectures = visible_architectures()
    return built(architectures) is not None or (device.type != "cuda" and built(()) is not None)


def failure(architectures: tuple[str, ...]) -> str | None:
    """Why an earlier build for these architectures failed, with these sources and compilers; None: it did not."""
    marker = binary(architectures).with_suffix(".failed")
    return marker.read_text() if marker.exists() else None


def label(device: torch.device) -> str:
    """Who computes on `device`, for the record: `cuda_ext:cpp`, or `cuda_ext:sm_90`."""
    if device.type != "cuda":
        return "cuda_ext:cpp"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda_ext:sm_{major}{minor}"


def binary(architectures: tuple[str, ...]) -> Path:
    """Where the build for these architectures lies, whether it was made or not."""
    return (
        cache_folder()
        / "extension"
        / _key(find_cxx(), find_nvcc() if architectures else None)
        / f"{'-'.join(architectures) or 'cpu'}.so"
    )


def built(architectures: tuple[str, ...]) -> Path | None:
    """A build that serves these architectures, if there is one."""
    exact = binary(architectures)
    if exact.exists():
        return exact
    wanted = set(architectures)
    others = sorted(exact.parent.glob("*.so")) if wanted else []
    return next((path for path in others if wanted <= set(path.stem.split("-"))), None)


def build(architectures: tuple[str, ...], *, again: bool = False) -> Path:
    """Compile for these architectures unless a build for them exists; one process at a time.

    A build that failed before is not tried again, unless `again`.

    Raises:
        UnavailableError: a compiler is missing, or the folder cannot be written.
        BuildError: a compiler failed (its last lines, and the path of its full output).
    """
    if (missing := cannot_build(architectures)) is not None:
        raise UnavailableError(f"the extension cannot be built: {missing}")
    target = binary(architectures)
    require_own(target)
    try:
        make_own_folder(target.parent)
        with FileLock(target.with_suffix(".lock")):
            if (existing := built(architectures)) is not None:
                return existing
            marker = target.with_suffix(".failed")
            if again:
                marker.unlink(missing_ok=True)
            if (reason := failure(architectures)) is not None:
                raise BuildError(reason)
            halves = f"C++, CUDA for sm_{', sm_'.join(architectures)}" if architectures else "C++"
            log.warning("building the extension (%s); this takes about a minute and is done once", halves)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
                try:
                    compiled = _compile(Path(folder), architectures, target.with_suffix(".log"))
                except BuildError as error:
                    marker.write_text(str(error))
                    raise
                compiled.chmod(0o700)
                os.replace(compiled, target)  # a reader sees all of it or none
    except OSError as error:
        raise UnavailableError(f"the extension cannot be built in {target.parent}: {error}") from error
    return target


def _compile(folder: Path, architectures: tuple[str, ...], log_file: Path) -> Path:
    torch_folder = Path(torch.__path__[0])
    cxx, nvcc = find_cxx(), find_nvcc()
    assert cxx is not None
    include = (f"-I{torch_folder / 'include'}", *_DEFINES)
    commands = {name: [cxx, *_CXX_FLAGS, *include] for name in _CPP}
    if architectures:
        assert nvcc is not None
        newest = max(architectures, key=int)
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # what is newer compiles this at start
        for_cuda = [nvcc, *_NVCC_FLAGS, f"-ccbin={cxx}"]
        defines, for_hopper = ["-DMOE_LAB_CUDA"], {}
        if HOPPER in architectures:
            defines.append("-DMOE_LAB_HOPPER")
            for_hopper = {name: [*for_cuda, f"-gencode=arch=compute_{HOPPER}a,code=sm_{HOPPER}a"] for name in _HOPPER}
        # nvcc knows where its headers are, and hands C++ sources on. What takes longest begins first.
        commands = (
            for_hopper
            | {name: [*for_cuda, *targets] for name in _CUDA}
            | {name: [*for_cuda, *defines, *include] for name in _CPP}
        )
    objects = [str(folder / f"{name}.o") for name in commands]

    def compile_one(item: tuple[str, list[str]]) -> None:
        name, command = item
        _run([*command, "-c", str(sources() / name), "-o", str(folder / f"{name}.o")], log_file)

    log_file.unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, commands.items()))
    library_path = folder / "moe_lab.so"
    linked = ["-shared", *objects, "-o", str(library_path), f"-L{torch_folder / 'lib'}", *_LIBRARIES]
    if architectures:
        linked = [str(nvcc), f"-ccbin={cxx}", "-cudart=static", *linked]
    _run(linked if architectures else [cxx, *linked], log_file)
    return library_path


def _run(command: list[str], log_file: Path) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    output = (process.stdout + process.stderr).strip()
    with log_file.open("a") as file:
        file.write(f"{' '.join(command)}\n{output}\n")
    if "wgmma.mma_async instructions are serialized" in output:  # a warning of ptxas: a fifth of the speed
        raise BuildError(
            "the extension would be slow as this nvcc compiles it: products wait for each other "
            f"(full output: {log_file}); install another CUDA toolkit, then run `moe-lab build`"
        )
    if process.returncode:
        last = " / ".join(output.splitlines()[-3:])
        raise BuildError(
            f"the extension does not compile: {last} (full output: {log_file}); run `moe-lab build` to try again"
        )


@cache
def _key(*compilers: str | None) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(sources().glob("*")):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    for compiler in compilers:
        if compiler is not None:
            said = subprocess.run([compiler, "--version"], capture_output=True, text=True)
            digest.update(compiler.encode() + said.stdout.encode())
    digest.update(repr((platform.machine(), _DEFINES, _CXX_FLAGS, _NVCC_FLAGS, _LIBRARIES)).encode())
    return digest.hexdigest()[:16]


_loading = threading.Lock()
_most_sorted = 0
"""Experts that `sort` takes on every GPU here; 0 until the CUDA half is loaded."""


def load_if_built(device: torch.device) -> None:
    """Load it where a build for `device`, a GPU, is there: `computes` and `sorts` say so from then on."""
    if device.type == "cuda" and is_built(device) and why_unavailable(device) is None:
        load()


def computes(device: torch.device) -> bool:
    """Whether it is loaded and `device` a GPU; each pass asks, so nothing is looked for, built or loaded."""
    return _most_sorted > 0 and device.type == "cuda"


def has_hopper_kernels(device: torch.device) -> bool:
    """As `computes`, of the kernels that are built for Hopper alone."""
    return computes(device) and capability(device) == HOPPER_CAPABILITY


def sorts(device: torch.device, n_experts: int) -> bool:
    """As `computes`, for the op `sort` of so many experts."""
    return n_experts <= _most_sorted and device.type == "cuda"


def load() -> tuple[str, ...]:
    """Build what this machine needs, load it, and return the architectures of its CUDA half (none: there is none).

    Raises:
        UnavailableError: see `build`.
    """
    with _loading:  # once, also of several threads
        return _load()


@cache
def _load() -> tuple[str, ...]:
    global _most_sorted
    architectures = visible_architectures()
    if built(architectures) is None and (cannot_build(architectures) or failure(architectures)) is not None:
        architectures = ()
    path = built(architectures) or build(architectures)
    require_own(path)
    torch.ops.load_library(str(path))
    torch.library.register_fake("moe_lab::route", fake_route, lib=library)
    torch.library.register_fake("moe_lab::route_and_sort", _fake_route_and_sort, lib=library)
    torch.library.register_fake("moe_lab::gate_route", _fake_gate_route, lib=library)
    torch.library.register_fake("moe_lab::norm_gate_route", _fake_norm_gate_route, lib=library)
    torch.library.register_fake("moe_lab::sinkhorn_route", fake_sinkhorn_route, lib=library)
    torch.library.register_fake("moe_lab::sort", _fake_sort, lib=library)
    torch.library.register_fake("moe_lab::combine", _fake_combine, lib=library)
    torch.library.register_fake("moe_lab::experts", _fake_experts, lib=library)
    if architectures:
        _most_sorted = _FEWER_EXPERTS if _SMALL.intersection(architectures) else MOST_EXPERTS
    return architectures


def readable(logits: Tensor) -> Tensor:
    """Logits [T, E] as the kernels read them, loaded if they were not."""
    if not torch.compiler.is_compiling():  # a router has loaded the extension as it was made
        load()
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        logits = logits.float()
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        logits = logits.contiguous()
    return logits


def fake_route(logits: Tensor, gate_bias: Tensor | None, bias: Tensor | None, k: int, *_: object) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _fake_route_and_sort(
    logits: Tensor, gate_bias: Tensor | None, bias: Tensor | None, k: int, *rest: object
) -> tuple[Tensor, ...]:
    T, E = logits.shape
    sizes = (E, E + 1, T * k, T * k)
    return (
        *fake_route(logits, gate_bias, bias, k, *rest),
        *(logits.new_empty(size, dtype=torch.int32) for size in sizes),
    )


def _fake_gate_route(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, bias: Tensor | None, k: int, *rest: object
) -> tuple[Tensor, ...]:
    return fake_route(x, gate_bias, bias, k, *rest)


def _fake_norm_gate_route(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    k: int,
    *rest: object,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *fake_route(x, gate_bias, bias, k, *rest)


def fake_sinkhorn_route(logits: Tensor, k: int, *_: object) -> tuple[Tensor, ...]:
    return *fake_route(logits, None, None, k), logits.new_empty(logits.shape[1], dtype=torch.float32)


def _fake_sort(ids: Tensor, n_experts: int) -> tuple[Tensor, ...]:
    sizes = (n_experts, n_experts + 1, ids.numel(), ids.numel())
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def _fake_combine(o: Tensor, inverse: Tensor | None, ids: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    return o.new_empty((ids.shape[0], o.shape[-1]), dtype=dtype)


def _fake_experts(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
