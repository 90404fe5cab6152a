"""The same as `moe-lab plot`."""

import sys

from moe_lab.cli.main import main

sys.exit(main(["plot", *sys.argv[1:]]))
