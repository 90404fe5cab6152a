"""How variants and phases look: never by colour alone, and with the same look in every plot of a sweep."""

from __future__ import annotations

from typing import NamedTuple

# Each at least 3 : 1 against the light and against the dark page (WCAG's limit for graphics).
COLOURS = ("#3b82c4", "#d9730d", "#2e9e6b", "#d6456b", "#8b6fd1", "#a0714f", "#1a9aa8", "#7a828e")
_MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("X", "x"),
    ("P", "cross"),
)
_DASHES: tuple[tuple[tuple[float, ...], str], ...] = (
    ((), "solid"),
    ((6, 2), "dash"),
    ((1.5, 1.5), "dot"),
    ((6, 2, 1.5, 2), "dashdot"),
    ((11, 3), "longdash"),
)
_HATCHES = (
    ("", ""),
    ("///", "/"),
    ("...", "."),
    ("xxx", "x"),
    ("---", "-"),
    ("\\\\\\", "\\"),
    ("|||", "|"),
    ("+++", "+"),
)


class VariantStyle(NamedTuple):
    """Distinct for 280 variants, marker and dashes alone for 35."""

    colour: str
    marker: str
    dashes: tuple[float, ...]
    """Lengths on and off, for matplotlib; empty is a solid line."""
    plotly_symbol: str
    plotly_dash: str


class PhaseStyle(NamedTuple):
    """The hatches alone are distinct for eight phases."""

    colour: str
    hatch: str
    plotly_pattern: str


def variant_style(index: int) -> VariantStyle:
    """Of the variant at this place among all of the sweep."""
    marker, symbol = _MARKERS[index % len(_MARKERS)]
    dashes, dash = _DASHES[index % len(_DASHES)]
    return VariantStyle(COLOURS[index % len(COLOURS)], marker, dashes, symbol, dash)


def phase_style(index: int) -> PhaseStyle:
    """Of the phase at this place among all of the sweep."""
    hatch, pattern = _HATCHES[index % len(_HATCHES)]
    return PhaseStyle(COLOURS[(index + index // len(_HATCHES)) % len(COLOURS)], hatch, pattern)
