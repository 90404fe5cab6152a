"""typed.py: options and overrides, in whatever order they were typed."""

from __future__ import annotations

import pytest

from moe_lab.cli import typed


@pytest.mark.parametrize(
    ("words", "options", "overrides"),
    [
        pytest.param("-m a=1 b=2", "-m", "a=1 b=2", id="before"),
        pytest.param("a=1 -m b=2", "-m", "a=1 b=2", id="between"),
        pytest.param("a=1 b=2 -m", "-m", "a=1 b=2", id="behind"),
        pytest.param("a=1 --config-dir d=e b=2 --cfg job", "--config-dir d=e --cfg job", "a=1 b=2", id="with-values"),
        pytest.param("-cd=d ~a +b=2 ++c=3", "-cd=d", "~a +b=2 ++c=3", id="signs"),
        pytest.param("hydra.run.dir=/tmp/a=b", "", "hydra.run.dir=/tmp/a=b", id="another-equals-sign"),
    ],
)
def test_options_and_overrides_are_told_apart(words: str, options: str, overrides: str) -> None:
    """Each in its order; Hydra reads the options first."""
    found = typed.read(words.split(), {})
    assert (found.options, found.overrides) == (options.split(), overrides.split())
    assert found.words() == [*options.split(), *overrides.split()]


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        pytest.param("a=1", None, id="none"),
        pytest.param("--config-dir mine a=1", "mine", id="apart"),
        pytest.param("a=1 --config-dir=mine=1", "mine=1", id="joined"),
        pytest.param("-cd mine", "mine", id="short"),
    ],
)
def test_the_folder_of_the_configuration(words: str, folder: str | None) -> None:
    """As Hydra reads it."""
    assert typed.read(words.split(), {}).given.config_dir == folder
