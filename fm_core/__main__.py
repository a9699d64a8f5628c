"""`python -m fm_core` is `fm`."""

import os
import sys

from fm_core.cli import main

status = main()
sys.stdout.flush()
sys.stderr.flush()
if status == 3:
    # After an interrupt in the middle of an import Python would end itself by SIGINT and hide the status.
    os._exit(status)
sys.exit(status)
