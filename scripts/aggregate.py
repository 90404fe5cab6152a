"""The same as `moe-lab report --tables`."""

import sys

from moe_lab.cli.main import main

sys.exit(main(["report", "--tables", *sys.argv[1:]]))
