"""C++ that needs no torch: a source file becomes a shared library, built once per user and called through ctypes.

A build lies in `<cache>/moe-lab/libraries/<key>.so`; `<cache>` is XDG_CACHE_HOME or ~/.cache, and the key is a hash of
the source and the compiler. What somebody else could have put there is not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from moe_lab.errors import UnavailableError
from moe_lab.ops.own_files import make_own_folder, require_own

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where this user's builds lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-lab"


@cache
def library(source: Path) -> ctypes.CDLL:
    """The functions of a source file with `extern "C"`, built if they were not.

    Raises:
        UnavailableError: no compiler is found, it fails, or the folder is read-only or of another user.
    """
    compiler = find_cxx()
    if compiler is None:
        raise UnavailableError(f"{source.name}: no C++ compiler found (install g++ or clang++, or set $CXX)")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(source.read_bytes() + repr((compiler, said, _FLAGS, platform.machine())).encode()).hexdigest()
    target = cache_folder() / "libraries" / f"{source.stem}-{key[:16]}.so"
    require_own(target)
    if not target.exists():
        try:
            make_own_folder(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
                built = Path(folder) / target.name
                command = [compiler, *_FLAGS, str(source), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    last = " / ".join(done.stderr.strip().splitlines()[-3:])
                    raise UnavailableError(f"{source.name} does not compile: {last}")
                built.chmod(0o700)
                os.replace(built, target)  # two processes may build at once: each replaces the whole file
        except OSError as error:
            raise UnavailableError(f"{source.name} cannot be built in {target.parent}: {error}") from error
    return ctypes.CDLL(str(target))
