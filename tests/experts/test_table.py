"""experts/table.py: what was measured to be the fastest, read from files beside the module."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lab.experts import table
from moe_lab.experts.table import (
    FUSED_DTYPES,
    FUSED_EXPERTS,
    FUSED_STEP,
    Choice,
    Shape,
    fastest,
    file_name,
    neighbours,
)
from moe_lab.experts.tiles import FEW_SLOTS, ONE_TOKEN, Tiles, candidates
from moe_lab.ops import extension, fused_experts
from moe_lab.ops.library import DTYPES
from tests import tiny

SHAPE = Shape(8, 2, 512, 2048)
FEW, MANY = (128, 16, 128, 16, 4), (256, 192, 256, 192, 1)


def row(T: int, implementation: str, tiles: tuple[int, ...] | None, dtype: str = "bf16") -> dict[str, Any]:
    sizes = {"dtype": dtype, **SHAPE._asdict(), "T": T}
    return {**sizes, "implementation": implementation, "tiles": tiles and list(tiles)}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the table of a device `NVIDIA Test`, and forgets what was read before."""
    (tmp_path / "choices").mkdir()
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)

    def rewrite(*rows: dict[str, Any]) -> None:
        (tmp_path / "choices" / "nvidia_test.json").write_text(json.dumps({"choices": rows}))
        table._choices.cache_clear()
        fastest.cache_clear()

    yield rewrite
    table._choices.cache_clear()
    fastest.cache_clear()


def test_a_choice_is_found_where_it_was_measured_and_between(write: Callable[..., None]) -> None:
    """Exactly at its T, else both neighbours, in whatever order the file has them; nothing beyond the ends."""
    write(row(4096, "fused", MANY), row(1, "grouped", FEW), row(64, "fused", FEW))

    def at(T: int) -> list[int]:
        return [choice.T for choice in neighbours("NVIDIA Test", "bf16", SHAPE, T)]

    assert [at(T) for T in (0, 1, 2, 63)] == [[], [1], [1, 64], [1, 64]]
    assert [at(T) for T in (64, 65, 4096, 4097)] == [[64], [64, 4096], [4096], []]
    assert neighbours("NVIDIA Test", "bf16", SHAPE, 64) == [Choice(64, "fused", FEW)]


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    [
        pytest.param("NVIDIA Other", "bf16", SHAPE, id="device"),
        pytest.param("NVIDIA Test", "fp16", SHAPE, id="dtype"),
        *(
            pytest.param("NVIDIA Test", "bf16", SHAPE._replace(**{key: getattr(SHAPE, key) * 2}), id=key)
            for key in SHAPE._fields
        ),
    ],
)
def test_of_anything_else_nothing_is_known(device: str, dtype: str, shape: Shape, write: Callable[..., None]) -> None:
    """Another device, dtype or size."""
    write(row(64, "grouped", FEW), row(8, "grouped", MANY, dtype="fp16"))
    assert neighbours("NVIDIA Test", "bf16", SHAPE, 64) and neighbours("NVIDIA Test", "fp16", SHAPE, 8)
    assert neighbours(device, dtype, shape, 64) == []
    assert fastest(device, dtype, shape, 64) == "fused"


def test_the_fastest_is_that_of_the_nearest_measured_number_of_tokens(write: Callable[..., None]) -> None:
    """By ratio: 31 is nearer to 64 than to 8. Without a measurement, and beyond them, it is fused."""
    write(row(8, "grouped", FEW), row(64, "fused", FEW))
    found = [fastest("NVIDIA Test", "bf16", SHAPE, T) for T in (0, 1, 8, 22, 23, 31, 64, 65)]
    assert found == ["fused", "fused", "grouped", "grouped", "fused", "fused", "fused", "fused"]


