"""results/templates.py: the templates of every package are found, and say what is missing."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from moe_lab.results.templates import environment
from tests import tiny

TEMPLATES = sorted((tiny.ROOT / "moe_lab").rglob("*.jinja"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in TEMPLATES])
def test_every_template_is_found_and_refuses_to_lack_a_value(path: object) -> None:
    """By the name of its package."""
    package = ".".join(path.relative_to(tiny.ROOT).parts[:-1])  # type: ignore[attr-defined]
    made = environment(package)
    made.filters |= dict.fromkeys(("mark", "term", "ident", "unbroken", "md"), str)
    with pytest.raises(UndefinedError):
        made.get_template(path.name).render()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("html", "shown"), [pytest.param(True, "&lt;b&gt;", id="html"), pytest.param(False, "<b>", id="text")]
)
def test_html_is_escaped_and_blocks_leave_no_lines(html: bool, shown: str) -> None:
    """Text is as it is."""
    template = environment("moe_lab.results", html=html).from_string(
        "{% if true %}\n  {% if true %}\n{{ a }}\n{% endif %}\n{% endif %}\n"
    )
    assert template.render(a="<b>") == shown + "\n"
