"""sweep/kinds.py: what several kinds of slots say of the cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moe_lab.sweep.kinds import Kept, Kind, Kinds, Unkept, is_like, kept
from moe_lab.sweep.plan import Cell
from tests.sweep.test_plan import leave, make

_LOOK = {"device_id": "cpus_0-0", "available_bytes": None, "implementation": {}, "builds": False, "skip": None}


class Two:
    """An H200 that has no sinkhorn and an A100 that has all, both under the name of this CPU."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """Told apart by the one device of these sweeps."""
        assert [config["device"]["name"] for config in configs] == ["cpu"]
        return [Kind({"cpu": gpu}, [f"{gpu}-slot"], self._ask(gpu)) for gpu in ("h200", "a100")]

    def _ask(self, gpu: str) -> Any:
        def ask(step: str, configs: Sequence[Mapping[str, Any]]) -> list[Any]:
            self.asked.append((gpu, step, len(configs)))
            if step == "refusals":
                return [
                    f"memory of {gpu}" if config["batch"] > (4 if gpu == "h200" else 2) else None for config in configs
                ]
            lacks = [gpu == "h200" and config["router"]["name"] == "sinkhorn" for config in configs]
            seen = {**_LOOK, "env": {"device_name": f"NVIDIA {gpu.upper()}"}, "env_id": gpu}
            return [{**seen, "skip": "unavailable: no sinkhorn"} if lack else seen for lack in lacks]

        return ask


def planned(tmp_path: Path, *more: str, require: Mapping[str, Any] | None = None) -> dict[tuple[str, int], Cell]:
    made = make(tmp_path, "router=torch,sinkhorn", *more, engine=Kinds(Two(), require))
    return {(cell.content["router"]["name"], cell.content["batch"]): cell for cell in made.cells}


def test_a_cell_can_run_where_one_kind_can(tmp_path: Path) -> None:
    """Skipped is what all kinds refuse; too large for the memory of one of them it may run on the other."""
    cells = planned(tmp_path, "batch=1,3,9")
    assert cells["torch", 1].env_ids == ["h200", "a100"] and cells["torch", 1].status == "to do"
    assert cells["sinkhorn", 1].env_ids == ["a100"] and cells["sinkhorn", 1].status == "to do"
    assert cells["torch", 3].status == "to do"
    assert (cells["torch", 9].status, cells["torch", 9].reason) == ("skipped", "unavailable: memory of h200")


def test_a_result_of_any_kind_is_current(tmp_path: Path) -> None:
    """And one of another machine is stale."""
    cells = planned(tmp_path, "batch=1")
    leave(cells["torch", 1], env_id="a100")
    leave(cells["sinkhorn", 1], env_id="v100")
    again = planned(tmp_path, "batch=1")
    assert again["torch", 1].status == "done"
    assert (again["sinkhorn", 1].status, again["sinkhorn", 1].reason) == ("stale", "different machine")


def test_require_keeps_a_sweep_on_one_kind(tmp_path: Path) -> None:
    """What only others can run is skipped with the reason; results of others are stale."""
    cells = planned(tmp_path, "batch=1", require={"device_name": "h200"})
    assert cells["torch", 1].env_ids == ["h200"]
    assert cells["sinkhorn", 1].status == "skipped"
    assert cells["sinkhorn", 1].reason == (
        'unavailable: sweep.require={"device_name": "h200"}: no slot is like this, only {"device_name": "NVIDIA A100"}'
    )
    leave(cells["torch", 1], env_id="a100")
    assert planned(tmp_path, "batch=1", require={"device_name": "h200"})["torch", 1].status == "stale"


def test_one_of_several_kinds_is_required(tmp_path: Path) -> None:
    """A list, as a configuration has it."""
    cells = planned(tmp_path, "batch=1", require=OmegaConf.create({"device_name": ["v100", "a100"]}))
    assert cells["torch", 1].env_ids == ["a100"]
    cells = planned(tmp_path, "batch=1", require=OmegaConf.create({"device_name": ["v100", "b200"]}))
    assert str(cells["torch", 1].reason).startswith('unavailable: sweep.require={"device_name": ["v100", "b200"]}: no')


@pytest.mark.parametrize(
    ("require", "expected"),
    [
        pytest.param({}, True, id="nothing"),
        pytest.param({"device_name": "h200"}, True, id="a-part-in-lower-case"),
        pytest.param({"device_name": "H100"}, False, id="another"),
        pytest.param({"device_name": ["H100", "H200"]}, True, id="one-of-a-list"),
        pytest.param({"threads": 8}, True, id="number"),
        pytest.param({"threads": 4}, False, id="another-number"),
        pytest.param({"device_name": "H200", "threads": 4}, False, id="both"),
        pytest.param({"driver": "550"}, False, id="unknown-there"),
    ],
)
def test_what_an_environment_is_like(require: dict[str, Any], expected: bool) -> None:
    """Text by a part of it, everything else by its value."""
    assert is_like({"device_name": "NVIDIA H200", "threads": 8, "driver": None}, require) is expected


def test_kinds_are_asked_once_and_kept_in_the_plan(tmp_path: Path) -> None:
    """A later plan of the same engine and slots needs no slot; of a new router or device it does."""
    two = Two()
    kinds = Kinds(two)
    made = make(tmp_path, "router=torch,sinkhorn", engine=kinds)
    assert two.asked == [("h200", "refusals", 2), ("a100", "refusals", 2), ("h200", "look", 2), ("a100", "look", 2)]
    make(tmp_path, "router=torch,sinkhorn", engine=kinds)
    assert len(two.asked) == 4, "what was asked is not asked again"
    made.kinds = kinds.content()
    made.write()
    slots = made.sweep["slots"]
    again = make(tmp_path, "router=torch,sinkhorn", engine=Kinds(Kept(kept(tmp_path, "worker", slots))))
    assert [cell.env_ids for cell in again.cells] == [cell.env_ids for cell in made.cells]
    with pytest.raises(Unkept):
        make(tmp_path, "router=oea", engine=Kinds(Kept(kept(tmp_path, "worker", slots))))
    for engine, asked in (("ray", slots), ("worker", {**slots, "cpu": 3})):
        with pytest.raises(Unkept):
            make(tmp_path, "router=torch", engine=Kinds(Kept(kept(tmp_path, engine, asked))))
    assert json.loads((tmp_path / "plan.json").read_text())["kinds"][0]["slots"] == ["h200-slot"]


def test_a_folder_without_a_plan_has_no_kinds(tmp_path: Path) -> None:
    """Nor one whose plan is of another version or cannot be read."""
    assert kept(tmp_path, "worker", {}) == []
    (tmp_path / "plan.json").write_text('{"cells": []}')
    assert kept(tmp_path, "worker", {}) == []
