"""Cluster check: whether the hosts of a run can work together, tested through the run's launcher."""

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig
from fm_core.errors import StopRequested, UserError
from fm_core.launch.cluster_probe import FACTS
from fm_core.launch.dispatch import hosts_of
from fm_core.launch.hostfile import read_logins
from fm_core.launch.ssh import unreached
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.run.progress import no_progress
from fm_core.run.results import Check
from fm_core.storage.atomic_files import read_json

CLOCK_SECONDS = 2.0
"""Leases and time stamps of hosts whose clocks differ by more than this cannot be compared."""
SCRATCH_BYTES = 2 * 2**30

Ranks = list[dict[str, Any]]


def cluster_checks(config: RunConfig, checkpoint_bytes: int | None = None) -> list[Check]:
    """Reachability, then versions, devices, data, space, clocks and all-reduce bandwidth of all hosts.

    Starts one job of the size of training under run.root, and removes its files. Space for checkpoints is
    checked if the size of one is known.
    """
    checks = _check_ssh(config) if config.launch.kind == "ssh" else []
    if not all(check.ok for check in checks):
        return checks
    control = Path(config.run.root).resolve() / f".preflight-{uuid.uuid4().hex[:8]}"
    try:
        (control / "logs").mkdir(parents=True)
        facts = control / FACTS
        probe = StageJob(
            control,
            control / "logs",
            "preflight",
            "fm_core.launch.cluster_probe:probe",
            config,
            facts.exists,
            collective=True,
        )
        supervise(probe, no_progress)
        record = read_json(facts) or {}
    except (OSError, RuntimeError, StopRequested, UserError) as error:
        return [*checks, Check("launch", False, str(error).splitlines()[-1])]
    finally:
        shutil.rmtree(control, ignore_errors=True)
    return [*checks, *assess(config, record["ranks"], record["all_reduce"], checkpoint_bytes)]


def assess(
    config: RunConfig, ranks: Ranks, speed: dict[str, float], checkpoint_bytes: int | None = None
) -> list[Check]:
    """Evaluate the facts of all ranks as checks."""
    size, milliseconds = int(speed["bytes"]) >> 20, speed["seconds"] * 1e3
    hosts = {rank["host"] for rank in ranks}
    return [
        Check("launch", True, f"{len(ranks)} processes met on {', '.join(sorted(hosts))}"),
        _versions(ranks),
        _devices(ranks),
        _run_directory(config, ranks),
        _data(config, ranks),
        _space(ranks),
        *([_checkpoint_space(config, ranks[0], checkpoint_bytes)] if checkpoint_bytes else []),
        _clocks(ranks),
        Check(
            "all-reduce",
            True,
            f"{size} MiB over {len(ranks)} processes in {milliseconds:.1f} ms, "
            f"{speed['bytes_per_s'] / 1e9:.2f} GB/s per process",
        ),
    ]


def _check_ssh(config: RunConfig) -> list[Check]:
    try:
        hosts = hosts_of(config.launch)
    except UserError as error:
        return [Check("hostfile", False, str(error))]
    if not shutil.which("pdsh"):
        return [Check("pdsh", False, "pdsh is not installed on this host; install it")]
    failed = unreached(hosts, tuple(read_logins(config.launch.hostfile or "").values()))
    return [Check(f"ssh to {host}", host not in failed, failed.get(host) or "answers") for host in hosts]


def _versions(ranks: Ranks) -> Check:
    known = ranks[0]["versions"]
    first = ranks[0]["host"]
    mismatches = [
        f"{name} is {known.get(name)} on {first} and {rank['versions'].get(name)} on {rank['host']}"
        for rank in _one_per_host(ranks)
        for name in sorted({*known, *rank["versions"]})
        if rank["versions"].get(name) != known.get(name)
    ]
    if mismatches:
        return Check("versions", False, "; ".join(mismatches))
    return Check("versions", True, ", ".join(f"{name} {version}" for name, version in known.items()))


def _devices(ranks: Ranks) -> Check:
    hosts = _one_per_host(ranks)
    wanted = {host["host"]: sum(rank["host"] == host["host"] for rank in ranks) for host in hosts}
    devices = ", ".join(f"{host['host']}: {host['devices']} x {host['device']}" for host in hosts)
    short = [host["host"] for host in hosts if wanted[host["host"]] > host["devices"]]
    if short:
        return Check("devices", False, f"{devices}; fewer than processes on {', '.join(short)}")
    if len({host["device"] for host in hosts}) > 1:
        return Check("devices", False, f"{devices}; all hosts should have the same")
    return Check("devices", True, devices)


def _run_directory(config: RunConfig, ranks: Ranks) -> Check:
    blind = ", ".join(host["host"] for host in _one_per_host(ranks) if not host["run_directory"])
    if blind and not config.train.checkpoint_root:
        message = f"not visible on {blind}; give train.checkpoint_root a URL or a path that all hosts share"
        return Check("run directory", False, message)
    return Check("run directory", True, f"not visible on {blind}" if blind else "all hosts see it")


def _data(config: RunConfig, ranks: Ranks) -> Check:
    blind = [host["host"] for host in _one_per_host(ranks) if not host["data"]]
    where = f"{config.data.root}/{config.data.name}"
    if blind:
        return Check(
            "data",
            False,
            f"no manifest of {where} on {', '.join(blind)}; run fm shard or set another data.root",
        )
    return Check("data", True, f"all hosts see {where}")


def _space(ranks: Ranks) -> Check:
    free = {host["host"]: host["scratch_bytes"] for host in _one_per_host(ranks)}
    space = ", ".join(f"{host}: {size / 2**30:.0f} GiB" for host, size in free.items())
    ok = min(free.values()) >= SCRATCH_BYTES
    return Check("free scratch space", ok, space if ok else f"{space}; {SCRATCH_BYTES >> 30} GiB are needed")


def _checkpoint_space(config: RunConfig, writer: dict[str, Any], each: int) -> Check:
    """Space for the checkpoints that rank 0 has yet to write."""
    facts = writer["checkpoints"]
    # A new one is complete before an old one is removed; during uploads there are two.
    wanted = 2 if facts["uploads"] else config.train.keep_checkpoints + 1
    to_come = max(1, wanted - facts["there"])
    free = facts["free_bytes"]
    key = "train.checkpoint_staging" if facts["uploads"] else "train.checkpoint_root"
    message = (
        f"{writer['host']}: {free / 2**30:,.1f} GiB free for {key} at {facts['folder']}; "
        f"{to_come} checkpoints of {each / 2**30:,.2f} GiB remain to be written"
    )
    return Check("space for checkpoints", free >= to_come * each, message)


def _clocks(ranks: Ranks) -> Check:
    # Read after a barrier, so they differ by the clocks and the milliseconds that ranks take to leave it.
    times = [rank["clock"] for rank in ranks]
    apart = max(times) - min(times)
    ok = apart < CLOCK_SECONDS
    return Check("clocks", ok, f"{apart:.3f} s apart" + ("" if ok else "; synchronize them with NTP"))


def _one_per_host(ranks: Iterable[dict[str, Any]]) -> Ranks:
    return list({rank["host"]: rank for rank in ranks}.values())
