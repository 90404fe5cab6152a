"""config/slurm_options.py: what is refused before anything is submitted."""

from __future__ import annotations

import re
from typing import Any

import pytest

import moe_lab
from moe_lab.config import slurm_options


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


def sweep(*overrides: str) -> dict[str, Any]:
    """The checked node of a sweep on Slurm."""
    return dict(moe_lab.compose(["sweep.engine=slurm", *overrides]).sweep)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="nothing"),
        pytest.param(["sweep.slots.cpu=4", "sweep.slots.cpus_each=2"], id="jobs_at_once"),
        pytest.param(["sweep.slurm.gres=gpu:1", "sweep.slots.cuda=8"], id="gpus_at_once"),
        pytest.param(["sweep.slurm.gres=gpu:h200:1"], id="a_kind_of_gpu"),
        pytest.param(["'sweep.slurm.gres=nvme:2,gpu'"], id="among_others"),
        pytest.param(["sweep.slurm.options={reservation: lab}"], id="other_options"),
        pytest.param(["sweep.slurm.time=2-00:00:00"], id="days"),
    ],
)
def test_what_is_allowed(overrides: list[str]) -> None:
    """It composes."""
    slurm_options.check(sweep(*(text.strip("'") for text in overrides)))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        pytest.param(["sweep.slurm.time=60"], r"^sweep\.slurm\.time=60: must be HOURS", id="time"),
        pytest.param(["sweep.shared=false"], r"^sweep\.shared=false: jobs of Slurm write to the", id="not_shared"),
        pytest.param(["sweep.slurm.gres=gpu:2"], r"^sweep\.slurm\.gres=gpu:2: a job times one group", id="two_gpus"),
        pytest.param(["sweep.slurm.gres=gpu:h200:2"], r"^sweep\.slurm\.gres=gpu:h200:2: a job", id="two_of_a_kind"),
        pytest.param(["sweep.slots.cuda=2"], r"^sweep\.slots\.cuda=2: .*set sweep\.slurm\.gres=gpu:1", id="no_gres"),
        pytest.param(
            ["sweep.slots.cpu=2", "sweep.slurm.gres=gpu:1"], r"^sweep\.slots\.cpu=2: .*use sweep\.slots\.cuda", id="gres"
        ),
        pytest.param(["+sweep.slurm.options.array=0-7"], r"^sweep\.slurm\.options: array is set by", id="ours"),
        pytest.param(["sweep.worker=false"], r"^sweep\.engine=slurm: a slot has a worker process", id="no_worker"),
    ],
)
def test_what_is_refused(overrides: list[str], complaint: str) -> None:
    """The key and the remedy."""
    with pytest.raises(ValueError, match=complaint):
        sweep(*overrides)


def test_its_keys_have_no_effect_on_another_engine() -> None:
    """Who types one of them is told."""
    with pytest.raises(ValueError, match=r"^sweep\.slurm\.partition.*only used with sweep\.engine=slurm"):
        moe_lab.multirun(["sweep.slurm.partition=gpu"])
