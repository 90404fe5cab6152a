"""results/glossary.py: the defined words and their marks."""

from __future__ import annotations

import re

from moe_lab.results import glossary


def marked(text: str) -> list[str]:
    """The words that are buttons."""
    return re.findall(r"<button[^>]*>([^<]*)</button>", glossary.mark(text))


def test_each_word_is_marked_once_and_the_longest_is_taken() -> None:
    """Whole words only; nothing in a key, a path or a name."""
    assert marked("the anchor, an anchor") == ["anchor"]
    assert marked("+1.62 bits per byte: its predictions collapse; not causal: ...") == [
        "bits per byte",
        "predictions collapse",
        "not causal",
    ]
    assert marked("at T <= 64, sweep.anchor=x, uncellular, my-cell, mismatch: static_k.") == ["T", "static_k"]


def test_a_line_does_not_begin_with_what_ends_a_word() -> None:
    """A button may stand at the end of a line, and a comma or a semicolon behind it may not begin the next."""
    html = glossary.mark("its predictions collapse; not causal: (busy machine)")
    assert re.findall(r'<span class="joined"><button[^>]*>([^<]*)</button>(.)</span>', html) == [
        ("predictions collapse", ";"),
        ("not causal", ":"),
    ]


def test_what_is_marked_is_defined_and_the_rest_is_escaped() -> None:
    """A record's text may hold anything."""
    html = str(glossary.mark('<b>anchor</b> "not stable"'))
    assert html.startswith("&lt;b&gt;<button") and "&#34;" in html
    targets = re.findall('popovertarget="([^"]*)"', html)
    assert targets == [glossary.ident("anchor"), glossary.ident("stable")]
    assert set(glossary._WORDS.values()) == set(glossary.TERMS)
    assert len({glossary.ident(word) for word in glossary.TERMS}) == len(glossary.TERMS)


def test_a_heading_without_a_definition_is_itself() -> None:
    """One with a definition is a button."""
    assert (
        glossary.term("peak <MB>") == "peak &lt;MB&gt;"
        and glossary.term("peak MB").startswith("<button")
        and glossary.term("anchor").startswith("<button")
    )
