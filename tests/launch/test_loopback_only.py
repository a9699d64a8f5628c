"""The ranks of one host listen on the loopback interface alone, whatever the environment says."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fm_core.config import RunConfig
from fm_core.launch import local
from fm_core.launch.job import Job
from fm_core.launch.launcher import JobSpec
from fm_core.launch.node_spec import meeting_address
from fm_core.launch.rank_group import LOOPBACK, LOOPBACK_INTERFACE, rank_group_command
from tests.support import ROOT
from tests.support.tiny_run import TinyRun

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""

GLOO = r"""
import os, psutil, torch.distributed as dist
dist.init_process_group("gloo")
group = dist.new_group(backend="gloo")
dist.barrier(group=group)
own = [*psutil.Process().net_connections("tcp"), *psutil.Process().parent().net_connections("tcp")]
for connection in own:
    if connection.status == psutil.CONN_LISTEN:
        os.write(1, f"listens on {connection.laddr.ip}\n".encode())  # two ranks write to one pipe
left = [name for name in os.environ if name.startswith("PET_")]
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()} {left}\n".encode())
dist.barrier()
"""
LEFT_BY_KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_MAX_RESTARTS": "3",
    "PET_RDZV_ENDPOINT": "master:29400",
    "MASTER_ADDR": "master",
    "MASTER_PORT": "1",
    "RANK": "7",
    "WORLD_SIZE": "9",
    "NODE_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "5",
    "GLOO_SOCKET_IFNAME": "eth9",
    "NCCL_COMM_ID": "10.0.0.1:1",
}


@pytest.fixture
def rank_group(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start a script as two ranks."""

    def start(script: str) -> subprocess.Popen[str]:
        file = tmp_path / "rank.py"
        file.write_text(script)
        return subprocess.Popen(
            rank_group_command([str(file)], 2, meet=f"{LOOPBACK}:0"),
            env={**os.environ, **LEFT_BY_KUBEFLOW, **LOOPBACK_INTERFACE, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_a_gloo_group_and_its_store_listen_on_loopback_whatever_torchrun_settings_are_left(rank_group):
    group = rank_group(GLOO)
    output = group.communicate(timeout=120)[0]
    assert group.returncode == 0, output
    lines = output.splitlines()
    assert {line for line in lines if line.startswith("rank")} == {"rank 0 of 2 []", "rank 1 of 2 []"}
    addresses = [line.removeprefix("listens on ") for line in lines if line.startswith("listens on")]
    assert len(addresses) >= 5  # each rank's two groups, and the store
    assert set(addresses) == {LOOPBACK}


def test_one_rank_s_failure_ends_the_others(tmp_path: Path, rank_group):
    group = rank_group(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('asked') or 3))\n"
        f"open({str(tmp_path)!r} + '/up-' + os.environ['RANK'], 'w').close()\n"
        f"while not os.path.exists({str(tmp_path)!r} + '/up-1'): time.sleep(0.05)\n"
        "if os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(100)\n",
    )
    output = group.communicate(timeout=60)[0]
    assert group.returncode == 1
    assert "rank 0 ended with signal SIGKILL" in output
    assert "asked" in output


def test_a_group_that_is_asked_to_end_asks_its_ranks_once_and_waits(tmp_path: Path, rank_group):
    group = rank_group(
        "import os, signal, time\n"
        "asked = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        f"open({str(tmp_path)!r} + '/up-' + os.environ['RANK'], 'w').close()\n"
        "while not asked: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "os.write(1, b'saved %d\\n' % len(asked))\n",
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(3):
        group.send_signal(signal.SIGTERM)
    output = group.communicate(timeout=60)[0]
    assert (group.returncode, output.count("saved 1")) == (0, 2), output


def test_hosts_meet_at_the_address_of_one_interface(monkeypatch: pytest.MonkeyPatch):
    assert meeting_address(["anything"]) == LOOPBACK
    addresses = {
        "lo": [SimpleNamespace(address="127.0.0.1")],
        "ib0": [SimpleNamespace(address="10.1.0.1")],
    }
    names = {"a": "10.1.0.1", "debian": "127.0.1.1"}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *_, **__: [(socket.AF_INET, None, 0, "", (names[host], 0))]
    )
    assert meeting_address(["a", "b"]) == "10.1.0.1"
    monkeypatch.setattr("fm_core.launch.node_spec._address_towards", lambda host: "10.1.0.1")
    assert meeting_address(["debian", "b"]) == "10.1.0.1"


