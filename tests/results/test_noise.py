"""results/noise.py: the noise floor of a machine and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lab.results.noise import noise_file, read_floor, write_floor
from tests.results.compared import HERE, THERE


def test_a_floor_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file that people can read, in a folder made for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert read_floor(HERE) is None
    path = write_floor(HERE, {"floor": 0.0625, "runs": 8})
    assert path == noise_file(HERE) == tmp_path / "new" / "moe-lab" / f"noise-{HERE}.json"
    assert read_floor(HERE) == 0.0625 and json.loads(path.read_text())["runs"] == 8
    assert read_floor(THERE) is None
    write_floor(THERE, {"floor": 0})  # a clock too coarse to show any difference
    assert read_floor(THERE) == 0.0


@pytest.mark.parametrize("given_", [pytest.param("", id="empty"), pytest.param("relative/folder", id="relative")])
def test_without_a_cache_folder_it_is_the_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_: str) -> None:
    """A relative XDG_CACHE_HOME is to be ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", given_)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert noise_file(HERE) == tmp_path / ".cache" / "moe-lab" / f"noise-{HERE}.json"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=id_)
        for id_, text in {
            "empty": "",
            "cut_off": '{"floor": 0.',
            "bytes": "\udcff",
            "list": "[]",
            "missing": "{}",
            "text": '{"floor": "0.1"}',
            "null": '{"floor": null}',
            "negative": '{"floor": -0.1}',
            "nan": '{"floor": NaN}',
            "infinite": '{"floor": Infinity}',
        }.items()
    ],
)
def test_a_broken_floor_is_none_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """And does not stop a comparison."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_floor(HERE, {"floor": 0.1}).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=HERE):
        assert read_floor(HERE) is None


@pytest.mark.parametrize("env_id", [pytest.param("../../x", id="path"), pytest.param(HERE + "\n", id="newline")])
def test_an_env_id_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str) -> None:
    """It comes from a record."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="env_id"):
        noise_file(env_id)
    with pytest.warns(UserWarning, match="env_id"):
        assert read_floor(env_id) is None
