"""The gallery: pages of small sweeps and of a trace, which are run when the site is built for the first time."""

from __future__ import annotations

import os
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent


class Piece(NamedTuple):
    """A page that is shown, and the commands that write it."""

    title: str
    about: str
    commands: tuple[str, ...]
    """`HERE` in them is the folder of the piece, where a sweep writes without being told."""
    page: str
    picture: str
    """The plot that the gallery shows of it."""


PIECES = {
    "router_swap": Piece(
        "Other routers in a trained model",
        "What they cost in bits per byte, and what they save.",
        ("moe-lab -m experiment=router_swap measure.max_time_s=0.2 measure.quality_tokens=4096",),
        "report.html",
        "plots/latency_against_bits.svg",
    ),
    "loads": Piece(
        "One MoE layer under four loads",
        "The reference loop and grouped experts, from one token to 512.",
        (
            "moe-lab -m model=moe_layer model.shape.d_model=128 model.shape.mlp_hidden_dim=64 experts=loop,grouped "
            "workload.load=balanced,native,zipf,one_hot batch=1,32 seq_len=1,16 measure.max_time_s=0.2",
        ),
        "report.html",
        "plots/latency_over_batch.svg",
    ),
    "trace": Piece(
        "What the routes of a trained model say",
        "Would a cache of experts help, what does a verification step load, which texts are experts for.",
        (
            "moe-lab trace model.path=assets/tiny-olmoe workload.path=assets/text --tokens 16384 -o HERE/olmoe.trace",
            "moe-lab analyze HERE/olmoe.trace",
        ),
        "olmoe.analysis/analysis.html",
        "olmoe.analysis/expert_cache.svg",
    ),
}
_OF_A_SWEEP = "device=cpu sweep.plotly=directory sweep.stale=keep hydra.sweep.dir=HERE"
_LEFT_OUT = (".hydra", ".slots", "worker.log", "run.log", "samples.npz", "routing.npz")
_SUFFIXES = {".html", ".js", ".png", ".svg", ".csv", ".json", ".parquet", ".yaml"}


def run(folder: Path) -> None:
    """Run the commands; the cells that an earlier build ran are kept. Raises `RuntimeError` if one fails."""
    # Beside other work, two threads that wait for each other are many times slower than one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, piece in PIECES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        # The pages have the command and the paths: relative to the repository, they name no folder of this machine.
        place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        for text in piece.commands:
            program, *words = f"{text} {_OF_A_SWEEP}".split() if " -m " in text else text.split()
            given = [word.replace("HERE", str(place / name)) for word in words]
            command = [str(Path(sys.executable).with_name(program)), *given]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
            if done.returncode:
                raise RuntimeError(f"gallery: {' '.join(command)}\n{done.stdout}\n{done.stderr}")


def files(folder: Path) -> list[Path]:
    """What the site has of the sweeps: their pages, and what these link to."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES and path.is_file() and not set(path.relative_to(folder).parts) & set(_LEFT_OUT)
    )


def index(folder: Path, names: list[str]) -> str:
    """A page that lists the files of a cell, to which its report links as to a folder."""
    items = "".join(f'<li><a href="{quote(name)}">{escape(name)}</a></li>' for name in names)
    return f"<!doctype html><meta charset='utf-8'><title>{escape(folder.name)}</title><ul>{items}</ul>"


def page() -> str:
    """The text of the gallery's page."""
    parts = ["# Gallery", _HEAD]
    for name, piece in PIECES.items():
        commands = "\n".join(piece.commands).replace("HERE/", "")
        page = f"gallery/{name}/{piece.page}"
        parts.append(f"## {piece.title}\n\n{piece.about} [Open the page]({page}).")
        parts.append(f"```bash\n{commands}\n```")
        parts.append(f"[![{piece.title}](gallery/{name}/{piece.picture})]({page})")
    return "\n\n".join(parts) + "\n"


_HEAD = """\
These are the pages of small sweeps, as `moe-lab -m` writes them, and that of a trace, by `moe-lab analyze`. They were
run on the machine that built this site, shortly and perhaps beside other work, so the pages say themselves how little
their speeds are worth. For figures to rely on see [Results](results/README.md)."""
