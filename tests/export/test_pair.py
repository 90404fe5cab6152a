"""The folder of a pair: written beside and renamed, refused where it cannot be, checked where it lies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from moe_lab.errors import ExportError
from moe_lab.export import pair
from tests import tiny
from tests.export import pairs


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """An error leaves neither the folder nor what was written of it; the one before stays."""
    target = tmp_path / "deep" / "pair"
    with pair.beside(target) as part:
        (part / "a").write_text("1")
        assert not target.exists() and part.parent == target.parent
    assert (target / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError), pair.beside(target) as part:
        (part / "a").write_text(str(1 / 0))
    assert [path.name for path in target.parent.iterdir()] == ["pair"]
    with pair.beside(target) as part:
        (part / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["pair"]


@pytest.mark.slow
def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """kill -9 in the middle: no folder of that name, and no garbage for ever."""
    program = (
        "import sys, time; from pathlib import Path; from moe_lab.export import pair\n"
        "with pair.beside(Path(sys.argv[1])) as part:\n"
        "    (part / 'a').write_text('1'); print('there', flush=True); time.sleep(60)\n"
    )
    command = pairs.python("-c", program, str(tmp_path / "pair"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        with pair.beside(tmp_path / "pair"):  # the other one lives: its folder is left alone
            assert len(list(tmp_path.glob(".pair.part-*"))) == 2
        process.send_signal(signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {"pair", f".pair.part-{process.pid}"}
    for _ in range(50):
        if not Path(f"/proc/{process.pid}").exists():
            break
        time.sleep(0.1)
    with pair.beside(tmp_path / "pair"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


@pytest.mark.parametrize(
    "process", [pytest.param(2**22 + 1, id="another-process"), pytest.param(os.getpid(), id="same-number")]
)
@pytest.mark.parametrize(
    "there", [pytest.param(True, id="beside-a-pair"), pytest.param(False, id="between-two-renames")]
)
def test_what_a_killed_export_left_is_cleared(process: int, there: bool, tmp_path: Path) -> None:
    """Also the old pair that was being replaced: it is put back where nothing took its place. Other names stay."""
    target = tmp_path / "a[1]"
    for name in (f".a[1].part-{process}.old", f".a[1].part-{process}", ".a[1].part-x", *(["a[1]"] if there else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__model__").write_text(name)
    with pair.beside(target):
        assert (target / "__model__").read_text() == ("a[1]" if there else f".a[1].part-{process}.old")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a[1].part-x", "a[1]"]
    with pair.beside(target) as part:
        (part / "__model__").write_text("new")
    assert (target / "__model__").read_text() == "new"


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    """And only when asked to; an empty folder may be taken."""
    target = tmp_path / "pair"
    pair.require_room(target, overwrite=False, n_bytes=10)
    target.mkdir()
    with pytest.raises(ValueError, match=r"already exists.*export\.overwrite=true"):
        pair.require_room(target, overwrite=False, n_bytes=10)
    pair.require_room(target, overwrite=True, n_bytes=10)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not an export"):
        pair.require_room(target, overwrite=True, n_bytes=10)
    (target / "__model__").touch()
    pair.require_room(target, overwrite=True, n_bytes=10)
    with pytest.raises(ValueError, match="cannot write to"):
        pair.require_room(target / "__model__" / "x", overwrite=False, n_bytes=10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in read-only folders too")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """It is named before anything is computed."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="cannot write to"):
            pair.require_room(tmp_path / "pair", overwrite=False, n_bytes=10)
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed and what there is."""
    usage = namedtuple("usage", "total used free")(10**9, 9 * 10**8, 10**8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    pair.require_room(tmp_path / "pair", overwrite=False, n_bytes=9 * 10**7)
    with pytest.raises(ValueError, match="need 200 MB, but only 100 MB are free"):
        pair.require_room(tmp_path / "pair", overwrite=False, n_bytes=2 * 10**8)


def one_weight() -> ir.Model:
    """y = x + w."""
    x = onnx.helper.make_tensor_value_info("x", 1, [3])
    y = onnx.helper.make_tensor_value_info("y", 1, [3])
    w = onnx.numpy_helper.from_array(torch.arange(3.0).numpy(), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w])
    return ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))


def test_a_lost_name_is_an_error(tmp_path: Path) -> None:
    """Of tied weights one name is enough."""
    w = torch.arange(3.0)
    pair.save(one_weight(), tmp_path, {"w": w, "the same": w})
    with pytest.raises(ExportError, match="weight other is not in the graph"):
        pair.save(one_weight(), tmp_path, {"w": w, "other": torch.zeros(3)})


def test_a_weight_inside_the_graph_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the writer does."""
    save = ir.save
    monkeypatch.setattr(ir, "save", lambda model, path, **_: save(model, path))
    with pytest.raises(ExportError, match="weight w was not moved out of the graph"):
        pair.save(one_weight(), tmp_path, {"w": torch.arange(3.0)})
