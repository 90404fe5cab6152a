"""Addresses of servers and databases, which may hold secrets: records, notes and logs are shared."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

_FILES = ("", "file", "sqlite")  # schemes of paths, where "@" means nothing
_SECRET = "pass|pwd|token|secret|api_?key"  # in the name of a query's key
_INSTEAD = (
    "records are shared. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "or MLFLOW_TRACKING_URI, in the shell."
)


def mistake(uri: str) -> str | None:
    """Why MLflow's address cannot stand in a configuration, without quoting it; None if it can."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "is not an address; use one such as http://host:5000 or sqlite:///runs.db."
    # A password may hold a slash, so all of the address is looked at where "@" has no other use.
    if "@" in (parts.netloc if parts.scheme in _FILES else uri):
        return 'has a user or a token before "@"; ' + _INSTEAD
    if any(re.search(_SECRET, key, re.IGNORECASE) for key, _ in parse_qsl(parts.query, keep_blank_values=True)):
        return "has a password or a token behind ?; " + _INSTEAD
    return None


def without_secrets(text: str) -> str:
    """A text with what stands before "@" in its addresses left out, and the secrets behind their "?" as "...".

    An address ends at a space, so of two with nothing but a comma between them, one may be left out.
    """
    text = re.sub(r"//\S*@", "//", text)
    return re.sub(rf"([?&][^\s=&]*(?:{_SECRET})[^\s=&]*=)[^\s&]*", r"\1...", text, flags=re.IGNORECASE)


def place(uri: str) -> str:
    """An address without user, token, query and fragment: what tells it from others in a note."""
    if uri.startswith("sqlite:///"):
        return uri
    return re.split("[?#]", re.sub("//.*@", "//", uri))[0]
