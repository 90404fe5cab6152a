"""`moe-lab plot`: two columns of a folder of results against each other, or every plot of its report, for a paper."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from moe_lab.cli.arguments import Parser
from moe_lab.errors import nearest
from moe_lab.records.store import write_atomic
from moe_lab.results import plots, xy
from moe_lab.results.load import load
from moe_lab.results.look import FORMATS, Look, installed_font

_EXAMPLES = """\
X, Y and --by are columns of runs.csv, described in docs/results-format.md, or keys of the
configuration in which the runs differ, such as router.temperature or model.top_k. Where Y has a
95 % interval it is drawn; a hollow point has none. Runs without one of the columns are left out
and counted. Without X and Y every plot of the report is drawn.

examples:
  moe-lab plot outputs/my_sweep batch latency_ms.p50 --log
  moe-lab plot outputs/my_sweep router.temperature quality.delta_bits_per_byte -o bits.pdf
  moe-lab plot outputs/my_sweep batch ratio_to_anchor.p50 --by router,seq_len --size 3.3x2.5 \\
    --font 'DejaVu Serif' --font-size 8 -o ratio.svg
  moe-lab plot outputs/my_sweep --format pdf --size 3.3 --font-size 8 -o paper
"""


def _size(text: str | None) -> tuple[float | None, float | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:x(\d+(?:\.\d+)?))?", text)
    if match is None or not all(1 <= float(number) <= 40 for number in match.groups() if number):
        raise ValueError(
            f"--size={text}: must be width x height in inches, from 1 to 40 each, such as 7x4.5, or a width."
        )
    return float(match[1]), float(match[2]) if match[2] else None


def _format(output: Path | None, given: str | None) -> str:
    ending = output.suffix[1:].lower() if output is not None else None
    if given is not None and given not in FORMATS:
        raise ValueError(f"--format={given}: must be one of {', '.join(FORMATS)}.{nearest(given, FORMATS)}")
    if given is None and ending is not None and ending not in FORMATS:
        raise ValueError(
            f"--output={output}: must end in {', '.join(f'.{name}' for name in FORMATS)}, or set --format."
        )
    if given is not None and ending in FORMATS and ending != given:
        raise ValueError(f"--format={given}: {output} ends in .{ending}; leave out one of them.")
    return given or ending or "png"


def look_of(given: argparse.Namespace) -> Look:
    """How the figure is to be written. Raises `ValueError` for what is not possible."""
    kind = _format(given.output if given.x else None, given.format)
    if given.dpi is not None and kind != "png":
        raise ValueError(f"--dpi={given.dpi}: a {kind.upper()} has no dots; leave it out.")
    if given.dpi is not None and not 10 <= given.dpi <= 1200:
        raise ValueError(f"--dpi={given.dpi}: must be dots per inch from 10 to 1200.")
    if not 2 <= given.font_size <= 72:
        raise ValueError(f"--font-size={given.font_size:g}: must be points from 2 to 72.")
    width, height = _size(given.size)
    if height is not None and not given.x:
        raise ValueError(f"--size={given.size}: give only the width; each plot of the report has a height of its own.")
    font = None if given.font is None else installed_font(given.font)
    return Look(kind, width, height, given.dpi or 150, font, given.font_size)


def parser() -> Parser:
    """The options of `moe-lab plot`."""
    options = Parser(
        prog="moe-lab plot",
        description="Draw two columns of a folder of results against each other, or every plot of its\n"
        "report, as PDF, SVG or PNG.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("directory", type=Path, help="a sweep's folder, or any folder of runs")
    options.add_argument(
        "x", metavar="X", nargs="?", help="a column, for example batch, or a key such as router.temperature"
    )
    options.add_argument("y", metavar="Y", nargs="?", help="a column of numbers, for example latency_ms.p50")
    options.add_argument(
        "--by",
        help="a line for each value of these columns, joined by commas (default: variant, and what else differs)",
    )
    options.add_argument("--log", action="store_true", help="logarithmic axes")
    options.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the file (default: plots/Y_over_X.png in DIRECTORY); without X and Y a folder (default: DIRECTORY/paper)",
    )
    options.add_argument("--format", help="pdf, svg or png (default: the ending of --output, else png)")
    options.add_argument("--size", metavar="W[xH]", help="inches (default: 7x4.5, or more if the text needs it)")
    options.add_argument("--dpi", type=int, help="dots per inch of a PNG (default: 150)")
    options.add_argument("--font", metavar="NAME", help="an installed font (default: matplotlib's)")
    options.add_argument("--font-size", type=float, default=10, metavar="POINTS", help="(default: %(default)s)")
    return options


def main(arguments: list[str]) -> int:
    """`moe-lab plot`. Returns the exit code."""
    given = parser().parse_args(arguments)
    if given.x and not given.y:
        raise ValueError("plot: give X and Y, or neither (moe-lab plot --help)")
    look = look_of(given)
    if not given.x:
        return _all(given, look)
    figure, missing = xy.draw(load(given.directory), given.x, given.y, given.by, given.log, look)
    content = xy.save(figure, look)
    output = given.output or given.directory / "plots" / f"{given.y}_over_{given.x}.{look.format}"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, content)
    print(f"{output}" + (f" ({missing} runs without one of these columns are left out)" if missing else ""))
    return 0


def _all(given: argparse.Namespace, look: Look) -> int:
    if given.by or given.log:
        raise ValueError(f"{'--by' if given.by else '--log'}: has no effect without X and Y; leave it out.")
    if given.output is not None and given.output.suffix[1:].lower() in FORMATS:
        raise ValueError(f"--output={given.output}: must be a folder, for several plots are written; or give X and Y.")
    drawn = plots.publish(given.directory, given.output or given.directory / "paper", look)
    print("\n".join([*map(str, drawn.paths), *(f"not in them: {text}" for text in drawn.left_out)]))
    return 0
