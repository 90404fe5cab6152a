"""The same as `moe-lab export`."""

import sys

from moe_lab.cli.main import main

sys.exit(main(["export", *sys.argv[1:]]))
