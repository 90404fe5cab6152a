"""results/arrays.py: what numpy writes is read as numpy reads it, and damage is an error."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest

from moe_lab.results.arrays import Arrays

ARRAYS = {
    "floats": np.array([1.5, np.nan, -np.inf]),
    "cube": np.arange(24).reshape(2, 3, 4),
    "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "empty": np.empty((0, 3), np.float32),
    "number": np.array(7),
    "truth": np.array([True, False]),
}


def written(compressed: bool, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [pytest.param(True, id="deflated"), pytest.param(False, id="stored")])
def test_as_numpy(compressed: bool) -> None:
    """Values, shapes and types, in either order of memory."""
    read = Arrays(written(compressed, **ARRAYS))
    for name, array in ARRAYS.items():
        assert name in read and read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)
    assert "other" not in read
    with pytest.raises(KeyError):
        read["other"]


def test_nothing_is_unpickled() -> None:
    """An array of objects is a `ValueError`."""
    with pytest.raises(ValueError, match="OBJECT"):
        Arrays(written(False, bad=np.array([{}], object)))["bad"]


@pytest.mark.parametrize("compressed", [pytest.param(True, id="deflated"), pytest.param(False, id="stored")])
def test_a_changed_byte_is_noticed(compressed: bool) -> None:
    """In the data of the member; cut off, too."""
    whole = written(compressed, x=np.arange(100.0))
    at = whole.index(b"x.npy") + 60
    with pytest.raises(Exception, match=r"CRC|decompressing|distance|block|code"):
        Arrays(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])["x"]
    with pytest.raises(zipfile.BadZipFile):
        Arrays(whole[: len(whole) // 2])


def test_a_member_of_another_size_than_it_says() -> None:
    """It is not taken, and a foreign way to compress is named."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"0" * 100)
    with pytest.raises(zipfile.BadZipFile, match="neither stored nor deflated"):
        Arrays(buffer.getvalue())["x"]
    whole = written(False, x=np.arange(100.0))
    at = whole.rindex(b"PK\x01\x02") + 24  # the size in the directory
    with pytest.raises(zipfile.BadZipFile):
        Arrays(whole[:at] + (5).to_bytes(4, "little") + whole[at + 4 :])["x"]
