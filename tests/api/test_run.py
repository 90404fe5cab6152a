"""api/run.py: one run from overrides or from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import moe_lab
from moe_lab.api.shown import Result
from tests import quick, tiny


def test_overrides_and_their_configuration_make_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the command line's folder; the overrides stand in the record. Nothing is printed."""
    monkeypatch.chdir(tmp_path)
    words = quick.overrides("moe_layer", "router=sinkhorn")
    one = moe_lab.run(words)
    other = moe_lab.run(moe_lab.compose(words), tmp_path / "here")
    assert isinstance(one, Result) and (one.status, one.cell_id) == ("ok", other.cell_id)
    assert one.overrides == words and Path(str(one.directory)).parent == Path("outputs/runs")
    assert other.directory == str(tmp_path / "here") and (tmp_path / "here" / "result.json").is_file()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_configuration_from_a_file_is_sent_to_no_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody else may have written it; it says so."""
    pytest.importorskip("tensorboard")
    place = tmp_path / "events"
    cfg = moe_lab.compose(quick.overrides("minimal", "tracker=tensorboard", f"tracker.tensorboard.dir={place}"))
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    found = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(found, DictConfig)
    assert moe_lab.run(found, tmp_path / "run").status == "ok"
    assert not place.exists() and "tracker: nothing is sent of a configuration from a file" in capsys.readouterr().err
    moe_lab.run(cfg, tmp_path / "other")
    assert place.is_dir()


def test_a_shape_of_a_persons_own_folder(tmp_path: Path) -> None:
    """Read from config_dir, and run under its name with its sizes."""
    shape = {"name": "tall", "n_experts": 6, "top_k": 3, "d_model": 16, "mlp_hidden_dim": 8}
    (tmp_path / "mine" / "model" / "shape").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(shape), tmp_path / "mine" / "model" / "shape" / "tall.yaml")
    words = [*quick.overrides("moe_layer")[:1], "model/shape=tall", *quick.overrides("moe_layer")[4:]]
    result = moe_lab.run(words, tmp_path / "run", config_dir=tmp_path / "mine")
    assert result.config["model"]["shape"] == shape and result.status == "ok"
    assert "moe_layer/tall-E6-K3-D16-F8" in repr(result)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param("router=sinkhorn", "'router=sinkhorn': must be a list of overrides, such as ['router=", id="text"),
        pytest.param({"router": "sinkhorn"}, "{'router': 'sinkhorn'}: must be a list of overrides", id="dict"),
        pytest.param([7], "[7]: must be a list of overrides", id="number"),
        pytest.param(["bacth=2"], "bacth: unknown key", id="typo"),
    ],
)
def test_a_mistake_is_one_line(what: Any, message: str, tmp_path: Path) -> None:
    """With what to write; nothing is left behind."""
    with pytest.raises(ValueError) as caught:
        moe_lab.run(what, tmp_path / "run")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_beside_a_composed_configuration_is_a_mistake(tmp_path: Path) -> None:
    """It would have no effect."""
    with pytest.raises(ValueError, match=r"config_dir=.*give it to moe_lab\.compose"):
        moe_lab.run(tiny.moe_layer(), config_dir=tmp_path)