@pytest.fixture
def second_interface() -> list[str]:
    """The beginning of a command that runs the rest on a host with a second interface, 10.98.0.1."""
    if not shutil.which("ip") or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a network namespace, or no iproute2")
    setup = (
        "ip link set lo up; ip link add v1 type veth peer name v2; ip addr add 10.98.0.1/24 dev v1; "
        'ip link set v1 up; ip link set v2 up; exec "$@"'
    )
    return ["unshare", "--net", "sh", "-c", setup, "sh"]


def listening(pid: int) -> set[str]:
    """Addresses on which any process in the network namespace of a process listens, in hexadecimal."""
    addresses: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == LISTEN:
                addresses.add(local.partition(":")[0])
    return addresses


def test_nothing_of_a_real_training_listens_on_another_interface(tmp_path: Path, second_interface: list[str]):
    run = TinyRun(tmp_path)
    assert run.fm("shard").code == 0
    training = subprocess.Popen(
        [*second_interface, sys.executable, "-m", "fm_core", "train", "--config", str(run.file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **LEFT_BY_KUBEFLOW},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[str] = set()
    while training.poll() is None:
        try:
            if Path(f"/proc/{training.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
                seen |= listening(training.pid)
        except (OSError, psutil.Error):
            pass
        time.sleep(0.05)
    output = training.communicate()[0]
    assert training.returncode == 0, output
    loopback = socket.inet_aton(LOOPBACK)[::-1].hex().upper()
    assert seen == {loopback}


@pytest.mark.parametrize(
    ("collective", "processes", "served"), [(True, 2, True), (True, 1, False), (False, 2, False)]
)
def test_a_store_is_served_for_several_ranks_that_form_a_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collective: bool, processes: int, served: bool
):
    commands: list[list[str]] = []
    monkeypatch.setattr(
        local,
        "spawn_detached",
        lambda command, log, variables: commands.append(command) or SimpleNamespace(pid=1),
    )
    monkeypatch.setattr(local, "with_agent", lambda job, pid: job)
    job = Job(
        id="a",
        stage="train",
        kind="local",
        host="h",
        processes=processes,
        threads=1,
        log=str(tmp_path / "log"),
    )
    local.submit(
        JobSpec(job, tmp_path, tmp_path, "module:work", tmp_path / "run.yaml", RunConfig(), collective)
    )
    assert ("--listen" in commands[0]) == served


ALONE = r"""
import os, psutil, sys, torch.distributed as dist
from fm_core.launch.rank_group import store_of_one
group = psutil.Process().parent()
with store_of_one():
    dist.init_process_group("gloo")
    dist.barrier()
    own = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    of_group = [c for c in group.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    torch = any("libtorch" in m.path for m in group.memory_maps())
    print(sorted(set(own)), of_group, torch, dist.get_world_size(), flush=True)
"""


def test_a_rank_without_others_serves_its_own_store_on_loopback(tmp_path: Path):
    file = tmp_path / "rank.py"
    file.write_text(ALONE)
    done = subprocess.run(
        rank_group_command([str(file)], 1, meet=f"{LOOPBACK}:0", listen=False),
        env={**os.environ, **LEFT_BY_KUBEFLOW, **LOOPBACK_INTERFACE, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, f"['{LOOPBACK}'] [] False 1\n"), done.stderr
