"""``python -m diffit``: the command line."""

import sys

from diffit.cli import main

sys.exit(main())
