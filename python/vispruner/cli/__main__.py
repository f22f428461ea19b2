"""`python -m vispruner.cli`, where the `vispruner` command is not on the PATH."""

import sys

from . import main

sys.exit(main())
