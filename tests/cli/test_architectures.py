"""cli/architectures.py: `moe-lab list architectures`."""

from __future__ import annotations

import json

import pytest

from moe_lab.cli import architectures
from moe_lab.models.architectures import ARCHITECTURES


def test_each_has_its_models_and_what_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    """Two lines each; the last line says what no test has."""
    architectures.show()
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert "model_type" in head and "released weights are not" in last
    assert len(lines) == 2 * len(ARCHITECTURES)
    for each, about, tested in zip(ARCHITECTURES, lines[::2], lines[1::2], strict=True):
        assert about.split()[0] == each.model_type and each.models in about and each.unusual in about
        assert tested.strip() == f"tested: {each.tested}"


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """One document."""
    architectures.show(json=True)
    content = json.loads(capsys.readouterr().out)
    assert content == {"schema": 1, "architectures": [each._asdict() for each in ARCHITECTURES]}
