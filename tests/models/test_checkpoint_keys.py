"""models/checkpoint_keys.py: what is said of a JSON file that is not what it should be, and which keys nobody reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.checkpoint_keys import Keys, parse_object, read_object, shown
from tests.models.checkpoints import complaint


def keys(**content: Any) -> Keys:
    return Keys(Path("config.json"), content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(b'{"a": NaN}', "NaN is not a finite number", id="nan"),
        pytest.param(b'{"a": [{"b": Infinity}]}', "Infinity is not a finite number", id="inf"),
        pytest.param(b'{"a": -Infinity}', "-Infinity is not a finite number", id="minus_inf"),
        pytest.param(b'{"a": 1e999}', "1e999 is not a finite number", id="float_too_large"),
        pytest.param(b'{"a": 1, "b": 2, "a": 1}', "the key a stands twice", id="twice"),
        pytest.param(b'{"o": {"a": 1, "a": 2}}', "the key a stands twice", id="twice_inside"),
        pytest.param(b'{"a":' * 100_000, "deeper than 100 levels", id="deep_objects"),
        pytest.param(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 100 levels", id="deep_lists"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "4300", id="integer_of_5000_digits"),
        pytest.param(b"[1]", "not a JSON object", id="list"),
        pytest.param(b"\xff\xfe{}", "utf-8", id="no_text"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', "Expecting value", id="byte_order_mark"),
        pytest.param(b"", "Expecting value", id="empty"),
    ],
)
def test_what_no_program_should_write_is_refused(text: bytes, said: str) -> None:
    """In one short line."""
    with pytest.raises(ValueError) as caught:
        parse_object(text)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_finite_numbers_and_distinct_keys_are_read() -> None:
    """Large and small."""
    assert (
        parse_object(b'{"a": 1e308, "b": -1e-320, "c": {"a": 12345678901234567890}}')["c"]["a"] == 12345678901234567890
    )


def test_only_a_plain_file_of_sane_size_is_read(tmp_path: Path) -> None:
    """Reading a FIFO would wait for ever, and a device has no end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    for name, said in (("fifo", "not a plain file"), ("zero", "not a plain file"), ("sparse", "larger than 64 MiB")):
        with pytest.raises(OSError, match=said):
            read_object(tmp_path / name)
    with pytest.raises(OSError, match="not a plain file"):
        read_object(tmp_path)


def test_a_value_in_a_message_is_one_short_line_of_printable_text() -> None:
    """No escape code of a file reaches a terminal."""
    assert shown("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\nc\\u202e"
    assert shown("ü中") == "ü中"
    assert len(shown("x" * 1000)) < 110 and shown([1, "2"]) == "[1, '2']"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(0, ">= 1", id="0"),
        pytest.param(-3, ">= 1", id="negative"),
        pytest.param(True, ">= 1", id="true"),
        pytest.param(4.0, ">= 1", id="float"),
        pytest.param("4", ">= 1", id="text"),
        pytest.param({}, ">= 1", id="object"),
        pytest.param(10**12, "<= 134217728", id="10**12"),
        pytest.param(10**400, "<= 134217728", id="10**400"),
    ],
)
def test_a_size_is_an_integer_that_a_model_can_have(value: Any, said: str) -> None:
    """Key and value are named."""
    message = complaint(lambda: keys(width=value).size("width"))
    assert "config.json" in message and f"width={shown(value)}" in message and said in message and len(message) < 250


@pytest.mark.parametrize(
    "value", [pytest.param(v, id=str(v)[:9]) for v in (0, -1.5, True, "1", [1.0], 10**12, 10**400, 1e300)]
)
def test_a_number_is_positive_and_sane(value: Any) -> None:
    """An integer may have more digits than a float can hold."""
    assert f"eps={shown(value)} must be" in complaint(lambda: keys(eps=value).number("eps"))


@pytest.mark.parametrize(
    "value", [pytest.param(v, id=str(v)) for v in (-1, 1.0, True, "2", [2, None], [[2]], {"a": 1})]
)
def test_ids_are_integers(value: Any) -> None:
    """One or a list."""
    assert f"end={value} must be" in complaint(lambda: keys(end=value).integers("end"))


def test_ids_are_one_or_several_or_none() -> None:
    """Null is none."""
    assert [keys(end=value).integers("end") for value in (None, 3, [3, 4], [])] == [[], [3], [3, 4], []]


def test_two_names_of_a_key_must_agree() -> None:
    """Else one of the two would be dropped."""
    assert keys(a=3, b=3).size("a", "b") == keys(a=3, b=None).size("a", "b") == keys(b=3).size("a", "b") == 3
    assert "a=3 and b=4 contradict each other" in complaint(lambda: keys(a=3, b=4).size("a", "b"))


def test_keys_that_nobody_reads_are_known_inside_objects_too() -> None:
    """Null says nothing, and some are known to have no effect."""
    config = keys(a=1, b=2, c=None, d=3, o={"x": 1, "y": 2}, p={"z": 1})
    config.size("a")
    config.part("o").size("x")
    assert config.unread(silent={"d"}) == ["b", "p", "o.y"]
