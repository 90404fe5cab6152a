"""records/store.py: a file is the old one or the whole new one, never half of it."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.records import store
from moe_lab.records.schema import Record
from moe_lab.records.store import RESULT, read_record, write_arrays, write_atomic, write_record
from tests import tiny

NUMBERS = st.floats() | st.integers(-9, 9) | st.none() | st.booleans() | st.text(max_size=5)
NESTED = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        NUMBERS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
WRITER = """
import sys
from pathlib import Path
from moe_lab.records.schema import Record
from moe_lab.records.store import write_record

folder, count = Path(sys.argv[1]), 0
while True:
    count += 1
    words = [f"{count}"] * (2000 * (1 + count % 7))
    write_record(folder, Record(status="ok", cell_id=str(count), code_id=str(len(words)), warnings=words))
"""
LIMITED = """
import resource, signal, sys
from pathlib import Path
from moe_lab.records.store import write_atomic

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), b"new" * 1000)
except OSError as error:
    print(type(error).__name__)
"""


def null_if_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [null_if_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def no_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every field, and where it was found."""
    written = tiny.record(tiny.decoder_moe(), name="näme", warnings=["a\nb", "路"], overrides=["batch=2"])
    assert write_record(tmp_path, written) == tmp_path / RESULT
    read = read_record(tmp_path)
    assert read.directory == str(tmp_path)
    read.directory = None
    assert read == written


@settings(max_examples=40, deadline=None)
@given(content=NESTED)
def test_what_is_not_finite_is_null_at_any_depth_and_all_else_unchanged(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    """The file is JSON in the strict sense: no NaN, no Infinity."""
    folder = tmp_path_factory.mktemp("record")
    write_record(folder, tiny.record(quality=content))
    json.loads((folder / RESULT).read_text(), parse_constant=no_constant)
    assert read_record(folder).quality == null_if_not_finite(content)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(math.nan, id="nan"),
        pytest.param(math.inf, id="inf"),
        pytest.param(-math.inf, id="minus_inf"),
        pytest.param(np.float64("nan"), id="numpy_nan"),
    ],
)
def test_nan_and_inf_become_null(tmp_path: Path, value: float) -> None:
    """In a dictionary, a list and a tuple."""
    write_record(tmp_path, tiny.record(roofline={"a": value, "b": [value, (value, 1.5)]}))
    assert read_record(tmp_path).roofline == {"a": None, "b": [None, [None, 1.5]]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{}", id="no_fields"),
        pytest.param(b"[]", id="a_list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe{", id="not_utf8"),
        pytest.param(b'{"schema": 99}', id="unknown_schema"),
        pytest.param(b'{"schema": 1, "status": "ok"}', id="missing_field"),
        pytest.param(b'{"schema": 1, "latency_ms": 3}', id="latency_is_a_number"),
        pytest.param(b"PK\x03\x04", id="another_kind_of_file"),
    ],
)
def test_what_is_no_record_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    """Never dropped in silence, never taken for a result."""
    (tmp_path / RESULT).write_bytes(content)
    with pytest.raises(ValueError, match=RESULT) as caught:
        read_record(tmp_path)
    assert str(tmp_path / RESULT) in str(caught.value)


def test_a_record_cut_off_anywhere_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Each of a hundred prefixes of a true record."""
    path = write_record(tmp_path, tiny.record(tiny.decoder_moe()))
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=RESULT):
            read_record(tmp_path)


def test_a_folder_without_a_record_is_an_os_error(tmp_path: Path) -> None:
    """A missing file is not a broken one."""
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        pytest.param("replace", OSError("planted"), id="rename_fails"),
        pytest.param("fsync", OSError("planted"), id="disk_full_on_flush"),
        pytest.param("replace", KeyboardInterrupt(), id="ctrl_c_before_rename"),
        pytest.param("fsync", KeyboardInterrupt(), id="ctrl_c_on_flush"),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    """No half file, no temporary."""
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(store.os, function, failing(error))
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_first_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no result stands, none has to be read."""
    monkeypatch.setattr(store.os, "replace", failing(OSError("planted")))
    with pytest.raises(OSError, match="planted"):
        write_record(tmp_path, tiny.record())
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
def test_a_file_over_the_size_limit_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    """The system call itself fails in the middle of the content, as on a full disk."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0
    path = tmp_path / "file"
    write_atomic(path, b"old")
    assert tiny.python(LIMITED, path).strip() == "OSError"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in read-only folders too")
def test_a_read_only_folder_keeps_its_old_file(tmp_path: Path) -> None:
    """The error is the system's."""
    path = tmp_path / "file"
    write_atomic(path, b"old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            write_atomic(path, b"new")
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_record_that_is_not_json_leaves_the_old_one(tmp_path: Path) -> None:
    """Nothing is opened before the whole content is there."""
    write_record(tmp_path, tiny.record(name="old"))
    with pytest.raises(TypeError):
        write_record(tmp_path, tiny.record(name="new", quality={"tensor": object()}))
    assert read_record(tmp_path).name == "old"
    assert os.listdir(tmp_path) == [RESULT]


def test_a_writer_killed_at_any_moment_leaves_a_whole_record(tmp_path: Path) -> None:
    """kill -9, five times, at moments that differ; the record belongs together."""
    for kill in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        try:
            deadline = time.monotonic() + 60
            before = read_record(tmp_path).cell_id if kill else None
            while not (tmp_path / RESULT).exists() or read_record(tmp_path).cell_id == before:
                assert writer.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(0.0137 * kill)
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        record = read_record(tmp_path)
        assert len(record.warnings) == int(record.code_id)
        assert set(record.warnings) == {record.cell_id}


def test_a_reader_beside_a_writer_never_sees_half_a_record(tmp_path: Path) -> None:
    """Three hundred looks while another process writes without pause."""
    write_record(tmp_path, tiny.record(cell_id="0", code_id="0"))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while read_record(tmp_path).cell_id == "0":
            assert writer.poll() is None and time.monotonic() < deadline
        seen = [read_record(tmp_path) for _ in range(300)]
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert all(len(record.warnings) == int(record.code_id) for record in seen)


def test_a_leftover_temporary_is_no_result(tmp_path: Path) -> None:
    """What a killed writer leaves is not taken for a record by those who look for one."""
    write_record(tmp_path, tiny.record())
    (tmp_path / f".{RESULT}.123.tmp").write_text('{"schema"')
    assert [path.name for path in tmp_path.rglob(RESULT)] == [RESULT]
    assert read_record(tmp_path).status == "ok"


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(7, dtype=np.float64) / 3, id="float64"),
        pytest.param(np.arange(6, dtype=np.int64).reshape(2, 3), id="int64_2d"),
        pytest.param(np.empty(0), id="empty"),
        pytest.param(np.array(3.5), id="scalar"),
        pytest.param(np.array([np.nan, np.inf, -0.0]), id="not_finite"),
        pytest.param(np.array([True, False]), id="bool"),
    ],
)
def test_arrays_are_read_as_they_were_written(tmp_path: Path, array: np.ndarray) -> None:
    """Bits, shape and dtype, without pickle."""
    path = tmp_path / "samples.npz"
    write_arrays(path, {"ms": array, "round": np.array([1])})
    with np.load(path, allow_pickle=False) as content:
        assert set(content.files) == {"ms", "round"}
        assert content["ms"].dtype == array.dtype and content["ms"].shape == array.shape
        assert content["ms"].tobytes() == array.tobytes()


