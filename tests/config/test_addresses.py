"""config/addresses.py: no secret of an address is written."""

from __future__ import annotations

import pytest

from moe_lab.config import addresses

SECRET = [
    pytest.param("http://hunter2@host/x", id="token"),
    pytest.param("http://:hunter2@host/x", id="no-user"),
    pytest.param("http://me:hunter2@host:5000", id="password"),
    pytest.param("mysql://me:a@hunter2@host/db", id="at-in-password"),
    pytest.param("mysql://me:a/hunter2@host/db", id="slash-in-password"),
    pytest.param("mysql://me:a?hunter2@host/db", id="question-mark-in-password"),
    pytest.param("mysql+pymysql://host/db?user=u&password=hunter2", id="query"),
    pytest.param("https://host/?ACCESS_TOKEN=hunter2&x=1", id="token-in-query"),
    pytest.param("file://me:hunter2@host/x", id="file"),
]
PLAIN = [
    pytest.param("http://host:5000/path", id="server"),
    pytest.param("sqlite:////data/a@b.db", id="file"),
    pytest.param("./runs@home", id="path"),
    pytest.param("postgresql://host/db?sslmode=require", id="query"),
    pytest.param("databricks", id="word"),
]


@pytest.mark.parametrize("uri", SECRET)
def test_an_address_with_a_secret_is_a_mistake_and_is_written_without(uri: str) -> None:
    """The reason does not have it either."""
    why = addresses.mistake(uri)
    assert why is not None and "hunter2" not in why
    assert "hunter2" not in addresses.place(uri)
    for text in (uri, f"refused ({uri}): 'more'\nand {uri}"):
        assert "hunter2" not in addresses.without_secrets(text)
        assert "host" in addresses.without_secrets(text)


@pytest.mark.parametrize("uri", PLAIN)
def test_an_address_without_one_is_none(uri: str) -> None:
    """A text about it stays as it is, but for an at sign."""
    assert addresses.mistake(uri) is None
    if "@" not in uri:
        assert addresses.without_secrets(f"at {uri} more") == f"at {uri} more"


@pytest.mark.parametrize("uri", [pytest.param("http://[x", id="bracket"), pytest.param("http://a\u2100b", id="letter")])
def test_what_is_no_address_is_a_mistake(uri: str) -> None:
    """And raises nothing."""
    assert "is not an address" in str(addresses.mistake(uri))


def test_places_differ_where_servers_do() -> None:
    """Not where only the user does."""
    assert addresses.place("http://me:pw@host/a?x=1#y") == addresses.place("http://you@host/a") == "http://host/a"
    assert addresses.place("sqlite:////a@b/c.db") != addresses.place("sqlite:////d@b/c.db")