@pytest.mark.parametrize(
    ("T", "E", "expected"),
    [
        pytest.param(1, 64, "fused", id="one"),
        pytest.param(2, 64, "fused", id="nearer to one"),
        pytest.param(3, 64, "grouped", id="few"),
        pytest.param(8, 64, "grouped", id="an expert each"),
        pytest.param(9, 64, "fused", id="they share"),
        pytest.param(8, 8, "fused", id="few experts"),
    ],
)
def test_where_nobody_measured_few_tokens_that_share_no_expert_are_grouped(T: int, E: int, expected: str) -> None:
    """Eight experts a token; as the cells of the H200 came out."""
    assert fastest("NVIDIA Test", "bf16", Shape(E, 8, 2048, 1024), T) == expected


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param("fp32", SHAPE, id="fp32"),
        pytest.param("bf16", SHAPE._replace(E=1025), id="E"),
        pytest.param("", SHAPE, id="no-dtype-of-ours"),
        pytest.param("bf16", SHAPE._replace(D=520), id="D"),
        pytest.param("bf16", SHAPE._replace(F=2056), id="F"),
    ],
)
def test_where_the_kernels_cannot_run_it_is_grouped(dtype: str, shape: Shape) -> None:
    """Whatever a table says."""
    assert fastest("NVIDIA H200", dtype, shape, 64) == "grouped"
    assert fastest("NVIDIA H200", "fp16", SHAPE._replace(D=528, F=2064), 64) == "fused"


def test_the_name_of_a_file_is_that_of_the_device() -> None:
    """In lower case, without spaces."""
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def test_a_table_counts_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that another table chose for are stale; JSON elsewhere, or of a plug-in, changes nothing."""
    from moe_lab.records import identity

    package = tmp_path / "package"
    (package / "experts" / "choices").mkdir(parents=True)
    (package / "experts" / "auto.py").write_text("")
    monkeypatch.setattr(identity, "PACKAGE", package)
    ids = []
    for text in ("{}", '{"a": 1}'):
        (package / "experts" / "choices" / "nvidia_test.json").write_text(text)
        identity._package_code_id.cache_clear()
        ids.append(identity.code_id())
    (package / "experts" / "other.json").write_text("{}")
    identity._package_code_id.cache_clear()
    assert identity.code_id() == ids[1] != ids[0]
    (tmp_path / "mine" / "choices").mkdir(parents=True)
    before = identity.code_id([tmp_path / "mine"])
    (tmp_path / "mine" / "choices" / "x.json").write_text("{}")
    assert identity.code_id([tmp_path / "mine"]) == before
    identity._package_code_id.cache_clear()


def test_the_tables_that_are_shipped_can_be_read() -> None:
    """Each under the name of its device; implementations and tiles that exist; no cell twice."""
    for path in (tiny.ROOT / "moe_lab" / "experts" / "choices").glob("*.json"):
        content = json.loads(path.read_text())
        assert path.name == file_name(content["device"]) and content["made_with"]
        cells = set()
        for found in content["choices"]:
            cells.add((found["dtype"], *(found[key] for key in "EKDFT")))
            assert found["dtype"] in FUSED_DTYPES and found["implementation"] in ("fused", "grouped")
            assert found["tiles"] is None or Tiles(*found["tiles"]) in [ONE_TOKEN, *candidates(found["F"])]
            assert found["tiles"] is not None or found["implementation"] != "fused"
        assert len(cells) == len(content["choices"])


def test_the_limits_of_fused_stand_alike_where_torch_is_not_read_and_in_the_kernels() -> None:
    """Four files name them: two without torch, one beside the op, and the C++ header."""
    assert {DTYPES[name] for name in FUSED_DTYPES} == set(fused_experts.DTYPES)
    assert (FUSED_STEP, FUSED_EXPERTS) == (fused_experts.STEP, extension.MOST_EXPERTS)
    header = (extension.sources() / "experts.h").read_text()
    assert f"kFewSlots = {FEW_SLOTS};" in header and FEW_SLOTS == fused_experts._FEW_SLOTS
    assert f"kMostNumbers = {fused_experts._MOST_NUMBERS};" in header
    assert f"int64_t{{{fused_experts._MANY_TOKENS}}} * E" in header
