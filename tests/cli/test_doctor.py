"""doctor.py: what it prints in a process of its own, and the noise floor."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.analyses import token_time
from moe_lab.cli import doctor, listing
from moe_lab.records.store import read_record
from moe_lab.results import noise
from tests import quick
from tests.cli import test_main

IMPLEMENTATIONS = ("torch", "triton", "cuda_ext")
MEDIANS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12)


def run(cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`moe-lab doctor` with a cache folder of its own."""
    done = test_main.moe_lab("doctor", *more, cwd=cache, XDG_CACHE_HOME=str(cache), CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def printed(cache: Path) -> list[str]:
    """The lines of `moe-lab doctor` where no noise was measured; nothing was written for them."""
    done = run(cache)
    assert done.stderr == ""
    assert list(cache.iterdir()) == []
    return done.stdout.splitlines()


def value(lines: list[str], key: str) -> str:
    (line,) = (line for line in lines if line.startswith(f"{key} "))
    return line.removeprefix(key).strip()


@pytest.mark.slow
def test_the_machine_and_its_hash_are_those_of_a_record(printed: list[str], tmp_path: Path) -> None:
    """Every field of the environment stands in a line, what is unknown as `-`."""
    done = test_main.moe_lab(*quick.overrides("minimal"), f"hydra.run.dir={tmp_path}/cell", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "cell")
    assert value(printed, "env_id") == record.env_id
    for key, known in record.environment.items():
        assert value(printed, key) == ("-" if known is None else str(known)), key
    assert value(printed, "noise floor") == "not measured; run moe-lab doctor --noise"


@pytest.mark.slow
def test_it_says_what_tells_of_energy_and_throttling(printed: list[str]) -> None:
    """The counter, or why there is none; the reasons that can be read."""
    assert re.match("RAPL( |:)|NVML", value(printed, "energy"))
    assert re.match("none can be read|[CG]PU ", value(printed, "throttle reasons"))


@pytest.mark.slow
def test_every_option_says_whether_it_runs_here(printed: list[str]) -> None:
    """ok, or what keeps it from that."""
    groups = listing.groups(None)
    said = {}
    for group in ("router", "experts", "execution", "dtype", "device"):
        for path in groups[group]:
            said[f"{group}={path.stem}"] = value(printed, f"{group}={path.stem}")
    native = said.pop("router=native")
    assert native.startswith("not with model=decoder_moe: ") and "only for model=checkpoint" in native
    assert all(text == "ok" or text.startswith("unavailable: ") for text in said.values())
    assert said["router=torch"] == said["device=cpu"] == said["execution=eager"] == "ok"
    assert said["router=cuda_ext"].startswith("unavailable: router=cuda_ext: router.impl=cuda_ext: no C++ compiler")
    by_device = {
        (i, d): value(printed, f"router.impl={i} device={d}") for i in IMPLEMENTATIONS for d in ("cpu", "cuda")
    }
    assert by_device["torch", "cpu"] == "ok" and "C++ compiler" in by_device["cuda_ext", "cpu"]
    assert all(text == "ok" or text.startswith("unavailable: ") for text in by_device.values())
    assert value(printed, "C++ compiler").startswith("not found; needed for execution=compile")  # it has no compiler


@pytest.mark.slow
def test_a_stored_floor_is_shown(printed: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this machine, not of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = noise.write_floor(value(printed, "env_id"), {"floor": 0.0625})
    other = noise.write_floor("0" * 12, {"floor": 0.5})
    shown = value(run(cache).stdout.splitlines(), "noise floor")
    path.unlink()
    other.unlink()
    path.parent.rmdir()
    assert shown == "6.2% between two processes"


def test_the_floor_of_known_medians() -> None:
    """Of two processes their ratio minus 1; of many nearly the largest of the pairs' ratios."""
    assert doctor._floor([1.0, 1.1]) == pytest.approx(0.1)
    assert doctor._floor([1.1, 1.0]) == pytest.approx(0.1)
    assert doctor._floor([2.0] * 10) == 0.0
    assert doctor._floor([1.0] * 9 + [2.0]) == pytest.approx(1.0)  # 9 of 45 pairs are apart


@given(medians=MEDIANS, power=st.integers(-8, 8))
def test_a_floor_has_no_unit_and_lies_within_the_extremes(medians: list[float], power: int) -> None:
    """And does not depend on the order of the processes."""
    floor = doctor._floor(medians)
    assert 0 <= floor <= (max(medians) / min(medians) - 1) * (1 + 1e-9)
    assert doctor._floor([median * 2.0**power for median in medians]) == pytest.approx(floor, abs=1e-9)
    assert doctor._floor(medians[::-1]) == pytest.approx(floor)


@pytest.mark.slow
def test_the_noise_of_this_machine_is_measured_stored_and_shown(tmp_path: Path) -> None:
    """Ten fresh processes; the file holds every median, and the floor that follows from them."""
    said = run(tmp_path, "--noise").stdout
    (path,) = tmp_path.glob("moe-lab/noise-*.json")
    content = json.loads(path.read_text())
    assert path.name == f"noise-{content['env_id']}.json"
    assert len(content["medians_ms"]) == 4
    assert all(len(medians) == 10 for medians in content["medians_ms"].values())
    floors = {name: doctor._floor(medians) for name, medians in content["medians_ms"].items()}
    assert content["floors"] == pytest.approx(floors)
    assert content["floor"] == pytest.approx(max(floors.values()))
    assert 0 < content["floor"] < math.inf
    assert re.search(f"stored in {re.escape(str(path))}", said)
    lines = run(tmp_path).stdout.splitlines()
    assert value(lines, "noise floor") == f"{content['floor']:.1%} between two processes"
    assert value(lines, "env_id") == content["env_id"]


@pytest.mark.slow
def test_rates_are_printed_and_are_what_analyze_takes(tmp_path: Path) -> None:
    """One JSON document, whose rates have a number or a reason; the same as lines."""
    (tmp_path / "weights").write_bytes(bytes(24 * 2**20))
    printed = run(tmp_path, "--rates", ".", "--json").stdout
    (tmp_path / "rates.json").write_text(printed)
    found = json.loads(printed)["rates"]
    assert set(found) == {"disk", "host_to_device"} == set(token_time.LINKS)
    lines = run(tmp_path, "--rates", ".").stdout.splitlines()
    for link, rate in found.items():
        assert (rate["gb_per_s"] is None) == (rate["reason"] is not None)
        cfg = {"gb_per_s": None, "rates": tmp_path / "rates.json", "link": link, "compute_ms": 1.0, "decode_run": None}
        if rate["reason"] is None:
            assert token_time.rates(cfg, {})["gb_per_s"] == rate["gb_per_s"] > 0
            assert re.search(r"^[\d.]+ GB/s \(.+\)$", value(lines, link))
        else:
            assert value(lines, link) == f"not measured: {rate['reason']} ({rate['of']})"
            with pytest.raises(ValueError, match=re.escape(f"{link} was not measured there: {rate['reason']}")):
                token_time.rates(cfg, {})
