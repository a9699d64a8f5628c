"""Faults around the processes: disks, system calls, the clock, the network and the store."""

from random import Random

from infra.chaos_faults.disks import ChaosDisk
from infra.chaos_faults.lab import ActiveFault, EpisodeLab, FaultKind, NotNowError
from infra.chaos_faults.namespaces import run
from infra.chaos_faults.preload import CLOCK_STEPS_SECONDS

SECONDS = (0.5, 2.0, 5.0, 12.0)
"""How long a fault lasts."""
LONG_SECONDS = (2.0, 8.0, 20.0)
ERROR_SECONDS = 20.0
"""How long a call that is to fail is waited for."""


def _hide(kind: str, disk: ChaosDisk, lab: EpisodeLab, rng: Random) -> ActiveFault:
    if disk.hidden:
        raise NotNowError("it is unmounted already")
    if not lab.has_completed():
        raise NotNowError("an empty mount point cannot be told from a new run before the first checkpoint")
    seconds = rng.choice(LONG_SECONDS)
    disk.hide()
    return ActiveFault(kind, f"for {seconds:g} s", disk.show, seconds)


def hide_checkpoints(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The place of the checkpoints is unmounted and mounted again."""
    assert lab.checkpoint_disk
    return _hide("unmount: checkpoints", lab.checkpoint_disk, lab, rng)


def hide_run(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The run directory is unmounted and mounted again."""
    return _hide("unmount: run directory", lab.run_disk, lab, rng)


def fill_checkpoints(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The disk of the checkpoints is full for a while."""
    assert lab.checkpoint_disk
    lab.checkpoint_disk.fill()
    seconds = rng.choice(SECONDS)
    return ActiveFault("full disk: checkpoints", f"for {seconds:g} s", lab.checkpoint_disk.free, seconds)


def fill_run(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The disk of the run directory is full for a while."""
    lab.run_disk.fill()
    seconds = rng.choice(SECONDS)
    return ActiveFault("full disk: run directory", f"for {seconds:g} s", lab.run_disk.free, seconds)


def fail_calls(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """A random system call on a file of the run fails, in whichever process makes it next."""
    preload = lab.preload
    assert preload
    lab.live()
    detail = preload.arm_randomly(rng)
    return ActiveFault(
        "error of a system call",
        detail,
        preload.disarm,
        ERROR_SECONDS,
        is_over=lambda: preload.spent,
        occurred=lambda: preload.fired > 0,
    )


def step_clock(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The wall clock of all processes of the run is set, back or forth."""
    assert lab.preload
    lab.live()
    seconds = rng.choice(CLOCK_STEPS_SECONDS)
    lab.preload.step_clock(seconds)
    return ActiveFault("clock step", f"to {seconds:+g} s")


def cut_loopback(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The interface on which the ranks talk is down for a while."""
    lab.live("rank 0")
    seconds = rng.choice(SECONDS)
    run("ip", "link", "set", "lo", "down")
    return ActiveFault(
        "network cut: ranks", f"for {seconds:g} s", lambda: run("ip", "link", "set", "lo", "up"), seconds
    )


def stop_store(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The store refuses connections for a while."""
    store = lab.store
    assert store
    seconds = rng.choice(LONG_SECONDS)
    store.ask("stop")
    return ActiveFault("store stopped", f"for {seconds:g} s", lambda: store.ask("start"), seconds)


def freeze_store(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The store accepts connections and does not answer for a while."""
    assert lab.store
    seconds = rng.choice(LONG_SECONDS)
    lab.store.freeze()
    return ActiveFault("store frozen", f"for {seconds:g} s", lab.store.thaw, seconds)


def cut_store(lab: EpisodeLab, rng: Random) -> ActiveFault:
    """The cable to the store is out for a while."""
    assert lab.store
    seconds = rng.choice(LONG_SECONDS)
    lab.store.cut()
    return ActiveFault("network cut: store", f"for {seconds:g} s", lab.store.connect, seconds)


KINDS = (
    FaultKind("unmount: checkpoints", hide_checkpoints, frozenset({"mounts"}), "folder"),
    FaultKind("unmount: run directory", hide_run, frozenset({"mounts"})),
    FaultKind("full disk: checkpoints", fill_checkpoints, frozenset({"mounts"}), "folder"),
    FaultKind("full disk: run directory", fill_run, frozenset({"mounts"})),
    FaultKind("error of a system call", fail_calls, frozenset({"compiler"})),
    FaultKind("clock step", step_clock, frozenset({"compiler"})),
    FaultKind("network cut: ranks", cut_loopback, frozenset({"network"})),
    FaultKind("store stopped", stop_store, frozenset({"store"}), "store"),
    FaultKind("store frozen", freeze_store, frozenset({"store"}), "store"),
    FaultKind("network cut: store", cut_store, frozenset({"store", "network"}), "store"),
)
