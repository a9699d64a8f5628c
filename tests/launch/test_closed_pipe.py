"""`fm train 2>&1 | head -3`: a reader that exits does not end the job."""

import subprocess
import sys

from fm_core.config import dump_yaml
from fm_core.launch.dispatch import alive, submitted
from tests.launch.test_job_ownership import COMMAND

PRINTS_OFTEN = """
import sys
from pathlib import Path
import fm_core.terminal as terminal
stock, terminal.LINE_SECONDS = terminal.print_line, -1.0
def print_line(*arguments):
    if not stock(*arguments):
        Path(sys.argv[2]).touch()
terminal.print_line = print_line
"""


def test_a_reader_that_has_ended_does_not_end_the_job(job, tmp_path):
    job.does("wait;wait")
    asked, failed = job.control / "asked.yaml", tmp_path / "a-line-was-not-written"
    asked.write_text(dump_yaml(job.config))
    command = subprocess.Popen(
        [sys.executable, "-c", PRINTS_OFTEN + COMMAND, str(asked), str(failed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        job.wait_ready(0, 1)
        command.stdout.close()
        job.wait_for(failed.exists)
        assert command.poll() is None
        assert alive(submitted(job.control))
        (job.control / "STOP").touch()
        assert command.wait(60) == 3
    finally:
        command.kill()
    assert job.processes() == []
