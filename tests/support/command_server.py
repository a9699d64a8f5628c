"""Commands in forks of one process that has imported what they need: they start without seconds of imports.

`python -m tests.support.command_server MODULE...` imports the modules, then reads a request per line (JSON:
`command`, `out`, `err`), runs it in a fork, and prints the exit status. A fork ends like any process.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PREFECT = ("prefect.cli.deployment", "prefect.cli.deploy", "prefect.cli.flow_run", "prefect.cli.work_pool")
IMPORTED = (*PREFECT, "dateparser", "flows.train", "flows.stages", "flows.reproduce", "fm_core.cli", "torch")
"""What most commands of this project import."""


def run_here(command: list[str]) -> object:
    """Run `prefect ...`, `fm ...`, `python -m MODULE ...` or `python -c CODE ...` in this process.

    Returns what to pass to sys.exit.
    """
    sys.argv = command
    if command[0] == "prefect":
        from prefect.cli import app

        return app()
    if command[0] == "fm":
        from fm_core.cli import main

        return main()
    if command[:2] == ["python", "-c"]:
        sys.argv = command[1:2] + command[3:]
        exec(compile(command[2], "<string>", "exec"), {"__name__": "__main__"})
        return 0
    assert command[:2] == ["python", "-m"], f"no process is prepared for {command[0]}"
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    return 0


def serve() -> object:
    """Run the requests; in a fork, its command."""
    gc.freeze()  # the forks share what was imported
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            redirect(0, os.devnull, os.O_RDONLY)
            redirect(1, request["out"], os.O_WRONLY)
            redirect(2, request["err"], os.O_WRONLY)
            return run_here(request["command"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, descriptor)
    os.close(opened)


class CommandServer:
    """The process, and how to run a command in it."""

    def __init__(self, folder: Path, environment: dict[str, str], imported: Sequence[str] = IMPORTED) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.command_server", *imported],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Exit status and output of a command."""
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            request = {"command": command, "out": out.name, "err": err.name}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answered, _, _ = select.select([self.process.stdout], [], [], seconds)
            assert answered, f"{command} still runs after {seconds} s\n{out.read()}{err.read()}"
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    sys.exit(serve())
