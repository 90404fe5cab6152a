"""records/inputs.py: which files a path means, and a hash of what they hold."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lab.records import inputs
from moe_lab.records.inputs import checkpoint_id, text_files, text_id, trace_id
from moe_lab.records.store import ROUTING, write_arrays
from tests import tiny

MIB = 1 << 20
WEIGHTS = "model.safetensors"
SECONDS = itertools.count(1)


def files(folder: Path, **contents: str | bytes) -> Path:
    """A folder with these files; in a name, `__` stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def is_id(found: Any) -> bool:
    return isinstance(found, str) and re.fullmatch("[0-9a-f]{12}", found) is not None


# Which files


def test_a_folder_means_the_texts_directly_in_it_by_name(tmp_path: Path) -> None:
    """*.txt and *.md but for the one about them, in order; neither other files nor folders, whatever their names."""
    folder = files(tmp_path / "t", b__md="b", a__txt="a", c__TXT="c", README__md="about", readme__MD="", d__json="{}")
    (folder / "e.txt").mkdir()
    files(folder / "deep", f__txt="f")
    assert text_files(str(folder)) == [folder / "a.txt", folder / "b.md"]


def test_a_file_means_itself_whatever_its_suffix(tmp_path: Path) -> None:
    """Also a README, where somebody asks for it."""
    folder = files(tmp_path, code__py="x", README__md="about")
    for name in ("code.py", "README.md"):
        assert text_files(str(folder / name)) == [folder / name]


def test_a_list_is_taken_in_its_order(tmp_path: Path) -> None:
    """Files and folders mixed."""
    folder, single = files(tmp_path / "t", a__txt="a", b__txt="b"), files(tmp_path, z__rst="z") / "z.rst"
    assert text_files([str(single), str(folder)]) == [single, folder / "a.txt", folder / "b.txt"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        pytest.param("nowhere", "file or folder not found; give a text", id="missing"),
        pytest.param("empty", r"no texts in .* \(\*\.txt or \*\.md, README\.md does not count\); add a", id="no_texts"),
        pytest.param(["some.txt", "nowhere"], "nowhere: file or folder not found", id="one_of_several"),
    ],
)
def test_what_is_not_there_is_a_mistake(path: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the path and how to fix it."""
    files(tmp_path, some__txt="x")
    files(tmp_path / "empty", README__md="about")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^workload\.path=.*{text}") as raised:
        text_files(path)
    assert "\n" not in str(raised.value)


# Texts


def test_texts_are_who_they_are_wherever_they_lie(tmp_path: Path) -> None:
    """Moved, copied with new time stamps, named as a folder or one by one, absolutely or not."""
    folder = files(tmp_path / "here", a__txt="one", b__md="two")
    found = text_id(str(folder))
    assert is_id(found)
    copy = shutil.copytree(folder, tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(copy / "a.txt", (1, 1))
    assert text_id(str(copy)) == found
    assert text_id([str(folder / "a.txt"), str(folder / "b.md")]) == found
    assert text_id(os.path.relpath(folder)) == found
    (tmp_path / "link").symlink_to(folder)
    assert text_id(str(tmp_path / "link")) == found


def _grow(path: Path, content: bytes) -> None:
    """Other content, and a time stamp that says so (a file may be rewritten within the clock's resolution)."""
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: _grow(folder / "a.txt", b"onE"), id="a_letter"),
        pytest.param(lambda folder: _grow(folder / "a.txt", b"one "), id="longer"),
        pytest.param(lambda folder: (folder / "a.txt").rename(folder / "c.txt"), id="renamed"),
        pytest.param(lambda folder: files(folder, c__txt=""), id="one_more_empty"),
        pytest.param(lambda folder: (folder / "b.md").unlink(), id="one_less"),
        pytest.param(lambda folder: (_grow(folder / "a.txt", b"on"), _grow(folder / "b.md", b"etwo")), id="moved_byte"),
    ],
)
def test_other_texts_are_others(change: Callable[[Path], Any], tmp_path: Path) -> None:
    """Also right after they were looked at: a name or a byte."""
    folder = files(tmp_path, a__txt="one", b__md="two")
    before = text_id(str(folder))
    change(folder)
    assert is_id(text_id(str(folder)))
    assert text_id(str(folder)) != before


