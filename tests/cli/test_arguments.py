"""cli/arguments.py: a parser whose mistakes are one line like all others."""

from __future__ import annotations

import pytest

from moe_lab.cli.arguments import Parser


def parser() -> Parser:
    options = Parser(prog="moe-lab word")
    options.add_argument("--number", type=int)
    return options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--loud"], "word: unrecognized arguments: --loud (moe-lab word --help)", id="unknown"),
        pytest.param(
            ["--number", "x"], "word: argument --number: invalid int value: 'x' (moe-lab word --help)", id="type"
        ),
        pytest.param(
            ["--number", "1", "--number=1"], "word: --number is given twice (moe-lab word --help)", id="twice"
        ),
    ],
)
def test_a_mistake_is_a_value_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the command and its help; nothing is printed."""
    with pytest.raises(ValueError) as caught:
        parser().parse_args(arguments)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """As in argparse."""
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--help"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("usage: moe-lab word ")
