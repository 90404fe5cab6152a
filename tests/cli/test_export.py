"""cli/export.py: from an earlier run to a pair, and what it says of a pair that was damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import pytest

import moe_lab
from moe_lab.cli.export import words_of_all
from moe_lab.cli.main import main
from moe_lab.export.pair import described
from moe_lab.records import files
from tests import quick
from tests.cli.test_main import moe_lab as moe_lab_process


@pytest.fixture(autouse=True)
def _same_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` writes sys.argv for Hydra."""
    monkeypatch.setattr("sys.argv", ["moe-lab"])


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error), without the seconds that a process takes to import torch."""
    code = main(["export", *map(str, arguments)])
    return code, *capsys.readouterr()


def damaged(pair: Path, tmp_path: Path, how: str) -> Path:
    """A copy of `pair` with its weights overwritten, truncated or gone."""
    folder = tmp_path / "damaged"
    shutil.copytree(pair, folder)
    blob = folder / "__params__"
    if how == "missing":
        blob.unlink()
    elif how == "truncated":
        os.truncate(blob, 5000)
    elif how == "overwritten":
        with blob.open("r+b") as file:
            file.seek(4096)
            file.write(b"\x3f" * 100)
    else:
        (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without an export."""
    folder = tmp_path_factory.mktemp("export") / "run"
    assert moe_lab.run(quick.compose("decoder_moe", "router=sinkhorn", "seed=3"), folder).status == "ok"
    return folder


@pytest.fixture(scope="module")
def pair(run: Path) -> Path:
    """Its export, without the seconds that a process takes."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr("sys.argv", ["moe-lab"])
        assert main(["export", str(run)]) == 0
    assert "ONNX Runtime computes the same (relative error " in output.getvalue()
    return run / "netron"


@pytest.mark.slow
def test_a_process_exports_a_run(run: Path, tmp_path: Path) -> None:
    """As it is typed."""
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("netron"))
    done = moe_lab_process("export", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime computes the same (relative error " in done.stdout


@pytest.mark.slow
def test_a_run_is_exported_once_and_verifies(
    run: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder; a second call leaves what is there."""
    monkeypatch.chdir(tmp_path)
    before = (pair / "__model__").stat().st_mtime_ns
    code, output, _ = call(capsys, run)
    assert (code, (pair / "__model__").stat().st_mtime_ns) == (0, before)
    assert "already exists" in output
    assert call(capsys, "--verify", pair) == (0, f"{pair}: passed\n", "")


