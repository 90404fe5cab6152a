"""The same as `moe-lab build`."""

import sys

from moe_lab.cli.main import main

sys.exit(main(["build", *sys.argv[1:]]))
