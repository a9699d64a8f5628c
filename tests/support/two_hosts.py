"""Two hosts on one machine: namespaces of network, processes, mounts and host name, an sshd in each.

Every process of a host ends with the one that holds its namespaces, and that one ends with pytest.
"""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT

PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
    "pdsh": "pdsh",
}

INIT = """
set -e
hostname {name}
mount --bind {etc}/hosts /etc/hosts
mount --bind {etc}/ssh /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
touch {etc}/up
exec /usr/sbin/sshd -D -f /etc/ssh/sshd_config
"""
SSH_CONFIG = """
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
"""


def require(programs: dict[str, str]) -> None:
    """Skip where a package or the right to make namespaces is missing."""
    missing = sorted({package for program, package in programs.items() if not shutil.which(program)})
    if missing:
        pytest.skip(f"no cluster without the packages {', '.join(missing)}")
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no right to make hosts of namespaces: {made.stderr.decode().strip()}")


@dataclass
class Host:
    """One host."""

    name: str
    address: str
    keeper: subprocess.Popen[bytes]
    """Holds the namespaces."""

    @property
    def init(self) -> int:
        """Process id of the host's first process, as seen from outside."""
        return psutil.Process(self.keeper.pid).children()[0].pid

    def inside(self, *arguments: str) -> list[str]:
        """The command line that runs a command in this host."""
        return ["nsenter", "--target", str(self.init), "--mount", "--uts", "--net", "--pid", "--", *arguments]

    def run(self, *arguments: str) -> str:
        """Run a command in this host, which must succeed; its output."""
        done = subprocess.run(self.inside(*arguments), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def processes(self, word: str) -> list[psutil.Process]:
        """Live processes of this host whose environment contains `word`."""
        here = Path(f"/proc/{self.init}/ns/pid").readlink()
        matches: list[psutil.Process] = []
        for process in psutil.process_iter():
            place = Path(f"/proc/{process.pid}")
            try:
                if (place / "ns" / "pid").readlink() == here and word.encode() in (
                    place / "environ"
                ).read_bytes():
                    matches.append(process)
            except OSError:
                continue
        return matches

    def kill(self, word: str) -> int:
        """Kill -9 all such processes at once; their number."""
        matches = self.processes(word)
        for process in matches:
            process.send_signal(signal.SIGSTOP)
        for process in matches:
            process.kill()
        return len(matches)

    def hide(self, path: Path) -> None:
        """Cover a directory with an empty one, in this host alone."""
        self.run("mount", "-t", "tmpfs", "hidden", str(path))

    def show(self, path: Path) -> None:
        """Undo `hide`."""
        self.run("umount", str(path))


@dataclass
class HostPair:
    """Two hosts with a network link between them."""

    first: Host
    second: Host

    def disconnect(self) -> None:
        """Take the link of the second host down."""
        self.second.run("ip", "link", "set", "cable", "down")

    def reconnect(self) -> None:
        """Bring the link up again."""
        self.second.run("ip", "link", "set", "cable", "up")

    def close(self) -> None:
        """End both hosts with all their processes."""
        for host in (self.first, self.second):
            host.keeper.kill()
            host.keeper.wait()


def make_pair(folder: Path) -> HostPair:
    """Start h1 at 10.99.0.1 and h2 at 10.99.0.2; each can log in to the other."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    hosts = [_start(folder, key, f"h{number}", f"10.99.0.{number}") for number in (1, 2)]
    pair = HostPair(*hosts)
    cable = ["ip", "link", "add", "name", "cable", "netns", str(hosts[0].init), "type", "veth"]
    subprocess.run([*cable, "peer", "name", "cable", "netns", str(hosts[1].init)], check=True)
    for host in hosts:
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
        host.run("ip", "link", "set", "cable", "up")
    return pair


def _start(folder: Path, key: Path, name: str, address: str) -> Host:
    etc = folder / name
    (etc / "ssh").mkdir(parents=True)
    shutil.copy(key, etc / "ssh" / "key")
    shutil.copy(key.with_suffix(".pub"), etc / "ssh" / "key.pub")
    (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG)
    (etc / "ssh" / "sshd_config").write_text(SSHD_CONFIG)
    # As Debian writes it: a host's own name resolves to its loopback interface.
    others = "".join(f"10.99.0.{number} h{number}\n" for number in (1, 2) if f"h{number}" != name)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    keeper = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "sh", "-c", INIT.format(name=name, etc=etc)],
        stdout=(etc / "log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while not (etc / "up").exists():
        assert keeper.poll() is None, (etc / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return Host(name, address, keeper)


def environment(**variables: str) -> dict[str, str]:
    """Environment of a command on a host."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FM_", "SLURM"))}
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **fixed, **variables}