def test_the_order_in_a_list_tells_texts_apart(tmp_path: Path) -> None:
    """Windows take turns in it."""
    folder = files(tmp_path, a__txt="one", b__txt="two")
    one, other = str(folder / "a.txt"), str(folder / "b.txt")
    assert text_id([one, other]) != text_id([other, one])


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("nowhere", id="missing"),
        pytest.param(["nowhere", "neither"], id="several"),
        pytest.param("", id="empty"),
        pytest.param("???", id="not_given"),
        pytest.param(7, id="number"),
        pytest.param([7], id="number_in_a_list"),
        pytest.param({"a": 1}, id="mapping"),
    ],
)
def test_what_is_no_text_is_its_own_name(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking who a cell is never fails; building it will."""
    monkeypatch.chdir(files(tmp_path, README__md="no text"))
    assert text_id(path) == path


# Checkpoints and recordings


def checkpoint(folder: Path, weights: bytes = b"weights") -> Path:
    return files(folder, config__json="{}", tokenizer__json="[]", model__safetensors=weights)


def test_a_checkpoint_is_who_it_is_wherever_it_lies(tmp_path: Path) -> None:
    """Files that are not read change nothing."""
    found = checkpoint_id(str(checkpoint(tmp_path / "a")))
    assert is_id(found)
    assert checkpoint_id(str(checkpoint(tmp_path / "deep" / "b"))) == found
    files(tmp_path / "a", README__md="about", training__json="{}", pytorch_model__bin="x", vocab__txt="a")
    assert checkpoint_id(str(tmp_path / "a") + "/") == found


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", WEIGHTS, "model.safetensors.index.json", "more.safetensors"]
)
def test_whatever_of_a_checkpoint_is_read_is_part_of_it(name: str, tmp_path: Path) -> None:
    """Each file, its being there and its bytes."""
    folder = checkpoint(tmp_path)
    found = {checkpoint_id(str(folder))}
    for content in (b"{ }", b"{  ", b"{   }"):
        _grow(files(folder, **{name.replace(".", "__"): b""}) / name, content)
        found.add(checkpoint_id(str(folder)))
    (folder / name).unlink()
    found.add(checkpoint_id(str(folder)))
    assert len(found) == 4 + (name in ("config.json", "tokenizer.json", WEIGHTS))
    assert all(map(is_id, found))


def test_a_folder_that_is_no_checkpoint_is_its_own_name(tmp_path: Path) -> None:
    """There is none, it is empty, or it has other files."""
    for path in (tmp_path / "nowhere", files(tmp_path / "empty"), files(tmp_path / "other", a__bin="x")):
        assert checkpoint_id(str(path)) == str(path)


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    """As in the cache of Hugging Face, where names of folders are hashes."""
    real = checkpoint(tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        (linked / name).symlink_to((real / name).rename(real / f"hash-of-{name}"))
    assert checkpoint_id(str(linked)) == checkpoint_id(str(checkpoint(tmp_path / "plain")))
    (real / "hash-of-model.safetensors").unlink()
    assert is_id(checkpoint_id(str(linked)))  # a link to nowhere is no file


def sparse(path: Path, size: int, at: int | None = None) -> Path:
    """A file of zeros but for one byte, which takes no room on the disk; its time stamp is its own."""
    with path.open("wb") as stream:
        stream.truncate(size)
        if at is not None:
            stream.seek(at)
            stream.write(b"\x01")
    os.utime(path, ns=(0, 10**9 * next(SECONDS)))
    return path


@pytest.mark.parametrize("size", [pytest.param(16 * MIB, id="16MiB"), pytest.param(5, id="5")])
def test_up_to_16_mib_every_byte_counts(size: int, tmp_path: Path) -> None:
    """The first, the last, and any between."""
    folder = checkpoint(tmp_path)
    found = set()
    for at in (None, 0, 1, size // 3, size - 1):
        sparse(folder / WEIGHTS, size, at)
        found.add(checkpoint_id(str(folder)))
    assert len(found) == 4 + (size // 3 != 1)


def test_beyond_16_mib_the_size_and_the_probed_places_count(tmp_path: Path) -> None:
    """64 places of 64 KiB from the first byte to the last; a byte between them goes unseen, as is said."""
    folder, size = checkpoint(tmp_path), 1000 * MIB + 7
    starts = [probe * (size - 65536) // 63 for probe in range(64)]
    seen = [0, 65535, starts[1], starts[31] + 100, starts[62] + 65535, starts[63], size - 1]
    found = set()
    for at in (None, *seen):
        sparse(folder / WEIGHTS, size, at)
        found.add(checkpoint_id(str(folder)))
    assert len(found) == 1 + len(seen)
    sparse(folder / WEIGHTS, size, 65536)
    assert checkpoint_id(str(folder)) in found
    sparse(folder / WEIGHTS, size + 1)
    assert checkpoint_id(str(folder)) not in found


def test_a_file_is_read_once_for_each_of_its_stamps(tmp_path: Path) -> None:
    """Every cell of a sweep asks; another time or size is read anew."""
    folder = checkpoint(tmp_path)
    checkpoint_id(str(folder))
    before = inputs._content.cache_info().misses
    for _ in range(5):
        checkpoint_id(str(folder))
    assert inputs._content.cache_info().misses == before
    _grow(folder / WEIGHTS, b"weightS")
    checkpoint_id(str(folder))
    assert inputs._content.cache_info().misses == before + 1


def test_a_recording_is_who_it_is_wherever_it_lies(tmp_path: Path) -> None:
    """By its array file alone; where there is none, by its folder."""
    for name, ids in (("a", [0, 1]), ("b", [0, 1]), ("c", [1, 0])):
        write_arrays(files(tmp_path / name, result__json=name) / ROUTING, {"expert_ids_LTK": np.array([[ids]])})
    a, b, c = (trace_id(str(tmp_path / name)) for name in "abc")
    assert is_id(a) and a == b != c
    assert trace_id(str(tmp_path)) == str(tmp_path)


def test_a_trace_is_who_it_is_whatever_its_name(tmp_path: Path) -> None:
    """In a run's folder or beside it; an older run's recording counts where there is no trace."""
    write_arrays(files(tmp_path / "run", result__json="{}") / ROUTING, {"expert_ids_LTK": np.array([[0]])})
    older = trace_id(str(tmp_path / "run"))
    (tmp_path / "run" / "routes.trace").write_bytes(b"a trace")
    (tmp_path / "x.trace").write_bytes(b"a trace")
    (tmp_path / "y.trace").write_bytes(b"another")
    run, x, y = (trace_id(str(tmp_path / name)) for name in ("run", "x.trace", "y.trace"))
    assert is_id(x) and older != run == x != y
    assert inputs.trace_file(str(tmp_path / "run")) == tmp_path / "run" / "routes.trace"
    assert trace_id(str(tmp_path / "nowhere")) == str(tmp_path / "nowhere")


def test_identities_need_no_torch(tmp_path: Path) -> None:
    """They are asked for before anything is loaded."""
    code = (
        "import sys; from moe_lab.records import inputs\n"
        "print(inputs.checkpoint_id(sys.argv[1]), inputs.text_id(sys.argv[1]), 'torch' in sys.modules)"
    )
    folder = files(checkpoint(tmp_path), a__txt="x")
    assert tiny.python(code, folder).split() == [checkpoint_id(str(folder)), text_id(str(folder)), "False"]
