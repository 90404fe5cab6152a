"""records/weight_changes.py and config/weight_changes.py: which changes are on, and that the others change no id."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import moe_lab
from moe_lab.records import inputs
from moe_lab.records.identity import cell_id, content
from moe_lab.records.variants import labels
from moe_lab.records.weight_changes import NODES, active, other_keys
from tests import quick

TEXT = f"model.calibration.path={quick.TEXTS / 'pydoc.txt'}"


def checkpoint(*more: str) -> list[str]:
    return quick.overrides("checkpoint", f"workload.path={quick.TEXTS / 'roff.txt'}", *more)


@pytest.mark.parametrize(
    ("more", "nodes"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["model.prune.by=frequency"], [], id="how_but_not_how_many"),
        pytest.param([TEXT, "model.prune.experts=2"], ["calibration", "prune"], id="prune"),
        pytest.param([TEXT, "model.merge.experts=2"], ["calibration", "merge"], id="merge"),
        pytest.param(["model.quantize_experts.format=int4"], ["quantize_experts"], id="all_experts"),
        pytest.param(
            [TEXT, "model.quantize_experts.format=int4", "model.quantize_experts.coldest=3"],
            ["calibration", "quantize_experts"],
            id="the_coldest",
        ),
        pytest.param(["model.quantize_gate.noise=0.1"], ["quantize_gate"], id="noise"),
    ],
)
def test_what_is_on_counts_and_nothing_else(more: list[str], nodes: list[str]) -> None:
    """In the cell_id too: with everything off it is that of a model that has no such keys."""
    cfg, plain = moe_lab.compose(checkpoint(*more)), moe_lab.compose(checkpoint())
    assert list(active(cfg.model)) == nodes
    assert set(other_keys(cfg.model)) == set(cfg.model) - set(NODES)
    assert (cell_id(cfg) == cell_id(plain)) == (nodes == [])
    assert set(content(cfg)["model"]) == {"_target_", "name", "ignores", "path", "implementation", *nodes}
    old = OmegaConf.to_container(plain, resolve=True)
    old["model"] = {key: old["model"][key] for key in other_keys(plain.model)}  # type: ignore[index, call-overload]
    assert cell_id(old) == cell_id(plain)  # type: ignore[arg-type]


def test_a_calibration_text_counts_by_what_it_holds(tmp_path: Path) -> None:
    """Not by where it lies; and another text is another cell."""
    ids = []
    for folder, text in (("a", "one text"), ("b", "one text"), ("c", "another")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
        more = [f"model.calibration.path={tmp_path / folder}", "model.prune.experts=1"]
        ids.append(cell_id(moe_lab.compose(checkpoint(*more))))
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        pytest.param(str(quick.TEXTS / "roff.txt"), "is the text of workload.path too", id="the_same_file"),
        pytest.param(str(quick.TEXTS), "roff.txt is the text of workload.path too", id="the_same_in_a_folder"),
        pytest.param("nowhere", "model.calibration.path=nowhere: file or folder not found", id="missing"),
    ],
)
def test_what_is_judged_is_not_calibrated_on(path: str, text: str) -> None:
    """Before anything is loaded; a copy of the text is the text."""
    cfg = moe_lab.compose(checkpoint(f"model.calibration.path={path}", "model.prune.experts=1"))
    with pytest.raises(ValueError, match=text):
        inputs.require(cfg)
    inputs.require(moe_lab.compose(checkpoint(TEXT, "model.prune.experts=1")))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        pytest.param(["model.prune.experts=2"], "model.calibration.path has no value", id="no_text"),
        pytest.param(["model.prune.experts=-1"], "model.prune.experts=-1: must be a number >= 0", id="negative"),
        pytest.param([TEXT, "model.prune.experts=1", "model.prune.by=reaper"], "by=reaper: .* reap", id="by"),
        pytest.param(
            [TEXT, "model.prune.experts=1", "model.merge.experts=1"],
            "experts are removed already",
            id="prune_and_merge",
        ),
        pytest.param(["model.quantize_experts.format=int3"], "must be one of int8, int4, fp8", id="format"),
        pytest.param(["model.quantize_gate.format=nf4"], "must be one of int8, int4, fp8", id="format_of_the_gate"),
        pytest.param(["model.quantize_gate.noise=-1"], "noise=-1.0: must be a number >= 0", id="noise"),
        pytest.param(
            ["model.quantize_experts.format=int4", "model.quantize_experts.group_size=0"], ">= 1", id="group_size"
        ),
        pytest.param(["model.quantize_experts.coldest=3"], "only used with model.quantize_experts.format", id="unread"),
        pytest.param(["model.prune.exprts=3"], "exprts", id="unknown"),
        pytest.param(
            ["model.calibration.path=[]", "model.prune.experts=1"], "must be a file, a folder, or a list", id="no_paths"
        ),
    ],
)
def test_mistakes_are_one_line_with_the_key(more: list[str], text: str) -> None:
    """When the configuration is composed, so `plan` and a sweep refuse them too."""
    with pytest.raises(ValueError, match=text):
        moe_lab.compose(checkpoint(*more))


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("decoder_moe", ["model.n_dense_layers=2", "model.prune.experts=1"], id="all_dense"),
        pytest.param("transformer_decoder", ["model.prune.experts=1"], id="without_experts"),
        pytest.param("minimal", ["+model.quantize_gate.format=int4"], id="without_anything"),
    ],
)
def test_a_model_without_experts_is_refused(model: str, more: list[str]) -> None:
    """By the schema, or because nothing would be changed."""
    with pytest.raises(ValueError, match=r"prune|quantize_gate"):
        moe_lab.compose(quick.overrides(model, *more))


def test_variants_are_called_by_what_is_changed() -> None:
    """The keys that tell them apart, under the names with which they are typed."""
    cells = {
        "checkpoint": [],
        "checkpoint(prune.experts=2, prune.by=reap)": [TEXT, "model.prune.experts=2"],
        "checkpoint(prune.experts=2, prune.by=weight)": [TEXT, "model.prune.experts=2", "model.prune.by=weight"],
        "checkpoint(merge.experts=2)": [TEXT, "model.merge.experts=2"],
        "checkpoint(quantize_gate.format=int4)": ["model.quantize_gate.format=int4"],
        "checkpoint(quantize_gate.noise=0.1)": ["model.quantize_gate.noise=0.1"],
    }
    contents = [content(moe_lab.compose(checkpoint(*more))) for more in cells.values()]
    assert labels(contents, ["model"]) == list(cells)
