"""`python -m fm_core` is `fm`."""

import sys

from fm_core.cli import main

sys.exit(main())
