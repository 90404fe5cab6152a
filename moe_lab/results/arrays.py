"""Reading a `.npz` file of many small arrays: thousands of such files are read for the tables.

`np.load` spends most of its time on parsing the arrays' headers, which are the same in most files, and zipfile on
preparing to read in parts. Here each header is parsed once, and a member is taken in one piece.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from moe_lab.records import files

_LOCAL_HEADER = 30  # bytes, before the name and the extra field, whose lengths stand in its last four


class Arrays:
    """The arrays of a file's content, by name."""

    def __init__(self, content: bytes):
        """Raises `zipfile.BadZipFile` if it is not a zip archive, `ValueError` if the arrays are far too large."""
        self._content = content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.filelist}
        if sum(info.file_size for info in self._members.values()) > files.MOST_TEXT_BYTES:
            raise ValueError(f"unpacked larger than {files.MOST_TEXT_BYTES >> 20} MiB.")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """An array that cannot be written to.

        Raises `KeyError` if the file does not have it, and `ValueError` or an error of zipfile, zlib or numpy if it
        cannot be read.
        """
        data = self._bytes(self._members[name])
        if data[:8] != b"\x93NUMPY\x01\x00":
            raise ValueError(f"{name} is not an array.")
        start = 10 + int.from_bytes(data[8:10], "little")
        shape, is_fortran, kind = _header(data[8:start])
        array = np.frombuffer(data, kind, offset=start)  # a ValueError for Python objects: nothing is unpickled
        return array.reshape(shape, order="F" if is_fortran else "C")

    def _bytes(self, info: zipfile.ZipInfo) -> bytes:
        at = info.header_offset
        name, extra = (int.from_bytes(self._content[at + i : at + i + 2], "little") for i in (26, 28))
        start = at + _LOCAL_HEADER + name + extra
        data = self._content[start : start + info.compress_size]
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, info.file_size + 1)  # no more than it says
        elif info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{info.filename}: neither stored nor deflated.")
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename!r}")
        return data


@lru_cache(maxsize=1024)
def _header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return np.lib.format.read_array_header_1_0(io.BytesIO(header))
