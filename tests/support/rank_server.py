"""Process that has imported torch and DeepSpeed, and forks the ranks of jobs from itself.

Reads one request per line, a JSON object {"call": "module:function", "arguments": [...], "ranks": N,
"log": FILE}, and writes the exit statuses of the ranks as a JSON list. A rank is a process with the variables
that torchrun sets; it calls the function and exits with status 0, or 1 if the function raises.

{"agent": [...], "variables": {...}, "folder": FOLDER, "log": FILE} starts the command of a rank group
(forked_rank_group.py) and writes its process id.
"""

import json
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from typing import NoReturn

from tests.support.forked_rank_group import be_agent
from tests.support.short_classifier import short_classifier

PRELOADED = (
    "deepspeed",
    "fm_core.evaluation.evaluation_worker",
    "fm_core.sampling.sample_worker",
    "fm_core.training.train_worker",
    "tests.support.trainer_lab",
)


def free_port() -> int:
    """A port of the loopback interface that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_rank(request: dict, number: int, port: int) -> NoReturn:
    """Be one rank."""
    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ |= {
            **{"RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0"},
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(request["ranks"])),
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        module, _, function = request["call"].partition(":")
        getattr(import_module(module), function)(*request["arguments"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_job(request: dict) -> list[int]:
    """Run all ranks of a job; when one fails, the others are killed, which may be waiting for it."""
    port = free_port()
    ranks: dict[int, int] = {}
    for number in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            run_rank(request, number, port)
        ranks[pid] = number
    statuses = [0] * len(ranks)
    while ranks:
        pid, status = os.wait()
        if pid not in ranks:
            continue
        statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return statuses


def start_agent(request: dict) -> int:
    """Start a rank group; its process id."""
    pid = os.fork()
    if pid == 0:
        be_agent(request["agent"], request["variables"], request["folder"], request["log"])
    return pid


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    for module in PRELOADED:
        import_module(module)
    with short_classifier():
        for line in sys.stdin:
            request = json.loads(line)
            answer = start_agent(request) if "agent" in request else run_job(request)
            os.write(answers, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main()
