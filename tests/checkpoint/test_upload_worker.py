"""The process that continues an upload: its lines are in the log, in the format of a rank."""

import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

CODE = """
import logging
from fm_core.checkpoint.upload_worker import main
main()
logging.getLogger("fm_core.storage.retries").info("the store is back")
"""


def test_its_log_lines_have_the_format_and_the_level_of_a_rank(tmp_path: Path):
    """Without a record of an upload it ends at once."""
    config = f"run: {{root: {tmp_path}, name: a}}\ntrain: {{checkpoint_root: 's3://bucket/a'}}\n"
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=config, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr.endswith("[INFO] [fm_core.storage.retries] the store is back\n"), done.stderr
