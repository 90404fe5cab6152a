"""config/slurm_options.py: what is refused before anything is submitted."""

from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

import moe_lab
from moe_lab.config import slurm_options
from moe_lab.config.unread import unread


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        pytest.param("00:01:00", 60, id="minute"),
        pytest.param("01:30:05", 5405, id="hours"),
        pytest.param("2-01:00:00", 176400, id="days"),
        pytest.param("100:00:00", 360000, id="many_hours"),
    ],
)
def test_times(time: str, seconds: int) -> None:
    """As Slurm reads them."""
    assert slurm_options.seconds_of(time) == seconds


@pytest.mark.parametrize(
    "time",
    [
        pytest.param(time, id=time or "empty")
        for time in ("", "60", "36000", "10:00", "00:00:00", "1:60:00", "-1:00:00")
    ],
)
def test_times_that_are_refused(time: str) -> None:
    """Also those that YAML or people read in two ways: 10:00:00 without quotes is 36000 in YAML."""
    with pytest.raises(ValueError, match=rf"^sweep\.slurm\.time={re.escape(time)}: must be HOURS:MINUTES:SECONDS"):
        slurm_options.seconds_of(time)


def sweep(changes: dict[str, Any]) -> Any:
    """The node `sweep` with these changes."""
    node = moe_lab.compose([]).sweep
    for key, value in changes.items():
        OmegaConf.update(node, key, value, force_add=True)
    return node


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"slots.cpu": 4, "slots.cpus_each": 2}, id="jobs_at_once"),
        pytest.param({"slurm.gres": "gpu:1", "slots.cuda": 8}, id="gpus_at_once"),
        pytest.param({"slurm.gres": "gpu:h200:1"}, id="a_kind_of_gpu"),
        pytest.param({"slurm.gres": "nvme:2,gpu"}, id="among_others"),
        pytest.param({"slurm.options": {"reservation": "lab"}}, id="other_options"),
        pytest.param({"slurm.time": "2-00:00:00"}, id="days"),
    ],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    """Nothing is raised."""
    slurm_options.check(sweep(changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"slurm.time": "60"}, r"^sweep\.slurm\.time=60: must be HOURS", id="time"),
        pytest.param({"shared": False}, r"^sweep\.shared=false: jobs of Slurm write to the", id="not_shared"),
        pytest.param({"slurm.gres": "gpu:2"}, r"^sweep\.slurm\.gres=gpu:2: a job times one group", id="two_gpus"),
        pytest.param({"slurm.gres": "gpu:h200:2"}, r"^sweep\.slurm\.gres=gpu:h200:2: a job", id="two_of_a_kind"),
        pytest.param({"slots.cuda": 2}, r"^sweep\.slots\.cuda=2: .*set sweep\.slurm\.gres=gpu:1", id="no_gres"),
        pytest.param(
            {"slots.cpu": 2, "slurm.gres": "gpu:1"}, r"^sweep\.slots\.cpu=2: .*use sweep\.slots\.c", id="gres"
        ),
        pytest.param(
            {"slurm.partition": "a\nrm -rf b"}, r"^sweep\.slurm\.partition='a\\nrm -rf b': must be", id="line"
        ),
        pytest.param({"slurm.options": {"x\ny": "z"}}, r"^sweep\.slurm\.options\.x", id="line_in_an_option"),
        pytest.param({"slurm.options": {"array": "0-7"}}, r"^sweep\.slurm\.options: array is set by", id="ours"),
        pytest.param({"slurm.options": {"job_name": "a"}}, r"^sweep\.slurm\.options: job_name is", id="our_name"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """The key and the remedy."""
    with pytest.raises(ValueError, match=complaint):
        slurm_options.check(sweep(changes))


def test_its_keys_have_no_effect_on_another_engine() -> None:
    """Who types one of them is told."""
    cfg = moe_lab.compose([])
    cfg.sweep.slurm.partition = "gpu"
    typed = "sweep.slurm.partition=gpu"
    found = unread(cfg, [typed], in_a_sweep=True)
    assert found == {"sweep.slurm.partition": f"{typed}: has no effect; only used with sweep.engine=slurm."}
    cfg.sweep.engine = "slurm"
    assert unread(cfg, [typed], in_a_sweep=True) == {}
