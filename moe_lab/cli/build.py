"""`moe-lab build`: compile the C++/CUDA extension before the run that would compile it at its first use."""

from __future__ import annotations

import argparse
import time

from moe_lab.cli.arguments import Parser

_EXAMPLES = """\
examples:
  moe-lab build                 for the GPUs of this machine; without a GPU, only the C++ part
  moe-lab build --arch 80,90    for an A100 and an H100; needs nvcc, but no GPU
"""


def architectures(text: str) -> tuple[str, ...]:
    """The compute capabilities that `--arch` names, in order, each once; `cpu` adds none.

    Raises:
        ValueError: one of them is not a compute capability.
    """
    names = {name.strip() for name in text.split(",")} - {"cpu"}
    if not all(name.isdecimal() and len(name) in (2, 3) for name in names):
        raise ValueError(f"--arch {text}: must be compute capabilities without the dot, such as 80,90, or cpu.")
    return tuple(sorted(names, key=int))


def main(arguments: list[str]) -> int:
    """`moe-lab build`. Returns the exit code; raises `UnavailableError` if the extension cannot be built here."""
    parser = Parser(
        prog="moe-lab build",
        description="Compile the C++/CUDA extension and print the path of the binary. Without this\n"
        "command, the first run that needs the extension compiles it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", help="compute capabilities without the dot, such as 80,90; cpu: only the C++ part")
    arch = parser.parse_args(arguments).arch
    chosen = None if arch is None else architectures(arch)
    from moe_lab.ops import extension  # imports torch

    if chosen is None:
        chosen = extension.visible_architectures()
    halves = f"C++ and CUDA for sm_{', sm_'.join(chosen)}" if chosen else "C++ only"
    before, start = extension.built(chosen), time.perf_counter()
    path = extension.build(chosen, again=True)  # also what did not compile before
    print(f"{halves}: {'already built' if before else f'built in {time.perf_counter() - start:.0f} s'}\n{path}")
    return 0
