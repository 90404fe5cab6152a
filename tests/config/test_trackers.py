"""config/trackers.py: the `tracker` group: several at once, limits, and who may say where results are sent."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_lab
from moe_lab.config.trackers import PLACES, TRACKERS
from moe_lab.records import identity


@pytest.mark.parametrize(
    ("option", "names"),
    [
        pytest.param("none", [], id="none"),
        pytest.param("mlflow", ["mlflow"], id="one"),
        pytest.param("[mlflow,tensorboard]", ["mlflow", "tensorboard"], id="two"),
        pytest.param("many", list(TRACKERS), id="many"),
    ],
)
def test_any_number_of_trackers_can_be_chosen(option: str, names: list[str]) -> None:
    """Each stands under its own name, with every key of its type; the cell is the same with and without them."""
    cfg = moe_lab.compose([f"tracker={option}"])
    assert list(cfg.tracker) == names
    for name in names:
        assert list(cfg.tracker[name]) == list(TRACKERS[name].__dataclass_fields__)
    assert identity.cell_id(cfg) == identity.cell_id(moe_lab.compose([]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        pytest.param(["tracker=mlflow", "tracker.mlflow.timeout_s=0"], "tracker.mlflow.timeout_s=0", id="no-time"),
        pytest.param(["tracker=wandb", "tracker.wandb.mode=off"], "must be one of online, offline", id="mode"),
        pytest.param(["tracker=mlflow", "tracker.mlflow.timeout_s=inf"], "at most 86400", id="no-end"),
        pytest.param(["tracker=mlflow", "tracker.mlflow.timeout_s=nan"], "at most 86400", id="no-number"),
        pytest.param(["tracker=mlflow", "tracker.mlflow.uri=http://TOKEN@h"], r"mlflow\.uri: has a user.* Set", id="@"),
        pytest.param(["tracker=mlflow", "tracker.mlflow.uri='m://h/d?password=p'"], "has a password", id="password"),
        pytest.param(["tracker=mlflow", "tracker.mlflow.uri='http://[x'"], r"\.uri: is not an address", id="bracket"),
        pytest.param(["tracker=mlflow", "+tracker.mlflow.url=x"], "unknown key.*Did you mean uri", id="unknown-key"),
        pytest.param(["+tracker.mlflw.uri=x"], "unknown tracker.*Did you mean mlflow", id="unknown-tracker"),
        pytest.param(["tracker.mlflow.uri=x"], "tracker=none has no such key", id="another-option"),
        pytest.param(["tracker=mlflo"], "Did you mean mlflow", id="unknown-option"),
    ],
)
def test_a_mistake_is_said_in_a_line(overrides: list[str], says: str) -> None:
    """With the key and the remedy."""
    with pytest.raises(ValueError, match=says) as caught:
        moe_lab.compose(overrides)
    assert "\n" not in str(caught.value)


def test_a_persons_own_option_may_lack_no_key(tmp_path: Path) -> None:
    """It starts from the package's."""
    (tmp_path / "tracker").mkdir()
    own = tmp_path / "tracker" / "lab.yaml"
    own.write_text("# @package tracker.mlflow\nuri: null\n")
    with pytest.raises(ValueError, match=r"tracker.mlflow.experiment has no value: start .* with /tracker/mlflow"):
        moe_lab.compose(["tracker=lab"], config_dir=tmp_path)
    own.write_text("# @package tracker\nmlflow: 3\n")
    with pytest.raises(ValueError, match=r"tracker.mlflow=3: must be the keys of a tracker; choose tracker=mlflow"):
        moe_lab.compose(["tracker=lab"], config_dir=tmp_path)
    own.write_text("# @package _global_\ntracker: mlflow\n")
    with pytest.raises(ValueError, match=r"tracker=mlflow: must be keys of trackers; choose tracker=mlflow, "):
        moe_lab.compose(["tracker=lab"], config_dir=tmp_path)
    own.write_text("# @package tracker.mlflow\ndefaults: [/tracker/mlflow, _self_]\nexperiment: lab\n")
    assert moe_lab.compose(["tracker=lab"], config_dir=tmp_path).tracker.mlflow.experiment == "lab"


@pytest.mark.parametrize("place", [pytest.param(place, id=place) for place in PLACES])
def test_a_yaml_file_does_not_say_where_results_are_sent(place: str, tmp_path: Path) -> None:
    """Only who types the command: the place, or an option that has it."""
    _, name, key = place.split(".")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "found.yaml").write_text(
        f"# @package _global_\ndefaults: [override /tracker: {name}, _self_]\n"
        f"tracker: {{{name}: {{{key}: elsewhere}}}}\n"
    )
    with pytest.raises(ValueError, match=f"{place}=elsewhere: a YAML must not say where files go; type {place}="):
        moe_lab.compose(["experiment=found"], config_dir=tmp_path)
    assert moe_lab.compose([f"tracker={name}", f"{place}=elsewhere"]).tracker[name][key] == "elsewhere"


def test_places_are_all_keys_that_name_one() -> None:
    """A new one has to be listed."""
    named = {
        f"tracker.{name}.{key}"
        for name, kind in TRACKERS.items()
        for key in kind.__dataclass_fields__
        if key in ("uri", "dir", "entity")
    }
    assert named == set(PLACES)
