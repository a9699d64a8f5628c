"""Rank group: starts the ranks of one host, serves the rendezvous store, and ends all ranks together.

`python -m fm_core.launch.rank_group --count 2 --world 2 --listen -- -m MODULE ARGUMENT...` starts two ranks
with a rendezvous on the loopback interface; the other options are for a job of several hosts. The store is a
TCPStore on a socket that is bound to one address beforehand, which torchrun does not support: its stores
listen on every interface. Nothing in the store is pickled.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

GRACE_SECONDS = 30.0
"""Seconds in which the other ranks must save and exit after one has failed or a stop was requested."""
POLL_SECONDS = 0.1
ATTEMPT = timedelta(seconds=3)
"""Timeout of one attempt to connect to the first host's store, in seconds."""
RANKS_KEY = "fm/ranks"
"""Counter in the store: ranks of the hosts that have joined."""
LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Environment variables that keep connections between ranks of one host on its loopback interface."""
PREFECT_SECRETS = ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "PREFECT_SERVER_API_AUTH_STRING")
"""Prefixes of variables that are not passed to ranks, which do not use Prefect."""
_LEFT_OUT_PREFIXES = ("PET_", "TORCHELASTIC_", "GROUP_", "ROLE_")
_LEFT_OUT = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CROSS_RANK", "CROSS_SIZE", "NCCL_COMM_ID"),
    *PREFECT_SECRETS,
}
"""Variables by which torchrun, Kubeflow and others identify a rank. If inherited from the user's environment,
they would misdirect the ranks of this job."""


def rank_group_command(
    arguments: list[str],
    count: int,
    *,
    first: int = 0,
    world: int | None = None,
    meet: str,
    listen: bool = True,
) -> list[str]:
    """The command of a rank group.

    Args:
        arguments: arguments of Python that start one rank.
        count: ranks on this host.
        first: index of the first of them.
        world: total ranks of the job; by default `count`.
        meet: rendezvous "address:port"; port 0 lets the kernel choose one.
        listen: whether this group serves the store: on the first host of several, and on a single host if its
            ranks form a process group and are at least two. One rank serves its own (`store_of_one`).
    """
    options = [f"--count={count}", f"--first={first}", f"--world={world or count}", f"--meet={meet}"]
    if listen:
        options.append("--listen")
    return [sys.executable, "-m", "fm_core.launch.rank_group", *options, "--", *arguments]


@dataclass
class RankGroup:
    """The ranks of this host as child processes, by index."""

    ranks: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict[int, "subprocess.Popen[bytes]"])
    asked: bool = False
    """Whether this process was asked to stop."""

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: ask the ranks to save and exit."""
        self.asked = True

    def start(self, number: int, command: list[str], variables: dict[str, str]) -> None:
        """Start one rank."""
        self.ranks[number] = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=variables)

    def wait(self) -> int:
        """Wait until all ranks have ended; return 0 if all exited with status 0, else 1.

        If one fails, or this process is asked to stop, the others get SIGTERM, and later SIGKILL.
        """
        failed, deadline = False, None
        while True:
            for number, rank in self.ranks.items():
                if rank.poll() and not failed:
                    failed = True
                    print(f"rank {number} ended with {_described(rank.returncode)}", flush=True)
            running = [rank for rank in self.ranks.values() if rank.returncode is None]
            if not running:
                break
            now = time.monotonic()
            if deadline is None and (failed or self.asked):
                deadline = now + GRACE_SECONDS
                for rank in running:
                    rank.terminate()
            if deadline is not None and now > deadline:
                for rank in running:
                    rank.kill()
            time.sleep(POLL_SECONDS)
        return int(any(rank.returncode for rank in self.ranks.values()))


def main(arguments: list[str]) -> int:
    """Run the ranks that the command line describes; return 0 if all exited with status 0, else 1."""
    options = _options(arguments)
    address, _, port = options.meet.rpartition(":")
    listener = _listener(address, int(port)) if options.listen else None
    if listener:
        port = str(listener.getsockname()[1])
    group = RankGroup()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, group.ask)
    world = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(options.world),
        "LOCAL_WORLD_SIZE": str(options.count),
        # The store is in this process, so that it answers even if a rank hangs or is stopped.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    store = None
    if options.world > options.count:
        # No rank starts before all hosts have joined: until then there is nothing to save, and all can end at
        # once.
        store = _store(address, listener) if listener else _reached(address, int(port), group)
        if store is None or not _all_are_there(store, options.count, options.world, group):
            return 1
    inherited = {name: value for name, value in os.environ.items() if not _is_left_out(name)}
    for local in range(options.count):
        number = {"RANK": str(options.first + local), "LOCAL_RANK": str(local)}
        group.start(options.first + local, [sys.executable, *options.command], inherited | world | number)
    if store is None and listener:
        # Ranks that connect early wait in the backlog of the socket, since importing torch takes seconds.
        store = _store(address, listener)
    code = group.wait()
    del store
    return code


@contextmanager
def store_of_one() -> Generator[None]:
    """Serve the rendezvous store of a job of one rank in this process, the rank, if its group serves none."""
    import torch.distributed as dist

    if os.environ["MASTER_PORT"] != "0" or dist.is_initialized():
        yield
        return
    listener = _listener(LOOPBACK, 0)
    os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
    store = _store(LOOPBACK, listener)
    yield
    del store


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rank_group")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--meet", default=f"{LOOPBACK}:0")
    parser.add_argument("--listen", action="store_true")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def _listener(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(socket.SOMAXCONN)
    return listener


def _store(address: str, listener: socket.socket) -> Any:
    """The store, which takes over the socket and serves it from its own threads."""
    import torch.distributed as dist

    port = listener.getsockname()[1]
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _reached(address: str, port: int, group: RankGroup) -> Any:
    """The store of the first host once it answers; None if this group is asked to stop first."""
    import torch.distributed as dist

    while not group.asked:
        try:
            # torch logs every failed attempt.
            socket.create_connection((address, port), ATTEMPT.total_seconds()).close()
            return dist.TCPStore(address, port, is_master=False, timeout=ATTEMPT)  # pyright: ignore[reportPrivateImportUsage]
        except (OSError, RuntimeError):
            time.sleep(POLL_SECONDS)
    return None


def _all_are_there(store: Any, count: int, world: int, group: RankGroup) -> bool:
    """Wait until the groups of all hosts have joined; False if asked to stop first."""
    there = store.add(RANKS_KEY, count)
    while there < world and not group.asked:
        time.sleep(POLL_SECONDS)
        there = store.add(RANKS_KEY, 0)
    return there >= world


def _is_left_out(name: str) -> bool:
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def _described(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
