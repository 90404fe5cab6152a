"""ops/cxx.py: a source file becomes a library once; what is wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx
from tests.conftest import needs_cxx

SOURCE = 'extern "C" int twice(int x) { return 2 * x; }\n'


@needs_cxx
def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source is another build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.cpp").write_text(SOURCE)
    assert cxx.library(tmp_path / "a.cpp").twice(21) == 42
    (built,) = (tmp_path / "cache" / "moe-lab" / "libraries").iterdir()
    stamp = built.stat().st_mtime_ns
    cxx.library.cache_clear()
    assert cxx.library(tmp_path / "a.cpp").twice(4) == 8 and built.stat().st_mtime_ns == stamp
    cxx.library.cache_clear()
    (tmp_path / "a.cpp").write_text(SOURCE.replace("2 *", "3 *"))
    assert cxx.library(tmp_path / "a.cpp").twice(21) == 63


@needs_cxx
def test_what_cannot_be_built_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not C++, a folder of somebody else, no compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.cpp").write_text("no C++")
    with pytest.raises(UnavailableError, match=r"a\.cpp does not compile: .*"):
        cxx.library(tmp_path / "a.cpp")
    (tmp_path / "a.cpp").write_text(SOURCE)
    (tmp_path / "cache" / "moe-lab" / "libraries").chmod(0o777)
    with pytest.raises(UnavailableError, match="can be written by others"):
        cxx.library(tmp_path / "a.cpp")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler found"):
        cxx.library(tmp_path / "a.cpp")
