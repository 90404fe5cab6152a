"""Build the C++/CUDA extension of kernels/ for the GPUs of this machine, or for others, and say where it lies.

    python scripts/build_router_ext.py                 # for the GPUs that torch sees; without any, its C++ half
    python scripts/build_router_ext.py --arch 80,90    # for an A100 and an H100; needs nvcc, but no GPU

A run builds it at first use where this was not done before. Exit code: 0; 2 if it cannot be built.
"""

from __future__ import annotations

import argparse
import sys
import time

from moe_lab.errors import UnavailableError
from moe_lab.ops import extension


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help="compute capabilities without the dot, such as 80,90; cpu: the C++ half alone")
    asked = parser.parse_args().arch
    if asked is None:
        architectures = extension.visible_architectures()
    else:
        names = sorted({name.strip() for name in asked.split(",")} - {"cpu"}, key=lambda name: (len(name), name))
        if not all(name.isdigit() and len(name) in (2, 3) for name in names):
            print(f"build_router_ext.py: --arch {asked}: give compute capabilities, such as 80,90", file=sys.stderr)
            return 2
        architectures = tuple(names)
    halves = f"C++, and CUDA for sm_{', sm_'.join(architectures)}" if architectures else "C++ alone"
    before, start = extension.built(architectures), time.perf_counter()
    try:
        path = extension.build(architectures)
    except UnavailableError as error:
        print(f"build_router_ext.py: {error}", file=sys.stderr)
        return 2
    took = "was there already" if before else f"built in {time.perf_counter() - start:.0f} s"
    print(f"{halves}: {took}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
