"""Slurm cluster of two nodes on a pair of hosts: controller on the first, a slurmd and a munged on each."""

import os
import subprocess
import time
from pathlib import Path

from tests.support.two_hosts import Host, HostPair

PROGRAMS = {
    "/usr/sbin/slurmctld": "slurm-wlm",
    "/usr/sbin/slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "/usr/sbin/munged": "munge",
}
# cred_expire: how long a job that is queued again waits (by default two minutes).
# SlurmdTimeout: how long a node may be silent (by default five minutes).
CONFIG = """
ClusterName=pair
SlurmctldHost=h1(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=25
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=h1 NodeAddr=10.99.0.1 CPUs=1 RealMemory=1000
NodeName=h2 NodeAddr=10.99.0.2 CPUs=1 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10
"""


class SlurmCluster:
    """The cluster and its commands, run on the first host."""

    def __init__(self, pair: HostPair, folder: Path) -> None:
        self.login = pair.first
        config, key = folder / "slurm.conf", folder / "munge.key"
        config.write_text(CONFIG)
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for host in (pair.first, pair.second):
            self._begin(host, config, key, folder)
        self._wait_idle(folder)

    def command(self, *arguments: str) -> str:
        """Run a Slurm command; its output."""
        return self.login.run(*arguments)

    def job(self, number: int) -> dict[str, str]:
        """Slurm's fields of a job, by Slurm's names."""
        fields = self.command("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def _begin(self, host: Host, config: Path, key: Path, folder: Path) -> None:
        host.run("mkdir", "-p", "/run/slurm/state", "/run/slurm/spool", "/run/munge")
        # Where every Slurm program looks for its configuration, in this host alone.
        host.run("mount", "-t", "tmpfs", "slurm", "/etc/slurm")
        host.run("cp", str(config), "/etc/slurm/slurm.conf")
        private = ["--socket=/run/munge/munge.socket.2", "--pid-file=/run/munge/munged.pid"]
        log = ["--log-file=/run/munge/munged.log", "--seed-file=/run/munge/munged.seed"]
        host.run("/usr/sbin/munged", "--force", f"--key-file={key}", *private, *log)
        if host is self.login:
            host.run("/usr/sbin/slurmctld", "-L", str(folder / "slurmctld.log"))
        host.run("/usr/sbin/slurmd", "-N", host.name, "-L", str(folder / f"slurmd-{host.name}.log"))

    def _wait_idle(self, folder: Path) -> None:
        deadline = time.monotonic() + 300
        query = self.login.inside("sinfo", "--noheader", "--partition=low", "--format=%T %D")
        while subprocess.run(query, capture_output=True, text=True).stdout.strip() != "idle 2":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
