"""`python -m moe_lab`."""

import sys

from moe_lab.cli.main import main

sys.exit(main())
