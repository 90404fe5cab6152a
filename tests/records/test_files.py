"""records/files.py: every reader of the product meets every kind of odd file, and does not hang."""

from __future__ import annotations

import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_lab.cli import export as cli_export
from moe_lab.cli import listing
from moe_lab.export import pair
from moe_lab.models import checkpoint_config, checkpoint_weights
from moe_lab.records import files, inputs, store
from moe_lab.results import aggregate, coactivation, compare, load, noise
from moe_lab.sweep import plan as planning
from moe_lab.sweep.capped_log import CappedLog
from moe_lab.sweep.lock import Lock
from moe_lab.workloads import forced, text
from tests import odd, quick, tiny

EVERY = [pytest.param(kind, id=kind) for kind in odd.KINDS]
_QUICK = {"folder-with-a-file", "pipe", "link-to-zero", "broken-link", "link-to-itself", "not-utf-8", "deep", "half"}
SOME = [pytest.param(kind, id=kind, marks=() if kind in _QUICK else pytest.mark.slow) for kind in odd.KINDS]
GONE = {"broken-link"}  # as if it were not there


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("the reader hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_sweep(folder: Path) -> Path:
    """Two records; returns the folder of the first."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        store.write_record(folder / name, tiny.record(tiny.decoder_moe(), cell_id=name * 12))
    return folder / "a"


@pytest.mark.parametrize("kind", SOME)
def test_a_record(kind: str, tmp_path: Path) -> None:
    """It is no record, is set aside whole, the other one is still read, and a new one takes its place."""
    cell = a_sweep(tmp_path)
    odd.put(kind, cell / store.RESULT)
    with pytest.raises(FileNotFoundError if kind in GONE else ValueError, match=r"result\.json"):
        store.read_record(cell)
    with pytest.raises(ValueError, match=rf"^unreadable records .*\n  {cell}/result\.json: "):
        load.load(tmp_path)
    tables = aggregate.aggregate(tmp_path)
    assert list(tables.runs["directory"]) == ["b"]
    assert list(tables.unreadable["path"]) == ["a/result.json"]
    rows = compare.compare(tmp_path, tmp_path)
    assert list(rows["verdict"][1:]) == ["unreadable in A", "unreadable in B"]
    aside = store.set_aside_unreadable(cell)
    store.write_record(cell, tiny.record(tiny.decoder_moe()))
    assert store.read_record(cell).status == "ok"
    if kind not in GONE:
        assert aside is not None and aside.name == "result.unreadable.json"
        odd.put(kind, cell / store.RESULT)
        again = store.set_aside_unreadable(cell)
        assert again is not None and again.name == "result.unreadable-2.json"
        assert len(list(cell.glob("result.unreadable*"))) == 2
        store.write_record(cell, tiny.record(tiny.decoder_moe()))
        listed = aggregate.aggregate(tmp_path).unreadable["path"]
        assert sorted(listed) == ["a/result.unreadable-2.json", "a/result.unreadable.json"]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in (store.SAMPLES, store.ROUTING)])
@pytest.mark.parametrize("kind", EVERY)
def test_arrays(kind: str, name: str, tmp_path: Path) -> None:
    """Listed as unreadable; the row of the record stays."""
    cell = a_sweep(tmp_path)
    odd.put(kind, cell / name)
    tables = aggregate.aggregate(tmp_path)
    assert len(tables.runs) == 2
    assert kind in ("broken-link", "link-to-itself") or list(tables.unreadable["path"]) == [f"a/{name}"]
    with pytest.raises((OSError, ValueError, zipfile.BadZipFile)):
        coactivation.read(cell / name)
    if name == store.ROUTING:
        inputs.trace_id(str(cell))
        with pytest.raises(ValueError, match=r"^workload\.trace="):
            forced._trace(str(cell), None, 2)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in (".aggregate.parquet", *aggregate.OUTPUTS)])
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("pipe", "link-to-zero", "empty", "socket")])
def test_the_tables_of_before(kind: str, name: str, tmp_path: Path) -> None:
    """They are made anew."""
    a_sweep(tmp_path)
    aggregate.aggregate(tmp_path)
    odd.put(kind, tmp_path / name)
    assert len(aggregate.aggregate(tmp_path).runs) == 2
    assert (tmp_path / name).is_file() and not (tmp_path / name).is_symlink()


@pytest.mark.parametrize("kind", SOME)
def test_a_plan(kind: str, tmp_path: Path) -> None:
    """A sweep that resumes writes a new one, and the tables do without."""
    a_sweep(tmp_path)
    odd.put(kind, tmp_path / store.PLAN)
    assert planning.read_commands(tmp_path) == []
    assert planning.read_statuses(tmp_path) == {}
    tables = aggregate.aggregate(tmp_path)
    assert len(tables.runs) == 2
    assert kind in GONE or list(tables.unreadable["path"]) == [store.PLAN]


READERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "config.json": ("config.json", checkpoint_config.read, r"config\.json"),
    "index": ("model.safetensors.index.json", checkpoint_weights.files, r"model\.safetensors"),
    "header": ("model.safetensors", lambda at: checkpoint_weights.headers([at / "model.safetensors"]), "safetensors"),
    "manifest": ("manifest.json", pair.read_manifest, "no export found"),
    "config.yaml": ("config.yaml", lambda at: cli_export.configuration(at, []), "not the folder of a run"),
}


@pytest.mark.parametrize("reader", [pytest.param(name, id=name) for name in READERS])
@pytest.mark.parametrize("kind", EVERY)
def test_other_files(kind: str, reader: str, tmp_path: Path) -> None:
    """One line that names the file."""
    name, read, says = READERS[reader]
    odd.put(kind, tmp_path / name)
    with pytest.raises(ValueError, match=says):
        read(tmp_path)


@pytest.mark.parametrize("kind", EVERY)
def test_a_tokenizer(kind: str, tmp_path: Path) -> None:
    """One line."""
    (tmp_path / "a.txt").write_text("some text")
    odd.put(kind, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        text.read_domains(str(tmp_path / "a.txt"), 1000, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in odd.KINDS if not kind.startswith("deep")])
def test_a_text(kind: str, tmp_path: Path) -> None:
    """What is text is a text; the rest is one line."""
    odd.put(kind, tmp_path / "a.txt")
    inputs.text_id(str(tmp_path / "a.txt"))
    if kind in ("nan", "1e999", "list", "half"):
        assert len(text.read_domains(str(tmp_path / "a.txt"), 256, None)) == 1
        return
    with pytest.raises(ValueError, match=r"^workload\.path"):
        text.read_domains(str(tmp_path / "a.txt"), 256, None)


@pytest.mark.parametrize("kind", EVERY)
def test_small_files_of_ours(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a lock, the noise floor, the comment of an option, the worker's log."""
    odd.put(kind, tmp_path / "s" / ".owner.json")
    if "folder" not in kind:
        Lock(tmp_path / "s").release()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    odd.put(kind, noise.noise_file("0" * 12))
    if kind in GONE:
        assert noise.read_floor("0" * 12) is None
    else:
        with pytest.warns(UserWarning, match="cannot read the noise floor"):
            assert noise.read_floor("0" * 12) is None
    odd.put(kind, tmp_path / "worker.log")
    if "link" in kind:
        with pytest.raises(OSError, match="is a link"):
            CappedLog(tmp_path / "worker.log")
        return
    with CappedLog(tmp_path / "worker.log") as log:
        pass
    log.join()
    assert (tmp_path / "worker.log").is_file()


def test_a_plain_file_is_read_and_its_limit_holds(tmp_path: Path) -> None:
    """To the byte, through a link, and where its size is not what its status says."""
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert files.read_bytes(tmp_path / "b", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 0 MiB"):
        files.read_bytes(tmp_path / "a", 4)
    with pytest.raises(OSError, match="larger than 0 MiB"):
        files.read_bytes("/proc/self/maps", 10)
    with pytest.raises(OSError, match="not a plain file but a folder"):
        files.read_bytes(tmp_path)


def test_packed_arrays_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of zeros takes a kilobyte in the file: what it unpacks to counts."""
    np.savez_compressed(
        tmp_path / "routing.npz", coactivation_LEE=np.zeros((1, 500, 500), np.int64), layer=np.zeros(1, int)
    )
    assert coactivation.read(tmp_path / "routing.npz") is not None
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 1 << 20)
    assert (tmp_path / "routing.npz").stat().st_size < 1 << 15
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        coactivation.read(tmp_path / "routing.npz")


def test_an_option_of_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """A pipe among the options is one line."""
    odd.put("pipe", tmp_path / "router" / "x.yaml")
    with pytest.raises(OSError, match="not a plain file but a named pipe"):
        listing.show(["router"], str(tmp_path))


def test_a_checkpoint_is_still_read(tmp_path: Path) -> None:
    """The tiny one, by its own files."""
    shutil.copytree(quick.TINY_OLMOE, tmp_path / "a")
    assert checkpoint_config.read(tmp_path / "a").decoder["n_layers"] > 0
    assert checkpoint_weights.headers(checkpoint_weights.files(tmp_path / "a"))