def test_arrays_that_cannot_be_written_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """samples.npz is as whole as result.json."""
    path = tmp_path / "samples.npz"
    write_arrays(path, {"ms": np.ones(3)})
    monkeypatch.setattr(store.os, "replace", failing(OSError("planted")))
    with pytest.raises(OSError, match="planted"):
        write_arrays(path, {"ms": np.zeros(5)})
    with np.load(path) as content:
        assert content["ms"].tolist() == [1.0, 1.0, 1.0]
    assert os.listdir(tmp_path) == ["samples.npz"]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        pytest.param({}, True, id="ok: to be looked at anew"),
        pytest.param({"status": "failed"}, False, id="failed: nothing to keep"),
        pytest.param({"status": "failed", "code_id": "2" * 12}, True, id="of other code"),
    ],
)
def test_a_result_that_is_to_be_replaced_is_kept_if_it_says_something(
    tmp_path: Path, change: dict[str, Any], kept: bool
) -> None:
    """With its samples; a second one of the same code and machine has a name of its own."""
    for number in (1, 2):
        record = tiny.record(env_id="3" * 12, name=f"run {number}", **change)
        write_record(tmp_path, record)
        write_arrays(tmp_path / "samples.npz", {"ms": np.array([float(number)])})
        store.set_aside_stale(tmp_path, record.cell_id, "1" * 12, record.env_id)
        assert (tmp_path / RESULT).exists() != kept
    stale = sorted(tmp_path.glob("stale-*.result.json"), key=lambda path: len(path.name))
    assert [json.loads(path.read_text())["name"] for path in stale] == (["run 1", "run 2"] if kept else [])
    for number, path in enumerate(stale, 1):
        with np.load(path.with_name(path.name.replace(RESULT, "samples.npz"))) as arrays:
            assert arrays["ms"].tolist() == [number]


def test_a_half_of_a_pair_of_surrogates_is_escaped(tmp_path: Path) -> None:
    """It may come from a file's name; UTF-8 has none."""
    write_record(tmp_path, Record(status="failed", reason="error: \ud800", cell_id="c" * 12, code_id="d"))
    assert read_record(tmp_path).reason == "error: \\ud800"


def test_a_folder_in_the_place_of_a_file_is_set_aside(tmp_path: Path) -> None:
    """With what is in it."""
    (tmp_path / "a.json" / "b").mkdir(parents=True)
    write_atomic(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}" and (tmp_path / "a.unreadable.json" / "b").is_dir()


def test_what_is_written_follows_no_link(tmp_path: Path) -> None:
    """In the place of a file, of its temporary one, of a log and of a folder."""
    (tmp_path / "victim").mkdir()
    victim = tmp_path / "victim" / "file"
    victim.write_text("precious")
    for name in ("x.json", f".x.json.{os.getpid()}.tmp", "run.log", "new.log"):
        (tmp_path / name).symlink_to(victim if name != "new.log" else tmp_path / "victim" / "new")
    (tmp_path / "plots").symlink_to(tmp_path / "victim")
    write_atomic(tmp_path / "x.json", b"mine")
    assert (tmp_path / "x.json").read_text() == "mine" and not (tmp_path / "x.json").is_symlink()
    for name in ("run.log", "new.log"):
        with pytest.raises(OSError, match=f"{name}: is a link"):
            store.LogFile(tmp_path / name)
        with pytest.raises(OSError, match="is a link"):
            store.open_to_append(tmp_path / name)
    with pytest.raises(OSError, match=r"plots: is a link.*remove it"):
        store.own_folder(tmp_path / "plots")
    assert victim.read_text() == "precious" and [path.name for path in victim.parent.iterdir()] == ["file"]


def test_a_log_is_written_at_its_end_or_anew(tmp_path: Path) -> None:
    """As logging's own."""
    for mode, content in (("a", "ab"), ("a", "abab"), ("w", "ab")):
        handler = store.LogFile(tmp_path / "log", mode=mode, encoding="utf-8")
        handler.stream.write("ab")
        handler.close()
        assert (tmp_path / "log").read_text() == content