@pytest.mark.parametrize(
    ("how", "said", "code"),
    [
        pytest.param("overwritten", "__params__ was changed", 1, id="overwritten"),
        pytest.param("truncated", "__params__ is truncated: 5000 bytes", 1, id="truncated"),
        pytest.param("missing", "__params__ is missing", 1, id="missing"),
        pytest.param("no manifest", "no export found", 2, id="no manifest"),
    ],
)
def test_damage_has_a_message_of_its_own(
    how: str,
    said: str,
    code: int,
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 1; 2 where there never was an export."""
    found, _, error = call(capsys, "--verify", damaged(pair, tmp_path, how))
    assert found == code and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("export.opsets=18",), "Did you mean opset?", id="typo"),
        pytest.param(("export.opset=19",), "export.opset=19: must be one of 18, 23", id="opset"),
        pytest.param(("export.dynamic=[time]",), "export.dynamic=time: must be one of batch, seq_len", id="axis"),
        pytest.param(("export.opset=18", "export.opset=23"), "(export.opset=18); remove one.", id="twice"),
        pytest.param(("batch=3",), "only keys of export can be changed", id="the run's own key"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    said: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and nothing is written."""
    before = sorted(run.rglob("*"))
    code, _, error = call(capsys, run, *arguments)
    assert code == 2 and said in error and error.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so."""
    code, _, error = call(capsys, tmp_path)
    assert code == 2 and "not the folder of a run" in error


def _set(path: str, value: object) -> Callable[[Path], None]:
    """Put `value` at a dotted path of the manifest (with no path: in its place)."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        node, (*above, last) = {"": manifest}, ["", *filter(None, path.split("."))]
        for key in above:
            node = node[key]
        node[last] = value
        (folder / "manifest.json").write_text(json.dumps(node[""] if not path else manifest))

    return change


def _deep(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000 + "]" * 100_000)


def _large(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(files.MOST_BYTES + 1)  # sparse


def _linked(folder: Path) -> None:
    (folder / "__params__").rename(folder.parent / "params")
    (folder / "__params__").symlink_to(folder.parent / "params")


def _with_weights(key: str, value: str) -> Callable[[Path], None]:
    """Where the graph says that its weights lie, with a manifest that fits."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / "__model__", load_external_data=False)
        for entry in model.graph.initializer[-1].external_data:
            if entry.key == key:
                entry.value = value
        onnx.save(model, folder / "__model__")
        _set("files", described(folder))(folder)

    return change


def _no_graph(folder: Path) -> None:
    (folder / "__model__").write_bytes(b"\xff" * 99)
    _set("files", described(folder))(folder)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "not_a_mapping": (_set("", []), "no export found"),
    "text": (_set("", "x"), "no export found"),
    "null": (_set("", None), "no export found"),
    "deep": (_deep, "no export found"),
    "large": (_large, "larger than"),
    "no_files": (_set("files", {}), "files: must be"),
    "files_as_list": (_set("files", ["__model__", "__params__"]), "no export found"),
    "a_file_outside": (_set("files", {"../x": {"bytes": 1, "sha256": ""}}), "files: must be"),
    "an_absolute_file": (_set("files", {"/etc/passwd": {"bytes": 1, "sha256": ""}}), "files: must be"),
    "a_file_more": (_set("files.__more__", {"bytes": 1, "sha256": ""}), "files: must be"),
    "bytes_as_text": (_set("files.__model__.bytes", "9"), "must have bytes, an integer"),
    "bytes_as_truth": (_set("files.__model__.bytes", True), "must have bytes, an integer"),
    "huge_bytes": (_set("files.__model__.bytes", 10**30), "truncated"),
    "sha_as_number": (_set("files.__model__.sha256", 3), "sha256, a text"),
    "file_as_null": (_set("files.__params__", None), "no export found"),
    "config_as_list": (_set("config", []), "config: must be a mapping"),
    "config_as_text": (_set("config", "{}"), "config: must be a mapping"),
    "config_empty": (_set("config", {}), "model"),
    "code": (_set("config.model._target_", "os.system"), "not trusted"),
    "code_inside": (_set("config.router.x", {"_target_": "os.system"}), "router"),
    "secret": (_set("config.name", "${oc.env:AWS_SECRET}"), ""),
    "many_layers": (_set("config.model.n_layers", 10**9), "model.n_layers=1000000000"),
    "wide": (_set("config.model.d_model", 2**40), ""),
    "large_vocabulary": (_set("config.model.vocab_size", 2**40), "bytes of weights"),
    "many_experts": (_set("config.model.n_experts", 10**8), "bytes of weights"),
    "many_tokens": (_set("config.batch", 10**12), "too many tokens"),
    "batch_as_list": (_set("config.batch", [1]), ""),
    "model_as_text": (_set("config.model", "x"), ""),
    "a_link": (_linked, "is a link"),
    "weights_above": (_with_weights("location", "../params"), "must lie in __params__"),
    "weights_anywhere": (_with_weights("location", "/etc/passwd"), "must lie in __params__"),
    "weights_before": (_with_weights("offset", "-4096"), "outside of __params__"),
    "weights_behind": (_with_weights("offset", "99999999999"), "outside of __params__"),
    "weights_without_end": (_with_weights("length", "9" * 99), "outside of __params__"),
    "no_graph": (_no_graph, "not an ONNX file"),
}


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in HOSTILE])
def test_a_hostile_export_is_one_line(
    name: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in the manifest or in the graph; nothing is read outside of the folder."""
    monkeypatch.setenv("AWS_SECRET", "hunter2")
    shutil.copytree(pair, tmp_path / "pair")
    change, said = HOSTILE[name]
    change(tmp_path / "pair")
    code, output, error = call(capsys, "--verify", tmp_path / "pair")
    assert "hunter2" not in output + error
    assert (code in (1, 2) and said in error and error.count("\n") == 1) or (name == "secret" and code == 0)


def exported(status: str, folder: str = "/a/pair") -> dict[str, Any]:
    """What a record says of a pair."""
    parity = {"status": status} | ({} if status == "not_verified" else {"rel_error": 3.2e-7})
    return {"dir": folder, "nodes": 12, "functions": 3, "params_bytes": 4_200_000, "parity": parity}


def test_the_last_words_of_an_export() -> None:
    """Where it lies, whether ONNX Runtime agreed, and how to open it; of several a count."""
    first, second = words_of_all([exported("passed")]).splitlines()
    assert first == (
        "/a/pair: 12 nodes, 3 functions, 4.2 MB of weights; ONNX Runtime computes the same (relative error 3.2e-07)"
    )
    assert second == "to open it: moe-lab export --verify /a/pair --open (or netron /a/pair/__model__)"
    assert "export.verify=false" in words_of_all([exported("not_verified")])
    assert "fp32" in words_of_all([exported("verified_in_fp32")])
    assert "'/a b'" in words_of_all([exported("passed", "/a b")])
    text = words_of_all([exported("passed"), exported("passed"), exported("not_verified")])
    assert text.startswith("3 ONNX pairs") and "2 times: ONNX Runtime computes the same" in text
    assert text.count("\n") == 1 and "moe-lab export --verify DIR --open" in text


@pytest.mark.slow
def test_a_run_ends_with_the_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the table."""
    monkeypatch.chdir(tmp_path)
    assert main([*quick.overrides("minimal"), "export=netron", "export.dir=pair"]) == 0
    output = capsys.readouterr().out
    assert "ONNX Runtime computes the same (relative error " in output
    assert output.splitlines()[-1].startswith("to open it: moe-lab export --verify pair --open")
