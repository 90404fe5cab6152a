"""How a figure is written: format, size in inches, dots, font. For `moe-lab plot`, a paper, and `results.plots`."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from moe_lab.errors import nearest

FORMATS = ("pdf", "svg", "png")


class Look(NamedTuple):
    """How a figure is written. A column of a paper is often 3.3 inches wide, and its font 8 points."""

    format: str = "pdf"
    """`pdf`, `svg` or `png`."""
    width: float | None = None
    """Inches; None: as wide as the text needs."""
    height: float | None = None
    """Inches; None: as high as the text needs."""
    dpi: int = 150
    """Dots per inch of a PNG."""
    font: str | None = None
    """The name of an installed font; None: matplotlib's."""
    font_size: float = 10.0
    """Points of the axes' labels; everything else follows it."""

    def settings(self) -> Any:
        """Of matplotlib: text stays text in an SVG, and a PDF holds its fonts, so that both can be edited."""
        font = {} if self.font is None else {"font.family": self.font}
        text = {"svg.fonttype": "none", "pdf.fonttype": 42}
        lines = {"lines.markersize": 0.6 * self.font_size, "lines.linewidth": 0.15 * self.font_size}
        return {**text, **lines, "font.size": self.font_size, **font}

    def content(self, figure: Figure) -> bytes:
        """The file, the same one for the same figure."""
        written = io.BytesIO()
        metadata: Any = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(self.format)
        with rc_context({**self.settings(), "svg.hashsalt": "moe-lab"}):  # else the ids of an SVG are random
            figure.savefig(written, format=self.format, dpi=self.dpi, metadata=metadata)
        return written.getvalue()


def installed_font(name: str) -> str:
    """The name of an installed font, as it is written. Raises `ValueError` with the nearest one."""
    names = sorted(set(fontManager.get_font_names()))
    found = next((one for one in names if one.lower() == name.lower()), None)
    if found is None:
        near = nearest(name, names) or f" Installed are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        raise ValueError(f"--font={name}: no font of this name is installed.{near}")
    return found
