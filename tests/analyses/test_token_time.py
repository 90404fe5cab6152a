"""analyses/token_time.py: rates that are given, those of a file and of a run, and what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_lab.analyses.token_time import rates
from moe_lab.records.inputs import checkpoint_id
from tests.analyses import steps

NOTHING: dict[str, Any] = {
    "gb_per_s": None,
    "rates": None,
    "link": "host_to_device",
    "compute_ms": None,
    "decode_run": None,
}


def file_of(folder: Path, **links: Any) -> str:
    """As `moe-lab doctor --rates FOLDER --json` prints it; a link is a number, or why there is none."""
    content = {
        name: {"gb_per_s": None, "reason": value} if isinstance(value, str) else {"gb_per_s": value, "reason": None}
        for name, value in links.items()
    }
    (folder / "rates.json").write_text(json.dumps({"schema": 1, "rates": content}))
    return str(folder / "rates.json")


def test_without_rates_there_is_no_time() -> None:
    """Neither of both."""
    assert rates(NOTHING, {}) == {"gb_per_s": None, "compute_ms": None}


def test_given_and_measured(tmp_path: Path) -> None:
    """Each in the place of the other; the link decides."""
    assert rates(NOTHING | {"gb_per_s": 25.0, "compute_ms": 4.0}, {}) == {"gb_per_s": 25.0, "compute_ms": 4.0}
    measured = {"rates": file_of(tmp_path, host_to_device=50, disk=3.5), "compute_ms": 4.0}
    assert rates(NOTHING | measured, {})["gb_per_s"] == 50
    assert rates(NOTHING | measured | {"link": "disk"}, {})["gb_per_s"] == 3.5
    steps.write(tmp_path, 1, 1, 2.5)
    run = {"gb_per_s": 25.0, "decode_run": str(tmp_path / "1-1")}
    assert rates(NOTHING | run, {}) == {"gb_per_s": 25.0, "compute_ms": 2.5}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        pytest.param(
            {"gb_per_s": 1.0}, r"gb_per_s: the time of a token needs expert_cache\.compute_ms", id="no-compute"
        ),
        pytest.param({"compute_ms": 1.0}, r"compute_ms: .* needs expert_cache\.gb_per_s or", id="no-rate"),
        pytest.param(
            {"gb_per_s": 1.0, "rates": "x"}, r"expert_cache\.rates: expert_cache\.gb_per_s is given", id="both"
        ),
        pytest.param(
            {"compute_ms": 1.0, "decode_run": "x"}, r"decode_run: expert_cache\.compute_ms is given", id="twice"
        ),
        pytest.param(
            {"rates": "nowhere.json"}, r"rates=.*nowhere\.json: not a file of rates .*doctor --rates", id="none"
        ),
        pytest.param({"rates": "list.json"}, r"not a file of rates", id="list"),
        pytest.param({"rates": "other.json"}, r"not a file of rates .*KeyError", id="other"),
        pytest.param({"rates": "zero.json"}, r"host_to_device is 0; must be a number > 0", id="zero"),
        pytest.param({"rates": "text.json"}, r"host_to_device is '9'; must be a number > 0", id="text"),
        pytest.param(
            {"rates": "null.json"},
            r"host_to_device was not measured there: no CUDA device; choose another expert_cache\.link",
            id="null",
        ),
        pytest.param({"decode_run": "nowhere"}, r"decode_run=.*not the folder of a run", id="no-run"),
        pytest.param({"decode_run": "failed"}, r"that run has no time \(out of memory\)", id="failed"),
        pytest.param({"decode_run": "2-1"}, r"must be a run with workload\.phase=decode, batch=1", id="batch"),
        pytest.param({"decode_run": "1-4"}, r"and workload\.window=1", id="window"),
    ],
)
def test_a_mistake_names_the_key(cfg: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And what would help; nothing is guessed."""
    links = {"zero": 0, "null": "no CUDA device"}
    for name, value in links.items():
        Path(file_of(tmp_path, host_to_device=value)).rename(tmp_path / f"{name}.json")
    text = {"gb_per_s": "9", "reason": None}
    (tmp_path / "text.json").write_text(json.dumps({"rates": {"host_to_device": text}}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")
    steps.write(tmp_path, 2, 1, 2.5)
    steps.write(tmp_path, 1, 4, 2.5)
    steps.write(tmp_path, 1, 1, 2.5, status="failed", reason="out of memory")
    (tmp_path / "1-1failed").rename(tmp_path / "failed")
    for key in ("rates", "decode_run"):
        if key in cfg:
            cfg = {**cfg, key: str(tmp_path / cfg[key])}
    with pytest.raises(ValueError, match=message):
        rates(NOTHING | cfg, {})


def checkpoint(folder: Path, content: str) -> Path:
    """What the identity of a checkpoint reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    return folder


def test_the_run_is_of_the_model_of_the_trace(tmp_path: Path) -> None:
    """By what its files hold, wherever they lie; by its name where they are gone, or where there are none."""
    here, copied = checkpoint(tmp_path / "olmoe", "{}"), checkpoint(tmp_path / "copy", "{}")
    source = {"model": "olmoe", "model_content": checkpoint_id(str(here)), "weight_changes": None}
    for index, path in enumerate([here, copied, Path("/gone/olmoe")]):
        assert rates(run(tmp_path / str(index), path=str(path)), source)["compute_ms"] == 2.5
    made = {"model": "decoder_moe", "model_content": None, "weight_changes": None}
    assert rates(run(tmp_path / "made", name="decoder_moe", path=None), made)["compute_ms"] == 2.5
    assert rates(run(tmp_path / "any", path="/gone/phi"), {"imported_from": "vllm"})["compute_ms"] == 2.5


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        pytest.param("other/phi", {}, "that run is of phi, and the trace of olmoe; give one of", id="files"),
        pytest.param("other/olmoe", {}, "olmoe (other files), and the trace of olmoe", id="files-of-that-name"),
        pytest.param("gone/phi", {}, "that run is of phi, and the trace of olmoe", id="name"),
        pytest.param(None, {"name": "decoder_moe"}, "that run is of decoder_moe, and the trace of olmoe", id="made"),
        pytest.param("olmoe", {"merge": {"experts": 3}}, "olmoe with other changes of its weights", id="merged"),
    ],
)
def test_a_run_of_another_model_is_refused(
    path: str | None, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Its time is not that of the trace's model."""
    here = checkpoint(tmp_path / "olmoe", "{}")
    for name in ("other/phi", "other/olmoe"):
        checkpoint(tmp_path / name, '{"hidden_size": 9}')
    source = {"model": "olmoe", "model_content": checkpoint_id(str(here)), "weight_changes": None}
    cfg = run(tmp_path / "run", path=path and str(tmp_path / path), **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        rates(cfg, source)
    assert str(refused.value).startswith("expert_cache.decode_run=") and "expert_cache.compute_ms" in str(refused.value)


def run(folder: Path, **model: Any) -> dict[str, Any]:
    """The settings with a run of decoding of this model."""
    steps.write(folder, 1, 1, 2.5, model={"name": "checkpoint", **model})
    return NOTHING | {"gb_per_s": 25.0, "decode_run": str(folder / "1-1")}
