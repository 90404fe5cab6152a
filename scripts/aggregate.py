"""Write the tables of a sweep's folder (runs, summary, samples, unreadable); docs/results-format.md describes them.

python scripts/aggregate.py outputs/my_sweep
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_lab.results.aggregate import OUTPUTS, aggregate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a sweep's folder")
    root = parser.parse_args().directory
    try:
        runs, _, unreadable = aggregate(root)
    except (ValueError, OSError) as error:
        print(f"aggregate.py: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().items())
    print(f"{root}: {len(runs)} records{f' ({counts})' if counts else ''} in {', '.join(OUTPUTS)}")
    if copies := int((runs["n_records"] > 1).sum()):
        print(f"{copies} records share their cell_id with another (column n_records)", file=sys.stderr)
    for path, error in unreadable.itertuples(index=False):
        print(f"not read: {path}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
